package upper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Dir is an upper in a plain directory of the node's own file system.
type Dir struct {
	root *os.File
	base string
}

// NewDir returns the upper that is kept in base, a path beneath root. root is an open directory, on whose mount the
// upper is used.
func NewDir(root *os.File, base string) Dir { return Dir{root: root, base: base} }

// Prepare makes the directories where they are missing; see openDirs for like.
func (d Dir) Prepare(like *os.File) (Dirs, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	fd, err := unix.Openat2(int(d.root.Fd()), d.base, &how)
	if errors.Is(err, fs.ErrNotExist) {
		if err := unix.Mkdirat(int(d.root.Fd()), d.base, 0o700); err != nil {
			return Dirs{}, fmt.Errorf("make the upper's directory %s: %w", d.path(), err)
		}
		fd, err = unix.Openat2(int(d.root.Fd()), d.base, &how)
	}
	if err != nil {
		return Dirs{}, fmt.Errorf("open the upper's directory %s: %w", d.path(), err)
	}
	base := os.NewFile(uintptr(fd), d.path())
	defer base.Close()
	dirs, err := openDirs(base, like)
	if err != nil {
		return Dirs{}, fmt.Errorf("prepare an upper: %w", err)
	}
	return dirs, nil
}

// Path is the path of the upper directory.
func (d Dir) Path() string { return d.path() + "/" + upperName }

// Work is the path of the work directory, which holds nothing of worth while no overlay is mounted on it.
func (d Dir) Work() string { return d.path() + "/" + workName }

func (d Dir) path() string { return d.root.Name() + "/" + d.base }
