package linux

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// Space is an amount of bytes or inodes of a file system.
type Space struct {
	// Total is all that the file system has, Used what is taken of it.
	Total, Used int64
	// Available is what processes without privileges may still take. Total is more than Used and Available where a part is reserved
	// for root.
	Available int64
}

// Usable is what processes without privileges can have used at most: what df(1) computes its percentage of.
func (s Space) Usable() int64 { return s.Used + s.Available }

// Usage is how full a file system is.
type Usage struct{ Bytes, Inodes Space }

// FileSystemUsage returns how full the file system of an open file is (fstatfs(2)).
func FileSystemUsage(file *os.File) (Usage, error) {
	stat, err := statfs(file)
	return usageOf(stat), err
}

// FileSystemUsageAt returns how full the file system of a path is (statfs(2)).
func FileSystemUsageAt(path string) (Usage, error) {
	stat, err := statfsPath(path)
	return usageOf(stat), err
}

func usageOf(stat unix.Statfs_t) Usage {
	block := int64(stat.Bsize)
	return Usage{
		Bytes: Space{
			Total:     int64(stat.Blocks) * block,
			Used:      int64(stat.Blocks-stat.Bfree) * block,
			Available: int64(stat.Bavail) * block,
		},
		Inodes: Space{Total: int64(stat.Files), Used: int64(stat.Files - stat.Ffree), Available: int64(stat.Ffree)},
	}
}

// IsReadOnly reports whether nothing can be written through the mount of an open file: the mount or its file system is read-only
// (fstatfs(2), ST_RDONLY).
func IsReadOnly(file *os.File) (bool, error) {
	stat, err := statfs(file)
	return stat.Flags&unix.ST_RDONLY != 0, err
}

func statfs(file *os.File) (unix.Statfs_t, error) {
	var stat unix.Statfs_t
	err := call("fstatfs", file, func(fd int) error { return unix.Fstatfs(fd, &stat) })
	return stat, err
}

func statfsPath(path string) (unix.Statfs_t, error) {
	var stat unix.Statfs_t
	err := callAt("statfs", nil, path, func(int) error { return unix.Statfs(path, &stat) })
	return stat, err
}

// Numbers of file system types (statfs(2)).
const (
	OverlayMagic = unix.OVERLAYFS_SUPER_MAGIC
	BtrfsMagic   = unix.BTRFS_SUPER_MAGIC
)

// FileSystemMagic returns the number of the type of an open file's file system (fstatfs(2)).
func FileSystemMagic(file *os.File) (int64, error) {
	stat, err := statfs(file)
	return int64(stat.Type), err
}

// FileSystemMagicAt returns the number of the type of a path's file system (statfs(2)).
func FileSystemMagicAt(path string) (int64, error) {
	stat, err := statfsPath(path)
	return int64(stat.Type), err
}

// fileSystemNames are the names of file systems that people try, for messages.
var fileSystemNames = map[int64]string{
	unix.BTRFS_SUPER_MAGIC: "btrfs", unix.CEPH_SUPER_MAGIC: "ceph", 0xfe534d42: "smb", 0xff534d42: "cifs",
	unix.EROFS_SUPER_MAGIC_V1: "erofs", unix.EXT4_SUPER_MAGIC: "ext4", unix.F2FS_SUPER_MAGIC: "f2fs", unix.FUSE_SUPER_MAGIC: "fuse",
	unix.MSDOS_SUPER_MAGIC: "vfat", unix.NFS_SUPER_MAGIC: "nfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.RAMFS_MAGIC: "ramfs",
	unix.SQUASHFS_MAGIC: "squashfs", unix.TMPFS_MAGIC: "tmpfs", unix.V9FS_MAGIC: "9p", unix.XFS_SUPER_MAGIC: "xfs",
}

// FileSystemName returns the name of the type of an open file's file system, for messages and for decisions by name.
func FileSystemName(file *os.File) string {
	magic, err := FileSystemMagic(file)
	if err != nil {
		return "unknown file system"
	}
	if name, ok := fileSystemNames[magic]; ok {
		return name
	}
	return fmt.Sprintf("file system of type %#x", magic)
}

// IsNotWritable reports whether an error says that a file system is full, read-only or failed (ENOSPC, EDQUOT, EROFS, EIO).
func IsNotWritable(err error) bool {
	return slices.ContainsFunc([]syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EIO}, func(errno syscall.Errno) bool {
		return errors.Is(err, errno)
	})
}
