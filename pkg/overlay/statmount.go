package overlay

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mountIDRequest is struct mnt_id_req of include/uapi/linux/mount.h, in its first version.
type mountIDRequest struct {
	size  uint32
	_     uint32
	id    uint64
	param uint64
}

// statmountBasic asks for the superblock's device, magic and flags (STATMOUNT_SB_BASIC).
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

// superMagic returns the magic number of the file system that path lies on, as the kernel's mount has it: the file
// system itself is not asked, so that one that hangs cannot hold the answer back (statmount(2)).
func superMagic(path string) (uint64, error) {
	var stat unix.Statx_t
	flags := unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	if err := unix.Statx(unix.AT_FDCWD, path, flags, unix.STATX_MNT_ID_UNIQUE, &stat); err != nil {
		return 0, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	if stat.Mask&unix.STATX_MNT_ID_UNIQUE == 0 {
		return 0, &os.PathError{Op: "statx", Path: path, Err: unix.ENOSYS}
	}
	request := mountIDRequest{size: uint32(unsafe.Sizeof(mountIDRequest{})), id: stat.Mnt_id, param: statmountBasic}
	var status mountStatus
	_, _, errno := unix.Syscall6(unix.SYS_STATMOUNT, uintptr(unsafe.Pointer(&request)), uintptr(unsafe.Pointer(&status)), unsafe.Sizeof(status), 0, 0, 0)
	if errno != 0 {
		return 0, &os.PathError{Op: "statmount", Path: path, Err: errno}
	}
	return status.sbMagic, nil
}
