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
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
)

// views are the mounted views.
type views struct{ mounter }

// maxStacked is the number of views that are unmounted at one target. There is more than one only if somebody mounted by hand.
const maxStacked = 8

// isLive reports whether the view of a publication is mounted.
func (v views) isLive(p *record.Publication) (bool, error) {
	mounted, err := v.At(p.Target)
	if err != nil {
		return false, fmt.Errorf("query the mount at %s: %w", p.Target, err)
	}
	return mounted == overlay.Overlay, nil
}

// firstLive returns a publication with a mounted view, other than the one at a target. It returns ErrNotFound if there is none.
func (v views) firstLive(r *record.Record, target string) (*record.Publication, error) {
	for i := range r.Publications {
		p := &r.Publications[i]
		if p.Target == target {
			continue
		}
		live, err := v.isLive(p)
		if err != nil {
			return nil, err
		}
		if live {
			return p, nil
		}
	}
	return nil, fmt.Errorf("%w: volume %s has no other view", errdefs.ErrNotFound, r.ID)
}

// unmount unmounts the views at a target. Nothing is mounted there when it returns nil. It does not unmount what is not an
// overlay, because the driver did not mount that.
func (v views) unmount(target string) error {
	for range maxStacked {
		if mounted, err := v.unmountTop(target); err != nil || !mounted {
			return err
		}
	}
	return stillMounted(target)
}

// unmountAndRemove unmounts the views at a target, and removes the directory. It does not ask once more what is mounted there: a mount
// point cannot be removed.
func (v views) unmountAndRemove(target string) error {
	for range maxStacked {
		mounted, err := v.unmountTop(target)
		if err != nil {
			return err
		}
		if err := removeTarget(target); !mounted || !errors.Is(err, syscall.EBUSY) {
			return err
		}
	}
	return stillMounted(target)
}

// unmountTop unmounts the view at a target, and reports whether there was one.
func (v views) unmountTop(target string) (mounted bool, err error) {
	at, err := v.At(target)
	switch {
	case err != nil:
		return false, fmt.Errorf("query the mount at %s: %w", target, err)
	case at == overlay.Nothing:
		return false, nil
	case at == overlay.Other:
		return false, fmt.Errorf("%w: the mount at %s is not an overlay, and not of this driver; unmount it by hand",
			errdefs.ErrFailedPrecondition, target)
	}
	err = v.Unmount(target)
	if errors.Is(err, syscall.EBUSY) {
		return false, fmt.Errorf("%w: unmount %s: %w; a container of the pod or a process on the node has files open in it",
			errdefs.ErrUnavailable, target, err)
	}
	if err != nil && !errors.Is(err, syscall.EINVAL) {
		return false, fmt.Errorf("unmount: %w", err)
	}
	return true, nil
}

func stillMounted(target string) error {
	return fmt.Errorf("%w: %s is still a mount point after %d unmounts; find out what mounts there",
		errdefs.ErrFailedPrecondition, target, maxStacked)
}

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
