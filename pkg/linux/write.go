package linux

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// WriteFileAtomic replaces a file of a directory as a whole: it writes name.new and renames it. With sync, the content is on the disk
// before the file has its name, so that a power cut leaves the old content or the new; the name itself is on the disk after
// [SyncDir]. A name.new that is there already, of an earlier process, is removed. On an error there is none.
func WriteFileAtomic(dir *os.File, name string, data []byte, sync bool) error {
	temporary := name + ".new"
	file, err := createNew(dir, temporary)
	if err != nil {
		return err
	}
	err = writeAll(file, data, sync)
	if err == nil {
		err = Renameat(dir, temporary, dir, name, 0)
	}
	if err != nil {
		// It could not be written: the space of what was is worth more than this second error.
		_ = Unlinkat(dir, temporary)
	}
	return err
}

// WriteFileAtomicInto is WriteFileAtomic for a full disk. It makes no file: name.new is a spare file, which it moves from another
// directory of the file system and writes to the blocks of. The file that had the name before, which must exist, is the spare file
// then. After an error there may be none.
func WriteFileAtomicInto(spareDir *os.File, spare string, dir *os.File, name string, data []byte) error {
	temporary := name + ".new"
	err := Renameat(spareDir, spare, dir, temporary, 0)
	if err != nil {
		_ = Unlinkat(spareDir, spare)
		return err
	}
	file, err := OpenFile(dir, temporary, os.O_WRONLY|O_NOFOLLOW, 0, 0)
	if err == nil {
		// Always synced: after a power cut, the blocks of a spare file would be shown as zeroes.
		if err = file.Truncate(int64(len(data))); err == nil {
			err = writeAll(file, data, true)
		} else {
			file.Close()
		}
	}
	if err == nil {
		err = Renameat(dir, temporary, dir, name, RenameExchange)
	}
	// Others write to the blocks of a spare file. Until the exchange is on the disk, a power cut brings back a name for them.
	if err == nil && SyncDir(dir) == nil && Renameat(dir, temporary, spareDir, spare, 0) == nil {
		return nil
	}
	_ = Unlinkat(dir, temporary)
	return err
}

// writeAll writes an open file from its beginning, and closes it.
func writeAll(file *os.File, data []byte, sync bool) error {
	_, err := file.Write(data)
	if err == nil && sync {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

// createNew makes a file, in place of one that is there.
func createNew(dir *os.File, name string) (*os.File, error) {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL | O_NOFOLLOW
	file, err := OpenFile(dir, name, flags, 0o600, 0)
	if !errors.Is(err, unix.EEXIST) {
		return file, err
	}
	if err := Unlinkat(dir, name); err != nil {
		return nil, err
	}
	return OpenFile(dir, name, flags, 0o600, 0)
}

// SyncDir writes the names in an open directory to the disk (fsync(2)). The handle may be one of [O_PATH].
func SyncDir(dir *os.File) error {
	return withReadable(dir, "fsync", unix.Fsync)
}

// SyncFS writes the file system of an open directory to the disk (syncfs(2)), which reports write errors from Linux 5.8 on. The
// handle may be one of [O_PATH].
func SyncFS(dir *os.File) error {
	return withReadable(dir, "syncfs", unix.Syncfs)
}

// SyncPath writes a file or directory to the disk (fsync(2)).
func SyncPath(path string) error {
	file, err := Open(nil, path, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}

// withReadable makes a system call on a directory that is open for reading: these do not take handles of O_PATH.
func withReadable(dir *os.File, op string, do func(fd int) error) error {
	readable, err := Open(dir, ".", os.O_RDONLY|O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer readable.Close()
	return call(op, readable, do)
}

// Flock takes the lock of an open file, for this open file alone, without waiting (flock(2)). The error is EWOULDBLOCK while another
// has it. The kernel releases it when the file is closed, however the process ends.
func Flock(file *os.File) error {
	return call("flock", file, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
}

// FlockHolder returns the ID of a process that has the lock of an open file (flock(2), proc_locks(5)). It returns fs.ErrNotExist if
// there is none, or if the kernel does not tell: the process may be in another PID namespace, and some file systems, btrfs for
// instance, show their files under another device.
func FlockHolder(file *os.File) (pid int, err error) {
	stat, err := StatFile(file)
	if err != nil {
		return 0, err
	}
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return 0, err
	}
	defer locks.Close()
	wanted := fmt.Sprintf("%02x:%02x:%d", unix.Major(stat.Dev), unix.Minor(stat.Dev), stat.Ino)
	// Whoever has the lock may have any number of others.
	lines := bufio.NewScanner(locks)
	for lines.Scan() {
		if !bytes.Contains(lines.Bytes(), []byte(wanted)) {
			continue
		}
		// The fields are a number, FLOCK, ADVISORY, WRITE, the process, the file, and the range.
		if fields := strings.Fields(lines.Text()); len(fields) > 5 && fields[1] == "FLOCK" && fields[5] == wanted {
			return strconv.Atoi(fields[4])
		}
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	return 0, &os.PathError{Op: "find the lock of", Path: file.Name(), Err: fs.ErrNotExist}
}

// Reserve has the file system allocate the first bytes of an open file, and makes the file that long if it is shorter (fallocate(2)).
// What the file has is not changed, and what is allocated already is not allocated again. The error is ENOSPC where they do not fit,
// and EOPNOTSUPP where the file system cannot do that; the file may then have some of them.
func Reserve(file *os.File, bytes int64) error {
	return call("fallocate", file, func(fd int) error { return unix.Fallocate(fd, 0, 0, bytes) })
}

// DisableCopyOnWrite has what is written to an open file, which must be empty, go where it was before, also on a file system that
// otherwise writes to another place (FS_NOCOW_FL, ioctl_iflags(2)). The error is EOPNOTSUPP or ENOTTY where the file system knows of no
// such thing.
func DisableCopyOnWrite(file *os.File) error {
	// include/uapi/linux/fs.h.
	const noCopyOnWrite = 0x00800000
	return call("FS_IOC_SETFLAGS", file, func(fd int) error {
		flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
		if err != nil {
			return err
		}
		return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags|noCopyOnWrite))
	})
}

// HasAllBlocks reports whether the file system has allocated all of the first bytes of an open file, for this file alone: what is written
// to blocks that it shares with another one (FICLONE, ioctl_ficlone(2)) takes others (fiemap, FS_IOC_FIEMAP). The error is EOPNOTSUPP
// where it does not say. What a file takes of the disk (st_blocks) does not say it: blocks that list its blocks are in that,
// and blocks behind its end.
func HasAllBlocks(file *os.File, bytes int64) (bool, error) {
	// include/uapi/linux/fiemap.h.
	const (
		fiemap     = 0xc020660b
		lastFlag   = 0x1
		sharedFlag = 0x2000
		room       = 64
	)
	type extent struct {
		logical, physical, length uint64
		_                         [2]uint64
		flags                     uint32
		_                         [3]uint32
	}
	var request struct {
		start, length       uint64
		flags, count, space uint32
		_                   uint32
		extents             [room]extent
	}
	for next := uint64(0); next < uint64(bytes); {
		request.start, request.length, request.space = next, uint64(bytes)-next, room
		if err := ioctl(file, "FS_IOC_FIEMAP", fiemap, unsafe.Pointer(&request)); err != nil {
			return false, err
		}
		for _, found := range request.extents[:request.count] {
			if found.logical > next || found.flags&sharedFlag != 0 {
				return false, nil
			}
			next = max(next, found.logical+found.length)
			if found.flags&lastFlag != 0 && next < uint64(bytes) {
				return false, nil
			}
		}
		if request.count == 0 {
			return false, nil
		}
	}
	return true, nil
}

// SetPipeSize sets how many bytes a pipe takes before a write to it waits (F_SETPIPE_SZ, fcntl(2)). The pipe keeps its deadlines, which it
// would lose by its Fd method.
func SetPipeSize(pipe *os.File, bytes int) error {
	raw, err := pipe.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { _, failed = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, bytes) })
	if err != nil {
		return err
	}
	return os.NewSyscallError("fcntl", failed)
}
