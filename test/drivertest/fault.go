package drivertest

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ShutDown makes the file system of path fail as after the loss of its disk: everything that is not cached answers EIO. It works on
// ext4 and xfs.
func ShutDown(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	// FS_IOC_SHUTDOWN and FS_SHUTDOWN_FLAGS_NOLOGFLUSH of include/uapi/linux/fs.h.
	const shutdown, noLogFlush = 0x8004587d, 2
	if err := unix.IoctlSetPointerInt(int(dir.Fd()), shutdown, noLogFlush); err != nil {
		return &os.PathError{Op: "shut down the file system of", Path: path, Err: err}
	}
	return nil
}

// FillUp makes a file of everything that is free on its file system.
func FillUp(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	for size := 1 << 20; size > 0; size /= 2 {
		for err == nil {
			_, err = file.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			return err
		}
		err = nil
	}
	return nil
}

// Trim has a file system give what is free in it back to its disk, as fstrim(8) does, which many nodes run once a week on whatever is
// mounted. The error is EOPNOTSUPP where the disk does not take it back.
func Trim(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	// FITRIM and struct fstrim_range of include/uapi/linux/fs.h: start, length and the smallest extent in bytes.
	const trim = 0xc0185879
	all := [3]uint64{0, math.MaxUint64, 0}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), trim, uintptr(unsafe.Pointer(&all))); errno != 0 {
		return &os.PathError{Op: "trim the file system of", Path: path, Err: errno}
	}
	return nil
}

// Reboot kills the driver and takes what a reboot takes: the mounts of the node. What pods had stays. The caller starts the driver.
func (n *Node) Reboot() error {
	if err := errors.Join(n.Kill(), UnmountBeneath(n.KubeletDir)); err != nil {
		return err
	}
	for _, pattern := range []string{"volumes/*/volume.json", "caches/*/*/cache.json"} {
		records, err := filepath.Glob(filepath.Join(n.DataRoot, pattern))
		if err != nil {
			return err
		}
		for _, path := range records {
			if err := setBootID(path, "an earlier boot"); err != nil {
				return err
			}
		}
	}
	return nil
}

// setBootID has the publications in a record, or the versions of a cache that were not written to the disk, be of another boot. A record
// that is damaged stays as it is.
func setBootID(path, id string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var record map[string]any
	if json.Unmarshal(data, &record) != nil {
		return nil
	}
	if publications, ok := record["publications"].([]any); ok {
		for _, p := range publications {
			p.(map[string]any)["bootID"] = id
		}
	}
	if _, ok := record["bootID"]; ok {
		record["bootID"] = id
	}
	if data, err = json.Marshal(record); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o600)
}

// LoopDevices are the loop devices whose files lie beneath dir, with these files.
func LoopDevices(dir string) ([]string, error) {
	paths, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var devices []string
	for _, path := range paths {
		// A device that has gone meanwhile has no file.
		if file, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(file), dir+"/") {
			devices = append(devices, strings.Split(path, "/")[3]+" "+strings.TrimSpace(string(file)))
		}
	}
	return devices, nil
}

// Hang mounts a file system at dir that answers nothing, as one whose server is away, until release is called. Nobody but the driver
// may look at dir before.
func Hang(dir string) (release func() error, err error) {
	// A FUSE server that reads no request.
	device, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", device.Fd())
	if err := unix.Mount("hanging", dir, "fuse", 0, options); err != nil {
		return nil, errors.Join(fmt.Errorf("mount a file system that hangs at %s: %w", dir, err), device.Close())
	}
	return func() error { return errors.Join(device.Close(), unix.Unmount(dir, unix.MNT_DETACH)) }, nil
}
