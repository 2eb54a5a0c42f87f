package upper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// findLoop opens the loop device of a file, nil where it has none.
func findLoop(path string) (*os.File, error) {
	var file unix.Stat_t
	if err := unix.Stat(path, &file); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	bound, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		return nil, err
	}
	for _, dir := range bound {
		name := filepath.Base(filepath.Dir(dir))
		loop, err := openLoop(name)
		if err != nil {
			// It has gone meanwhile.
			continue
		}
		info, err := unix.IoctlLoopGetStatus64(int(loop.Fd()))
		if err == nil && info.Device == file.Dev && info.Inode == file.Ino {
			return loop, nil
		}
		loop.Close()
	}
	return nil, nil
}

func openLoop(name string) (*os.File, error) {
	loop, err := os.OpenFile("/dev/"+name, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeLoopNode(name); err != nil {
			return nil, err
		}
		loop, err = os.OpenFile("/dev/"+name, os.O_RDWR, 0)
	}
	return loop, err
}

// attachLoop shows a file as a loop device.
func attachLoop(path string) (*os.File, error) {
	// Direct: what is in the page cache of the file system in the image need not be in that of the file too. The kernel
	// does without it where the data root's file system cannot.
	params := mount.LoopParams{Autoclear: true, Direct: true}
	loop, err := mount.SetupLoop(path, params)
	for tries := 0; errors.Is(err, fs.ErrNotExist) && tries < 16; tries++ {
		if err := makeLoopNodes(); err != nil {
			return nil, err
		}
		loop, err = mount.SetupLoop(path, params)
	}
	if err != nil {
		return nil, fmt.Errorf("attach the disk image %s to a loop device: %w", path, err)
	}
	return loop, nil
}

// makeLoopNodes makes the nodes of the loop devices that there are: a container's /dev has only those that were there when
// the container was made.
func makeLoopNodes() error {
	devices, err := filepath.Glob("/sys/block/loop*")
	if err != nil {
		return err
	}
	for _, device := range devices {
		name := filepath.Base(device)
		if _, err := os.Lstat("/dev/" + name); errors.Is(err, fs.ErrNotExist) {
			if err := makeLoopNode(name); err != nil {
				return err
			}
		}
	}
	return nil
}

func makeLoopNode(name string) error {
	numbers, err := os.ReadFile("/sys/block/" + name + "/dev")
	if err != nil {
		return err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(numbers), "%d:%d", &major, &minor); err != nil {
		return fmt.Errorf("read the device number of %s: %w", name, err)
	}
	err = unix.Mknod("/dev/"+name, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor)))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make the node of a loop device: %w", &os.PathError{Op: "mknod", Path: "/dev/" + name, Err: err})
	}
	return nil
}
