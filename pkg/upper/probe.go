package upper

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Probe returns nil if the file system of an open directory can hold an upper. It makes, in a directory of its own that it
// removes again, what overlayfs makes there (overlayfs documentation, "Upper and lower"). It returns ErrFailedPrecondition if
// the file system lacks something or is read-only, and ErrResourceExhausted if it is full.
func Probe(dir *os.File) error {
	probe, name, err := makeProbeDir(dir)
	if err != nil {
		return refusal(dir, "make a directory", err)
	}
	defer unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR)
	defer probe.Close()

	// Markers of opaque and redirected directories.
	if err := setTrustedXattr(probe); err != nil {
		return refusal(dir, "set an extended attribute trusted.overlay.*", err)
	}
	// Deleted files of a layer are character devices 0/0 in the upper.
	if err := unix.Mknodat(int(probe.Fd()), "whiteout", unix.S_IFCHR, 0); err != nil {
		return refusal(dir, "make a whiteout", err)
	}
	if err := unix.Unlinkat(int(probe.Fd()), "whiteout", 0); err != nil {
		return refusal(dir, "remove a whiteout", err)
	}
	// A rename leaves a whiteout behind in one step.
	if err := unix.Mknodat(int(probe.Fd()), "file", unix.S_IFREG|0o600, 0); err != nil {
		return refusal(dir, "make a file", err)
	}
	defer unix.Unlinkat(int(probe.Fd()), "file", 0)
	if err := unix.Renameat2(int(probe.Fd()), "file", int(probe.Fd()), "renamed", unix.RENAME_WHITEOUT); err != nil {
		return refusal(dir, "rename a file and leave a whiteout (RENAME_WHITEOUT)", err)
	}
	if err := unix.Unlinkat(int(probe.Fd()), "renamed", 0); err != nil {
		return refusal(dir, "remove a file", err)
	}
	return nil
}

func makeProbeDir(dir *os.File) (*os.File, string, error) {
	name := fmt.Sprintf(".overlay-csi-probe-%d-%d", os.Getpid(), dir.Fd())
	err := unix.Mkdirat(int(dir.Fd()), name, 0o700)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, "", err
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", err
	}
	probe := os.NewFile(uintptr(fd), dir.Name()+"/"+name)
	for _, left := range []string{"file", "renamed", "whiteout"} {
		// A crash may have left them. One that cannot be removed fails the probe below.
		_ = unix.Unlinkat(fd, left, 0)
	}
	return probe, name, nil
}

// writtenName is the attribute that CheckWritable sets. Nobody reads it.
const writtenName = "trusted.overlay-csi.written"

// CheckWritable returns nil if the file system of a directory can be written to, or is only full. It returns
// ErrFailedPrecondition if it is read-only. It writes to find out: a file system that was shut down after an error need not report
// that it is read-only (ext4 from Linux 6.12 on), and accepts new times of files (ext4 before that).
func CheckWritable(dir string) error {
	err := unix.Lsetxattr(dir, writtenName, []byte("y"), 0)
	switch {
	case err == nil, errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return nil
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: the file system of %s is read-only: the kernel log may say why", errdefs.ErrFailedPrecondition, dir)
	}
	return fmt.Errorf("write to a file system: %w", &os.PathError{Op: "setxattr", Path: dir, Err: err})
}

func setTrustedXattr(dir *os.File) error {
	const name = "trusted.overlay.overlay-csi-probe"
	if err := unix.Fsetxattr(int(dir.Fd()), name, []byte("y"), 0); err != nil {
		return err
	}
	value := make([]byte, 8)
	n, err := unix.Fgetxattr(int(dir.Fd()), name, value)
	if err != nil {
		return err
	}
	if string(value[:n]) != "y" {
		return fmt.Errorf("it reads back as %q", value[:n])
	}
	return nil
}

func refusal(dir *os.File, action string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %s cannot hold an upper: %s: %w", errdefs.ErrResourceExhausted, dir.Name(), action, err)
	}
	return fmt.Errorf("%w: %s (%s) cannot hold an upper: %s: %w: use ext4, xfs, btrfs or tmpfs", errdefs.ErrFailedPrecondition, dir.Name(), fileSystemName(dir), action, err)
}

// fileSystemNames are the names of file systems that people try, for messages (statfs(2)).
var fileSystemNames = map[int64]string{
	unix.BTRFS_SUPER_MAGIC: "btrfs", unix.CEPH_SUPER_MAGIC: "ceph", 0xfe534d42: "smb", 0xff534d42: "cifs",
	unix.EROFS_SUPER_MAGIC_V1: "erofs", unix.EXT4_SUPER_MAGIC: "ext4", unix.F2FS_SUPER_MAGIC: "f2fs", unix.FUSE_SUPER_MAGIC: "fuse",
	unix.MSDOS_SUPER_MAGIC: "vfat", unix.NFS_SUPER_MAGIC: "nfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.RAMFS_MAGIC: "ramfs",
	unix.SQUASHFS_MAGIC: "squashfs", unix.TMPFS_MAGIC: "tmpfs", unix.V9FS_MAGIC: "9p", unix.XFS_SUPER_MAGIC: "xfs",
}

func fileSystemName(dir *os.File) string {
	var stat unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &stat); err != nil {
		return "unknown file system"
	}
	if name, ok := fileSystemNames[int64(stat.Type)]; ok {
		return name
	}
	return fmt.Sprintf("file system of type %#x", stat.Type)
}

// isNodeLocal reports whether a file system is of a type that only one node mounts at a time, so that a lock which another node
// left in it is stale.
func isNodeLocal(dir *os.File) bool {
	switch fileSystemName(dir) {
	case "ext4", "xfs", "btrfs", "f2fs", "tmpfs":
		return true
	}
	return false
}
