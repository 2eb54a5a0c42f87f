package upper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// ErrNotWritable says that a file system is full, read-only or failed, so that it is not known what it could hold.
var ErrNotWritable = errors.New("it cannot be written to")

// Probe returns nil if the file system of an open directory can hold an upper. It makes, in a directory of its own that it
// removes again, what overlayfs makes there (overlayfs documentation, "Upper and lower"). It returns ErrFailedPrecondition if
// the file system lacks something, and ErrNotWritable where nothing can be written.
func Probe(dir *os.File) error {
	probe, name, err := makeProbeDir(dir)
	if err != nil {
		return refusal(dir, "make a directory", err)
	}
	defer linux.Rmdirat(dir, name)
	defer probe.Close()

	// Markers of opaque and redirected directories.
	if err := setTrustedXattr(probe); err != nil {
		return refusal(dir, "set an extended attribute trusted.overlay.*", err)
	}
	// Deleted files of a layer are character devices 0/0 in the upper.
	if err := linux.Mknodat(probe, "whiteout", syscall.S_IFCHR, 0); err != nil {
		return refusal(dir, "make a whiteout", err)
	}
	if err := linux.Unlinkat(probe, "whiteout"); err != nil {
		return refusal(dir, "remove a whiteout", err)
	}
	// A rename leaves a whiteout behind in one step.
	if err := linux.Mknodat(probe, "file", syscall.S_IFREG|0o600, 0); err != nil {
		return refusal(dir, "make a file", err)
	}
	defer linux.Unlinkat(probe, "file")
	if err := linux.Renameat(probe, "file", probe, "renamed", linux.RenameWhiteout); err != nil {
		return refusal(dir, "rename a file and leave a whiteout (RENAME_WHITEOUT)", err)
	}
	if err := linux.Unlinkat(probe, "renamed"); err != nil {
		return refusal(dir, "remove a file", err)
	}
	return nil
}

func makeProbeDir(dir *os.File) (*os.File, string, error) {
	name := fmt.Sprintf(".overlay-csi-probe-%d-%d", os.Getpid(), dir.Fd())
	err := linux.Mkdirat(dir, name, 0o700)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, "", err
	}
	probe, err := linux.OpenDirAt(dir, name)
	if err != nil {
		return nil, "", err
	}
	for _, left := range []string{"file", "renamed", "whiteout"} {
		// A crash may have left them. One that cannot be removed fails the probe below.
		_ = linux.Unlinkat(probe, left)
	}
	return probe, name, nil
}

// writtenName is the attribute that CheckWritable sets. Nobody reads it.
const writtenName = "trusted.overlay-csi.written"

// CheckWritable returns nil if the file system of a directory can be written to, or is only full. It returns
// ErrFailedPrecondition if it is read-only. It writes to find out: a file system that was shut down after an error need not report
// that it is read-only (ext4 from Linux 6.12 on), and accepts new times of files (ext4 before that).
func CheckWritable(dir string) error {
	err := linux.SetXattrAt(nil, dir, writtenName, []byte("y"))
	switch {
	case err == nil, errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return nil
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: the file system of %s is read-only: the kernel log may say why", errdefs.ErrFailedPrecondition, dir)
	}
	return fmt.Errorf("write to a file system: %w", err)
}

func setTrustedXattr(dir *os.File) error {
	const name = "trusted.overlay.overlay-csi-probe"
	if err := linux.SetXattr(dir, name, []byte("y")); err != nil {
		return err
	}
	value, err := linux.GetXattr(dir, name)
	if err != nil {
		return err
	}
	if string(value) != "y" {
		return fmt.Errorf("it reads back as %q", value)
	}
	return nil
}

func refusal(dir *os.File, action string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: %w: %s cannot hold an upper: %s: %w", errdefs.ErrResourceExhausted, ErrNotWritable, dir.Name(), action, err)
	case errors.Is(err, syscall.EROFS), errors.Is(err, syscall.EIO):
		return fmt.Errorf("%w: %w: %s cannot hold an upper: %s: %w", errdefs.ErrFailedPrecondition, ErrNotWritable, dir.Name(), action, err)
	}
	return fmt.Errorf("%w: %s (%s) cannot hold an upper: %s: %w; use ext4, xfs, btrfs or tmpfs",
		errdefs.ErrFailedPrecondition, dir.Name(), linux.FileSystemName(dir), action, err)
}

// isNodeLocal reports whether a file system is of a type that only one node mounts at a time, so that a lock which another node
// left in it is stale.
func isNodeLocal(dir *os.File) bool {
	switch linux.FileSystemName(dir) {
	case "ext4", "xfs", "btrfs", "f2fs", "tmpfs":
		return true
	}
	return false
}
