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

// check refuses a directory that was opened beneath root.
func (f Forbidden) check(root, dir *os.File) error {
	id, err := idOf(int(dir.Fd()), "")
	if err != nil {
		return fmt.Errorf("stat %s: %w", dir.Name(), err)
	}
	if f.above[id] {
		return fmt.Errorf("%w: it contains the driver's data root %s, where uppers are", errdefs.ErrInvalidArgument, f.path)
	}
	// The directory's real path, links resolved, as the kernel has it.
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err != nil {
		return fmt.Errorf("find the path of %s: %w", dir.Name(), err)
	}
	rootPath, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", root.Fd()))
	if err != nil {
		return fmt.Errorf("find the path of %s: %w", root.Name(), err)
	}
	for {
		if path == f.path || id == f.self {
			return fmt.Errorf("%w: it lies in the driver's data root %s", errdefs.ErrInvalidArgument, f.path)
		}
		if path == rootPath || path == "/" || path == "." {
			return nil
		}
		path = filepath.Dir(path)
		// A parent that was renamed meanwhile does not matter: the directory itself is held open.
		id, _ = idOf(unix.AT_FDCWD, path)
	}
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
