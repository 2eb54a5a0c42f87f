package volume

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// CheckTarget refuses a target path that kubelet would not send.
func CheckTarget(target string) error {
	switch {
	case target == "":
		return fmt.Errorf("%w: the target path is missing", errdefs.ErrInvalidArgument)
	case len(target) > 4095, strings.ContainsRune(target, 0):
		return fmt.Errorf("%w: target path of %d bytes: it is longer than 4095 or has a NUL byte", errdefs.ErrInvalidArgument, len(target))
	case !filepath.IsAbs(target) || filepath.Clean(target) != target || target == "/":
		return fmt.Errorf("%w: target path %q: it must be absolute, below /, and written without '.', '..' and double slashes", errdefs.ErrInvalidArgument, target)
	}
	return nil
}

// openTarget opens the target directory (O_PATH), and makes it where it is missing. Its parent is kubelet's to make: a
// pod whose directory is gone is gone itself. The target itself must be a directory, no link to one.
func openTarget(path string) (target *os.File, made bool, err error) {
	parent, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, false, fmt.Errorf("%w: open the directory of the target %s: %w: kubelet makes it before it publishes", errdefs.ErrFailedPrecondition, path, err)
	}
	defer unix.Close(parent)
	name := filepath.Base(path)
	err = unix.Mkdirat(parent, name, 0o750)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, false, &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	made = err == nil
	fd, err := unix.Openat(parent, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, false, fmt.Errorf("%w: target path %s is a file or a link: it must be a directory or not exist", errdefs.ErrInvalidArgument, path)
	}
	if err != nil {
		return nil, made, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), made, nil
}

// removeTarget removes the target directory, where there is one and nothing is in it.
func removeTarget(path string) error {
	err := unix.Rmdir(path)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, unix.ENOTEMPTY):
		return fmt.Errorf("%w: target path %s is not empty, although nothing is mounted on it: see what is there, move it away, and it is tried again", errdefs.ErrFailedPrecondition, path)
	case errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%w: target path %s is no directory: the driver did not make it and does not remove it", errdefs.ErrFailedPrecondition, path)
	}
	return &os.PathError{Op: "rmdir", Path: path, Err: err}
}

// podKey names the directory of one pod's upper: the pod's UID, or where the target does not tell it, a digest of that.
func (m *Manager) podKey(target string) string {
	if uid := m.pods.PodUID(target); uid != "" {
		return uid
	}
	sum := sha256.Sum256([]byte(target))
	return hex.EncodeToString(sum[:16])
}
