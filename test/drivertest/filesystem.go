package drivertest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// fileSystem is how a file system is made in an image file and mounted. Of one that is only read, content is a directory
// that goes in.
type fileSystem struct {
	make    func(image, content string) *exec.Cmd
	options string
	reads   bool
}

// fileSystems are by what they are called in tests: the type, and what it is made with.
var fileSystems = map[string]fileSystem{
	"ext4":     {make: func(image, _ string) *exec.Cmd { return exec.Command("mkfs.ext4", "-q", "-F", image) }},
	"xfs":      {make: func(image, _ string) *exec.Cmd { return exec.Command("mkfs.xfs", "-q", "-f", image) }},
	"btrfs":    {make: func(image, _ string) *exec.Cmd { return exec.Command("mkfs.btrfs", "-q", "-f", image) }},
	"erofs":    {make: func(image, content string) *exec.Cmd { return exec.Command("mkfs.erofs", "-Enosbcrc", image, content) }, reads: true},
	"squashfs": {make: func(image, content string) *exec.Cmd { return exec.Command("mksquashfs", content, image, "-quiet") }, reads: true},
	"ext4 with few inodes": {make: func(image, _ string) *exec.Cmd {
		return exec.Command("mkfs.ext4", "-q", "-F", "-N", "2048", image)
	}},
	"ext4 with project quota": {make: func(image, _ string) *exec.Cmd {
		return exec.Command("mkfs.ext4", "-q", "-F", "-O", "project,quota", "-E", "quotatype=prjquota", image)
	}, options: "prjquota"},
	"xfs with project quota": {make: func(image, _ string) *exec.Cmd { return exec.Command("mkfs.xfs", "-q", "-f", image) },
		options: "prjquota"},
	"btrfs with quota": {make: func(image, _ string) *exec.Cmd { return exec.Command("mkfs.btrfs", "-q", "-f", "-R", "quota", image) }},
}

// MakeImage makes the file system of that name in an image file, of so many bytes or with what is in the directory content.
// The error is exec.ErrNotFound where its program is not installed.
func MakeImage(name, image string, size int64, content string) error {
	system := fileSystems[name]
	if !system.reads {
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			return err
		}
		if err := os.Truncate(image, size); err != nil {
			return err
		}
	}
	return system.format(image, content)
}

// formatTries is how often mkfs.btrfs is tried, a second after another: it asks for the files behind all mounts, and a test beside this one
// may let one of them fail.
const formatTries = 30

// format makes the file system in an image file or on a device.
func (s fileSystem) format(image, content string) error {
	var err error
	for range formatTries {
		err = run(s.make(image, content))
		if err == nil || !strings.Contains(err.Error(), "cannot check mount status") {
			return err
		}
		time.Sleep(time.Second)
	}
	return err
}

// LargeSectors binds a file to a loop device with sectors of 4096 bytes. The device goes with its last user.
func LargeSectors(file string) (*os.File, error) {
	opened, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(opened.Fd()), Size: 4096, Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], file)
	for {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, err
		}
		loop, err := os.OpenFile(fmt.Sprint("/dev/loop", number), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), &config); err == nil {
			return loop, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, &os.PathError{Op: "bind to a loop device", Path: file, Err: err}
		}
	}
}

// FormatDevice makes the file system of that name on a block device.
func FormatDevice(name, device string) error { return fileSystems[name].format(device, "") }

// MountImage mounts the file system of that name that is in an image file. The error says what the kernel lacks of it.
func MountImage(name, image, dir string) error {
	fsType, _, _ := strings.Cut(name, " ")
	options := "loop"
	if more := fileSystems[name].options; more != "" {
		options += "," + more
	}
	return run(exec.Command("mount", "-t", fsType, "-o", options, image, dir))
}

func run(command *exec.Cmd) error {
	output, err := command.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", command, err, output)
	}
	return nil
}
