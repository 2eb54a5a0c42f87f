package linux

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// include/uapi/linux/fs.h and falloc.h.
const (
	ioctlFreeze  = 0xc0045877 // FIFREEZE
	ioctlThaw    = 0xc0045878 // FITHAW
	unshareRange = 0x40       // FALLOC_FL_UNSHARE_RANGE
)

// FreezeFS writes the file system of an open directory to its disk, and has everybody wait who wants to write to it until [ThawFS]
// (FIFREEZE, fsfreeze(8)). A journal is empty then. The error is EBUSY if it is frozen already, and EOPNOTSUPP where it cannot be. It stays
// frozen when the process ends.
func FreezeFS(dir *os.File) error {
	return call("FIFREEZE", dir, func(fd int) error { return unix.IoctlSetInt(fd, ioctlFreeze, 0) })
}

// ThawFS lets others write again to the file system of an open directory (FITHAW). The error is EINVAL if it is not frozen.
func ThawFS(dir *os.File) error {
	return call("FITHAW", dir, func(fd int) error { return unix.IoctlSetInt(fd, ioctlThaw, 0) })
}

// Clone has a file share all blocks of another one, whatever its size (FICLONE, ioctl_ficlone(2)). What is written to one of them later
// takes blocks of its own.
func Clone(to, from *os.File) error {
	return callLink("FICLONE", to, "", from, "", unix.IoctlFileClone)
}

// CanClone reports whether files of the file system of an open directory can share blocks.
func CanClone(dir *os.File) bool {
	var files [2]*os.File
	for i := range files {
		file, err := OpenFile(dir, ".", os.O_RDWR|unix.O_TMPFILE, 0o600, 0)
		if err != nil {
			return false
		}
		defer file.Close()
		files[i] = file
	}
	return Clone(files[0], files[1]) == nil
}

// unshareStep is how much is done before it is looked whether to go on.
const unshareStep = 64 << 20

// Unshare has a file have all its blocks for itself (fallocate(2), FALLOC_FL_UNSHARE_RANGE). The error is EOPNOTSUPP where the file system
// cannot do that.
func Unshare(ctx context.Context, file *os.File, bytes int64) error {
	for at := int64(0); at < bytes; at += unshareStep {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err := call("fallocate", file, func(fd int) error { return unix.Fallocate(fd, unshareRange, at, min(unshareStep, bytes-at)) })
		if err != nil {
			return err
		}
	}
	return nil
}

// PunchHole gives the blocks of a range of a file back to the file system (fallocate(2), FALLOC_FL_PUNCH_HOLE). It reads as zeroes.
func PunchHole(file *os.File, offset, bytes int64) error {
	return call("fallocate", file, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, bytes)
	})
}

// Data calls do for each range of a file that has data, in order, until it returns an error: what was never written is in none of them
// (lseek(2), SEEK_DATA).
func Data(file *os.File, do func(offset, bytes int64) error) error {
	for at := int64(0); ; {
		start, err := seek(file, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		end, err := seek(file, start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := do(start, end-start); err != nil {
			return err
		}
		at = end
	}
}

func seek(file *os.File, offset int64, whence int) (found int64, err error) {
	err = call("lseek", file, func(fd int) (err error) {
		found, err = unix.Seek(fd, offset, whence)
		return err
	})
	return found, err
}
