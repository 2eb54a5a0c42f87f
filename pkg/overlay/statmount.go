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

// superMagic returns the magic number of a mount's file system as the mount has it: the file system itself is not
// asked, so that one that hangs cannot hold the answer back (statmount(2)). id is the mount's unique ID.
func superMagic(id uint64) (int64, error) {
	request := mountIDRequest{size: uint32(unsafe.Sizeof(mountIDRequest{})), id: id, param: statmountBasic}
	var status mountStatus
	_, _, errno := unix.Syscall6(unix.SYS_STATMOUNT, uintptr(unsafe.Pointer(&request)), uintptr(unsafe.Pointer(&status)), unsafe.Sizeof(status), 0, 0, 0)
	if errno != 0 {
		return 0, os.NewSyscallError("statmount", errno)
	}
	return int64(status.sbMagic), nil
}
