package linux

import (
	"errors"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Fchownat changes the owner of an entry of a directory, without following a link, or of the open file itself with an empty path
// (fchownat(2)). The handle may be one of [O_PATH].
func Fchownat(dir *os.File, path string, uid, gid uint32) error {
	return callAt("fchownat", dir, path, func(fd int) error {
		return unix.Fchownat(fd, path, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH)
	})
}

// Fchmodat changes the mode of an entry of a directory, or of the open file itself with an empty path (fchmodat(2)). It follows a
// link: the caller has to know that the entry is none. The handle may be one of [O_PATH].
func Fchmodat(dir *os.File, path string, mode uint32) error {
	return callAt("fchmodat", dir, path, func(fd int) error {
		if path != "" {
			return unix.Fchmodat(fd, path, mode, 0)
		}
		err := unix.Fchmod(fd, mode)
		if errors.Is(err, unix.EBADF) {
			err = unix.Chmod(ProcPath(dir), mode)
		}
		return err
	})
}

// Utimensat sets the times of an entry of a directory, without following a link (utimensat(2)).
func Utimensat(dir *os.File, path string, accessed, modified time.Time) error {
	times := []unix.Timespec{timespec(accessed), timespec(modified)}
	return callAt("utimensat", dir, path, func(fd int) error { return unix.UtimesNanoAt(fd, path, times, unix.AT_SYMLINK_NOFOLLOW) })
}

// Futimens sets the times of an open file (futimens(3)): utimensat(2) without a path, which is not an empty one, since that is
// taken from Linux 5.8 on only.
func Futimens(file *os.File, accessed, modified time.Time) error {
	times := [2]unix.Timespec{timespec(accessed), timespec(modified)}
	return call("futimens", file, func(fd int) error {
		_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&times)), 0, 0, 0)
		return asError(errno)
	})
}

// timespec does not go by nanoseconds since 1970, which end in 2262.
func timespec(t time.Time) unix.Timespec {
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

// asError is nil for no error, which an Errno in an error would not be.
func asError(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}
