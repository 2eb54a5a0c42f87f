package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Mark is what the root directory of a layer looked like when it was resolved: its device, its inode, and when an entry
// in it was last made, removed or renamed. "" is the mark of a layer that may change, a volume of the pod's.
type Mark string

func markOf(dir *os.File) (Mark, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &stat); err != nil {
		return "", &os.PathError{Op: "fstat", Path: dir.Name(), Err: err}
	}
	return newMark(stat), nil
}

func newMark(stat unix.Stat_t) Mark {
	return Mark(fmt.Sprintf("%x:%x:%x", stat.Dev, stat.Ino, stat.Mtim.Nano()))
}

// Check compares a layer's directory with the mark. It is of the kind NotFound where there is no directory any more, and
// FailedPrecondition where it is another one, or what is directly in it was changed. Deeper down nobody looks: that would
// take as long as there are files.
func (m Mark) Check(path string) error {
	if m == "" {
		return nil
	}
	var stat unix.Stat_t
	err := unix.Stat(path, &stat)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: layer %s is not there any more", errdefs.ErrNotFound, path)
	case err != nil:
		return &os.PathError{Op: "stat layer", Path: path, Err: err}
	case newMark(stat) != m:
		return fmt.Errorf("%w: layer %s was changed or replaced since it was mounted: what views show of it is not defined: start their pods anew", errdefs.ErrFailedPrecondition, path)
	}
	return nil
}
