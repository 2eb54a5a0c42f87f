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
	base string
}

// NewDir returns the upper that is kept in base.
func NewDir(base string) Dir { return Dir{base: base} }

// Prepare makes the directories where they are missing; see openDirs for like.
func (d Dir) Prepare(like *os.File) (Dirs, error) {
	const flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Open(d.base, flags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.Mkdir(d.base, 0o700); err != nil {
			return Dirs{}, fmt.Errorf("make the upper's directory: %w", err)
		}
		fd, err = unix.Open(d.base, flags, 0)
	}
	if err != nil {
		return Dirs{}, fmt.Errorf("open the upper's directory %s: %w", d.base, err)
	}
	base := os.NewFile(uintptr(fd), d.base)
	defer base.Close()
	dirs, err := openDirs(base, like)
	if err != nil {
		return Dirs{}, fmt.Errorf("prepare an upper: %w", err)
	}
	return dirs, nil
}

// Path is the path of the upper directory.
func (d Dir) Path() string { return d.base + "/" + upperName }

// Work is the path of the work directory, which holds nothing of worth while no overlay is mounted on it.
func (d Dir) Work() string { return d.base + "/" + workName }
