package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	loopControl = "/dev/loop-control"
	// loopTries is how often a free loop device is looked for, while others take them.
	loopTries = 100
)

// HasLoopDevices returns an error where the machine has no loop devices (loop(4)).
func HasLoopDevices() error {
	_, err := os.Stat(loopControl)
	return err
}

// AttachLoop binds an open file to a free loop device (loop(4), LOOP_CONFIGURE, Linux 5.8). The device is released with its last user
// (LO_FLAGS_AUTOCLEAR). Its I/O is direct where the file system of the file can do that, so that what is in the page cache of the file
// system on the device need not be in that of the file too.
func AttachLoop(file *os.File) (*os.File, error) {
	return attachLoop(file, unix.LO_FLAGS_AUTOCLEAR|unix.LO_FLAGS_DIRECT_IO)
}

// AttachBufferedLoop is [AttachLoop] without direct I/O, so that the device has sectors of 512 bytes on every disk.
func AttachBufferedLoop(file *os.File) (*os.File, error) {
	return attachLoop(file, unix.LO_FLAGS_AUTOCLEAR)
}

func attachLoop(file *os.File, flags uint32) (*os.File, error) {
	control, err := Open(nil, loopControl, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: flags}}
	// The kernel shows it in /sys/block/loopN/loop/backing_file; the array ends with a zero.
	copy(config.Info.File_name[:len(config.Info.File_name)-1], file.Name())
	for range loopTries {
		var number int
		err = call("LOOP_CTL_GET_FREE", control, func(fd int) (err error) {
			number, err = unix.IoctlRetInt(fd, unix.LOOP_CTL_GET_FREE)
			return err
		})
		if err != nil {
			return nil, err
		}
		var loop *os.File
		if loop, err = openLoop(fmt.Sprintf("loop%d", number), os.O_RDWR); err != nil {
			if isGone(err) {
				continue
			}
			return nil, err
		}
		if err = call("LOOP_CONFIGURE", loop, func(fd int) error { return unix.IoctlLoopConfigure(fd, &config) }); err == nil {
			return loop, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
	}
	return nil, err
}

// isGone reports whether a loop device was removed since its number was looked up.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV)
}

// FindLoop opens the loop device that a file is bound to. The error is fs.ErrNotExist where none is found. It looks first at the device
// whose file system is mounted at mountPoint, if one is, because there may be thousands of others. It opens no device of a file that has
// another name: udev reads a device again whenever somebody closes it who could have written to it. So it does not find a device that was
// bound to another hard link of the file ([IsOpenForWriting] sees that one), nor one that only reads it.
func FindLoop(path, mountPoint string) (*os.File, error) {
	file, err := StatPath(path)
	if err != nil {
		return nil, err
	}
	if mounted, err := StatPath(mountPoint); err == nil {
		device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(mounted.Dev), unix.Minor(mounted.Dev)))
		if err == nil && strings.HasPrefix(filepath.Base(device), "loop") {
			// Where it cannot be opened, the search below says why.
			if loop, err := openLoopOf(filepath.Base(device), os.O_RDWR, file.ID()); err == nil {
				return loop, nil
			}
		}
	}
	if isOpen, err := IsOpenForWriting(path); err == nil && !isOpen {
		return nil, &os.PathError{Op: "find loop device", Path: path, Err: fs.ErrNotExist}
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	devices, err := os.Open("/sys/block")
	if err != nil {
		return nil, err
	}
	defer devices.Close()
	names, err := devices.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "loop") || !mayBeBoundTo(name, resolved) {
			continue
		}
		if loop, err := openLoopOf(name, os.O_RDWR, file.ID()); !isGone(err) {
			return loop, err
		}
	}
	return nil, &os.PathError{Op: "find loop device", Path: path, Err: fs.ErrNotExist}
}

// FindReadOnlyLoop opens a loop device that a file is bound to which nobody writes to any more, to read from it. The error is
// fs.ErrNotExist where none is found.
func FindReadOnlyLoop(path string) (*os.File, error) {
	file, err := StatPath(path)
	if err != nil {
		return nil, err
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	devices, err := os.Open("/sys/block")
	if err != nil {
		return nil, err
	}
	defer devices.Close()
	names, err := devices.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "loop") || !mayBeBoundTo(name, resolved) {
			continue
		}
		if loop, err := openLoopOf(name, os.O_RDONLY, file.ID()); err == nil {
			return loop, nil
		}
	}
	return nil, &os.PathError{Op: "find loop device", Path: path, Err: fs.ErrNotExist}
}

// IsOpenForWriting reports whether a file is open for writing anywhere, as that of a loop device is which can write to it: the kernel gives
// no read lease for such a file (F_SETLEASE, fcntl(2)). The lease is given back at once. After an error it is not known.
func IsOpenForWriting(path string) (bool, error) {
	file, err := Open(nil, path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	defer file.Close()
	err = call("F_SETLEASE", file, func(fd int) error {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
			return err
		}
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
		return err
	})
	if errors.Is(err, unix.EAGAIN) {
		return true, nil
	}
	return false, err
}

// mayBeBoundTo reports whether the file of a loop device can be the one at path. The kernel knows the file's name and its directory's as
// they are now, but their path as the process had it that bound the file: in another container the data root may have been mounted
// elsewhere.
func mayBeBoundTo(name, path string) bool {
	file, err := Open(nil, "/sys/block/"+name+"/loop/backing_file", os.O_RDONLY, 0)
	if err != nil {
		// No file is bound to it.
		return !isGone(err)
	}
	defer file.Close()
	var buffer [unix.PathMax + 1]byte
	n, err := file.Read(buffer[:])
	if err != nil {
		// The kernel shows no path that is longer than a page.
		return !isGone(err)
	}
	bound := strings.TrimSuffix(string(buffer[:n]), "\n")
	if filepath.Base(bound) != filepath.Base(path) {
		return false
	}
	parent := filepath.Dir(bound)
	return parent == "/" || filepath.Base(parent) == filepath.Base(filepath.Dir(path))
}

// openLoopOf opens a loop device if that file is bound to it. The error is fs.ErrNotExist, or another one that isGone knows, if it is not.
// What cannot be told is another error: a second device of one image would be a second file system on it.
func openLoopOf(name string, flags int, file FileID) (*os.File, error) {
	loop, err := openLoop(name, flags)
	if err != nil {
		return nil, err
	}
	var info *unix.LoopInfo64
	err = call("LOOP_GET_STATUS64", loop, func(fd int) (err error) {
		info, err = unix.IoctlLoopGetStatus64(fd)
		return err
	})
	if err == nil && info.Device == file.Dev && info.Inode == file.Ino {
		return loop, nil
	}
	loop.Close()
	if err == nil {
		err = fs.ErrNotExist
	}
	return nil, err
}

// GrowLoop has a loop device take the size that its file has now (LOOP_SET_CAPACITY).
func GrowLoop(loop *os.File) error {
	return call("LOOP_SET_CAPACITY", loop, func(fd int) error { return unix.IoctlSetInt(fd, unix.LOOP_SET_CAPACITY, 0) })
}

// LoopSectorSize returns the size in bytes of the sectors of a loop device (BLKSSZGET). With direct I/O it is that of the disk beneath
// its file, and a file system on the device needs blocks of at least that size.
func LoopSectorSize(loop *os.File) (size int, err error) {
	err = call("BLKSSZGET", loop, func(fd int) (err error) {
		size, err = unix.IoctlGetInt(fd, unix.BLKSSZGET)
		return err
	})
	return size, err
}

// KeepLoopBlocks has a loop device refuse discards, of which the kernel would make holes in its file, and write zeroes where it would
// make holes for them too (queue/discard_max_bytes, sysfs-block(5); lo_fallocate in drivers/block/loop.c). From Linux 6.9 on the device
// keeps that for its next file, and does not take it back (its discard_granularity is then 0, and every other value EINVAL): see
// [RemoveLoop].
func KeepLoopBlocks(loop *os.File) error {
	name := filepath.Base(loop.Name())
	if refusesDiscards(name) {
		return nil
	}
	return os.WriteFile(discardLimit(name), []byte("0"), 0)
}

// RefusesDiscards reports whether a loop device refuses discards.
func RefusesDiscards(loop *os.File) bool { return refusesDiscards(filepath.Base(loop.Name())) }

func discardLimit(name string) string {
	return filepath.Join("/sys/block", name, "queue/discard_max_bytes")
}

func refusesDiscards(name string) bool {
	most, err := os.ReadFile(discardLimit(name))
	return err == nil && strings.TrimSpace(string(most)) == "0"
}

// FreeLoopsWithoutDiscards returns the names of the loop devices that have no file and refuse discards, as [KeepLoopBlocks] leaves them.
// One that was never used refuses them too, and is not among them: another program may be about to use it.
func FreeLoopsWithoutDiscards() ([]string, error) {
	devices, err := filepath.Glob("/sys/block/loop*")
	if err != nil {
		return nil, err
	}
	var free []string
	for _, device := range devices {
		_, err := os.Stat(filepath.Join(device, "loop"))
		if name := filepath.Base(device); errors.Is(err, fs.ErrNotExist) && refusesDiscards(name) && hasBeenUsed(name) {
			free = append(free, name)
		}
	}
	return free, nil
}

// hasBeenUsed reports whether something was read from a loop device or written to it since it was made (stat, sysfs-block(5)).
func hasBeenUsed(name string) bool {
	stat, err := os.ReadFile(filepath.Join("/sys/block", name, "stat"))
	return err == nil && strings.Trim(string(stat), " 0\n") != ""
}

// RemoveLoop removes a loop device that has no file and that nobody has open (LOOP_CTL_REMOVE). Whoever needs one gets a new one. The
// error is EBUSY where it is in use.
func RemoveLoop(name string) error {
	var number int
	if _, err := fmt.Sscanf(filepath.Base(name), "loop%d", &number); err != nil {
		return fmt.Errorf("remove the loop device %s: %w", name, err)
	}
	control, err := Open(nil, loopControl, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	return call("LOOP_CTL_REMOVE", control, func(fd int) error { return unix.IoctlSetInt(fd, unix.LOOP_CTL_REMOVE, number) })
}

// openLoop opens a loop device, and makes its node where it is missing: a container's /dev has only those of the devices that there
// were when the container was made.
func openLoop(name string, flags int) (*os.File, error) {
	path := "/dev/" + name
	loop, err := Open(nil, path, flags, 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return loop, err
	}
	numbers, err := os.ReadFile("/sys/block/" + name + "/dev")
	if err != nil {
		return nil, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(numbers), "%d:%d", &major, &minor); err != nil {
		return nil, fmt.Errorf("read the device number of %s: %w", name, err)
	}
	if err := Mknodat(nil, path, unix.S_IFBLK|0o600, unix.Mkdev(major, minor)); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return Open(nil, path, flags, 0)
}
