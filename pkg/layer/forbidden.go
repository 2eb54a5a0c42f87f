package layer

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Forbidden is a directory, the driver's data root, that no layer may lie in or contain: one volume's upper would be
// another's layer. Directories are told by device and inode, so that a bind mount of it does not pass.
type Forbidden struct {
	path string
	// self is the directory, above are those that it lies in.
	self  fileID
	above map[fileID]bool
}

type fileID struct{ dev, ino uint64 }

// Forbid returns the rule for one directory, which must exist.
func Forbid(path string) (Forbidden, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return Forbidden{}, fmt.Errorf("resolve the data root: %w", err)
	}
	forbidden := Forbidden{path: path, above: map[fileID]bool{}}
	if forbidden.self, err = idOf(unix.AT_FDCWD, path); err != nil {
		return Forbidden{}, fmt.Errorf("stat the data root %s: %w", path, err)
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		id, err := idOf(unix.AT_FDCWD, dir)
		if err != nil {
			return Forbidden{}, fmt.Errorf("stat %s, above the data root: %w", dir, err)
		}
		forbidden.above[id] = true
		if dir == "/" {
			return forbidden, nil
		}
	}
}

// check refuses a directory that was opened beneath root. It walks up by `..`, which the kernel resolves from where the
// directory really is, whatever links led to it.
func (f Forbidden) check(root, dir *os.File) error {
	rootID, err := idOf(int(root.Fd()), "")
	if err != nil {
		return fmt.Errorf("stat %s: %w", root.Name(), err)
	}
	at, err := idOf(int(dir.Fd()), "")
	if err != nil {
		return fmt.Errorf("stat %s: %w", dir.Name(), err)
	}
	if f.above[at] {
		return fmt.Errorf("%w: it contains the driver's data root %s, where uppers are", errdefs.ErrInvalidArgument, f.path)
	}
	up := ""
	for below := (fileID{}); at != below; {
		if at == f.self {
			return fmt.Errorf("%w: it lies in the driver's data root %s", errdefs.ErrInvalidArgument, f.path)
		}
		if at == rootID {
			return nil
		}
		below = at
		up += "../"
		if at, err = idOf(int(dir.Fd()), up); err != nil {
			return fmt.Errorf("stat %s above %s: %w", up, dir.Name(), err)
		}
	}
	// The root of all: the directory was renamed out of its layer root meanwhile, and held open.
	return nil
}

// idOf identifies a directory, or with an empty path the open one.
func idOf(dirFD int, path string) (fileID, error) {
	var stat unix.Stat_t
	if err := unix.Fstatat(dirFD, path, &stat, unix.AT_EMPTY_PATH); err != nil {
		return fileID{}, err
	}
	return fileID{stat.Dev, stat.Ino}, nil
}

func beneath(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}
