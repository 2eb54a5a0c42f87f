package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// CheckTarget returns ErrInvalidArgument for a target path that kubelet would not send.
func CheckTarget(target string) error {
	switch {
	case target == "":
		return fmt.Errorf("%w: the target path is missing", errdefs.ErrInvalidArgument)
	case len(target) > 4095, strings.ContainsRune(target, 0):
		return fmt.Errorf("%w: the target path of %d bytes is longer than 4095 bytes or has a NUL byte", errdefs.ErrInvalidArgument, len(target))
	case !filepath.IsAbs(target) || filepath.Clean(target) != target || target == "/":
		return fmt.Errorf("%w: target path %q is not absolute, is /, or has '.', '..' or a double slash", errdefs.ErrInvalidArgument, target)
	}
	return nil
}

// openTarget opens the target directory (O_PATH), and makes it if it is missing. It does not make the parent, which is kubelet's: a
// pod without its directory is gone. The target must be a directory, and not a link to one.
func openTarget(path string) (target *os.File, made bool, err error) {
	parent, err := linux.OpenDir(filepath.Dir(path))
	if err != nil {
		return nil, false, fmt.Errorf("%w: open the parent of target path %s, which kubelet makes: %w", errdefs.ErrFailedPrecondition, path, err)
	}
	defer parent.Close()
	name := filepath.Base(path)
	err = linux.Mkdirat(parent, name, 0o750)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, false, err
	}
	made = err == nil
	target, err = linux.OpenDirAt(parent, name)
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
		return nil, false, fmt.Errorf("%w: target path %s is a file or a link; it must be a directory or not exist",
			errdefs.ErrInvalidArgument, path)
	}
	return target, made, err
}

// removeTarget removes the target directory if it exists and is empty.
func removeTarget(path string) error {
	err := linux.Rmdirat(nil, path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, syscall.ENOTEMPTY):
		return fmt.Errorf("%w: target path %s is not empty, although nothing is mounted on it; move its content away, kubelet will retry",
			errdefs.ErrFailedPrecondition, path)
	case errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("%w: target path %s is not a directory; the driver did not make it and does not remove it",
			errdefs.ErrFailedPrecondition, path)
	}
	return err
}
