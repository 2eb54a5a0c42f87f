package linux

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What follows is from include/uapi/linux/quota.h, dqblk_xfs.h and fs.h: golang.org/x/sys has none of it, and the libraries for
// project quotas need cgo.
const (
	qGetQuota            = 0x800007
	qSetQuota            = 0x800008
	qXGetQStat           = 'X'<<8 + 5
	projectQuota         = 2
	validLimits          = 1 | 4
	quotaProjectCounted  = 1 << 4
	quotaProjectEnforced = 1 << 5
	inheritProject       = 0x200
	fsIOCGetXattr        = 0x801c581f
	fsIOCSetXattr        = 0x401c5820
)

// dqblk is struct if_dqblk: limits of space are in KiB, the space itself in bytes.
type dqblk struct {
	blockLimit, blockSoftLimit, space  uint64
	inodeLimit, inodeSoftLimit, inodes uint64
	blockTime, inodeTime               uint64
	valid                              uint32
	_                                  uint32
}

// quotaState is the head of struct fs_quota_stat; the kernel writes 80 bytes.
type quotaState struct {
	version int8
	_       int8
	flags   uint16
	_       [76]byte
}

// fsxattr is struct fsxattr.
type fsxattr struct {
	flags, extentSize, extents, project, cowExtentSize uint32
	_                                                  [8]byte
}

// ProjectQuota is what a file system has counted for a project, and its limits, 0 for none (quotactl(2), struct if_dqblk).
type ProjectQuota struct {
	Bytes, Inodes           int64
	BytesLimit, InodesLimit int64
}

// ProjectQuotaState reports whether the file system of an open directory counts projects, and whether it enforces their limits
// (quotactl(2), Q_XGETQSTAT). The error is ENOSYS, ESRCH or the like where it has no project quota.
func ProjectQuotaState(dir *os.File) (counted, enforced bool, err error) {
	var state quotaState
	if err := quotactl(dir, qXGetQStat, 0, unsafe.Pointer(&state)); err != nil {
		return false, false, err
	}
	return state.flags&quotaProjectCounted != 0, state.flags&quotaProjectEnforced != 0, nil
}

// GetProjectQuota returns the quota of a project (quotactl(2), Q_GETQUOTA). It is zero for a project that nothing is known of.
func GetProjectQuota(dir *os.File, project uint32) (ProjectQuota, error) {
	var value dqblk
	err := quotactl(dir, qGetQuota, project, unsafe.Pointer(&value))
	if errors.Is(err, unix.ENOENT) {
		return ProjectQuota{}, nil
	}
	if err != nil {
		return ProjectQuota{}, err
	}
	return ProjectQuota{
		Bytes: int64(value.space), Inodes: int64(value.inodes),
		BytesLimit: int64(value.blockLimit) << 10, InodesLimit: int64(value.inodeLimit),
	}, nil
}

// SetProjectLimits sets the limits of a project, 0 for none (quotactl(2), Q_SETQUOTA). Bytes are rounded up to KiB.
func SetProjectLimits(dir *os.File, project uint32, bytes, inodes int64) error {
	value := dqblk{blockLimit: uint64((bytes + 1023) >> 10), inodeLimit: uint64(inodes), valid: validLimits}
	return quotactl(dir, qSetQuota, project, unsafe.Pointer(&value))
}

// quotactl is quotactl_fd(2) (Linux 5.14) for project quotas: it needs no block device, which a container does not have.
func quotactl(dir *os.File, command uintptr, project uint32, value unsafe.Pointer) error {
	return withReadable(dir, "quotactl_fd", func(fd int) error {
		_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, uintptr(fd), command<<8|projectQuota, uintptr(project), uintptr(value), 0, 0)
		return asError(errno)
	})
}

// Project returns the project of an open file or directory, 0 for none (ioctl_xfs_fsgetxattr(2)). The handle must not be one of
// [O_PATH].
func Project(file *os.File) (uint32, error) {
	var attributes fsxattr
	err := ioctl(file, "FS_IOC_FSGETXATTR", fsIOCGetXattr, unsafe.Pointer(&attributes))
	return attributes.project, err
}

// SetProject gives an open directory a project, which everything that is made in it inherits (FS_XFLAG_PROJINHERIT).
func SetProject(dir *os.File, project uint32) error {
	var attributes fsxattr
	if err := ioctl(dir, "FS_IOC_FSGETXATTR", fsIOCGetXattr, unsafe.Pointer(&attributes)); err != nil {
		return err
	}
	attributes.project = project
	attributes.flags |= inheritProject
	return ioctl(dir, "FS_IOC_FSSETXATTR", fsIOCSetXattr, unsafe.Pointer(&attributes))
}

func ioctl(file *os.File, name string, request uintptr, value unsafe.Pointer) error {
	return call(name, file, func(fd int) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(value))
		return asError(errno)
	})
}
