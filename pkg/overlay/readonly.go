package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// kernelWork is the directory that overlayfs makes in the work directory when it is mounted, after it has removed the one before.
const kernelWork = "work"

// checkWritable returns ErrResourceExhausted if a view that has an upper is read-only, to which nothing was written yet. The kernel
// mounts an overlay read-only, and returns no error, where the disk has no room for the directory that it works in.
func (s Spec) checkWritable(root *os.File) error {
	if s.Upper == nil {
		return nil
	}
	readOnly, err := linux.IsReadOnly(root)
	if err != nil || !readOnly {
		return err
	}
	err = linux.Mkdirat(s.Work, kernelWork, 0)
	if err == nil || errors.Is(err, fs.ErrExist) {
		// Somebody has made room since.
		err = syscall.ENOSPC
	}
	return fmt.Errorf("%w: mount an overlay that can be written to: the kernel found no room for a directory in %s: %w",
		errdefs.ErrResourceExhausted, s.Work.Name(), err)
}
