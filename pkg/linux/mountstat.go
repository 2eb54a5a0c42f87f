package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MountStat is what statx(2) returns of the mount that a file is on.
type MountStat struct {
	// MountID is the unique ID of the mount where the kernel has such (Linux 6.8), else one that may be reused.
	MountID uint64
	// Unique says that MountID is unique while the machine is up.
	Unique bool
	// IsRoot says that the file is the root of its mount.
	IsRoot bool
	// ID is the identity of the file, as [Stat.ID].
	ID FileID
}

// StatMount stats the mount that a path in a directory is on, or the directory itself with an empty path, without following a link
// at the end of the path. The file system is not waited for (AT_STATX_DONT_SYNC), and nothing is mounted automatically.
func StatMount(dir *os.File, path string) (MountStat, error) {
	const (
		flags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_EMPTY_PATH | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
		// A kernel that does not know one of the two mount IDs returns the other.
		mask = unix.STATX_TYPE | unix.STATX_INO | unix.STATX_MNT_ID | unix.STATX_MNT_ID_UNIQUE
	)
	var stat unix.Statx_t
	if err := callAt("statx", dir, path, func(fd int) error { return unix.Statx(fd, path, flags, mask, &stat) }); err != nil {
		return MountStat{}, err
	}
	return MountStat{
		MountID: stat.Mnt_id,
		Unique:  stat.Mask&unix.STATX_MNT_ID_UNIQUE != 0,
		IsRoot:  stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0,
		ID:      FileID{Dev: unix.Mkdev(stat.Dev_major, stat.Dev_minor), Ino: stat.Ino},
	}, nil
}

// HasMountRootAttribute reports whether statx(2) says of a file whether it is the root of a mount (Linux 5.8).
func HasMountRootAttribute(file *os.File) (bool, error) {
	var stat unix.Statx_t
	err := call("statx", file, func(fd int) error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_TYPE, &stat) })
	return stat.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0, err
}

// IsMountRoot reports whether a path in a directory, or the directory itself with an empty path, is the root of a mount. A link at
// the end of the path is not followed.
func IsMountRoot(dir *os.File, path string) (bool, error) {
	stat, err := StatMount(dir, path)
	return stat.IsRoot, err
}

// IsMountPoint is [IsMountRoot] for a path that need not exist.
func IsMountPoint(path string) (bool, error) {
	mounted, err := IsMountRoot(nil, path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return mounted, err
}

// MountID returns the ID of the mount that an open file is on; see [MountStat].
func MountID(file *os.File) (uint64, error) {
	stat, err := StatMount(file, "")
	return stat.MountID, err
}

// TableMountID returns the ID that the mount of an open file has in the mount table (proc_pid_mountinfo(5)). Unlike [MountID], it asks
// the file system for nothing, so that it answers for one that has failed.
func TableMountID(file *os.File) (int, error) {
	path := fmt.Sprintf("/proc/self/fdinfo/%d", file.Fd())
	info, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(info)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(id))
		}
	}
	return 0, fmt.Errorf("%s has no mnt_id", path)
}

// mountIDRequest is struct mnt_id_req of include/uapi/linux/mount.h, in its first version.
type mountIDRequest struct {
	size  uint32
	_     uint32
	id    uint64
	param uint64
}

// statmountBasic asks for the superblock's device, magic number and flags (STATMOUNT_SB_BASIC).
const statmountBasic = 0x1

// mountStatus is the beginning of struct statmount, with room behind it for what a later kernel adds.
type mountStatus struct {
	size    uint32
	_       uint32
	mask    uint64
	_       [2]uint32 // major and minor number of the device
	sbMagic uint64
	_       [480]byte
}

// MountStatus is what statmount(2) returns of a mount.
type MountStatus struct {
	// Magic is the number of the file system's type (statfs(2)).
	Magic int64
}

// Statmount returns what the kernel knows of a mount, by its unique ID (statmount(2), Linux 6.8). The file system itself is not
// asked, so that one that hangs cannot delay the answer.
func Statmount(id uint64) (MountStatus, error) {
	request := mountIDRequest{size: uint32(unsafe.Sizeof(mountIDRequest{})), id: id, param: statmountBasic}
	var status mountStatus
	err := retry(func() error {
		_, _, errno := unix.Syscall6(unix.SYS_STATMOUNT, uintptr(unsafe.Pointer(&request)), uintptr(unsafe.Pointer(&status)),
			unsafe.Sizeof(status), 0, 0, 0)
		return asError(errno)
	})
	if err != nil {
		return MountStatus{}, os.NewSyscallError("statmount", err)
	}
	return MountStatus{Magic: int64(status.sbMagic)}, nil
}
