package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	mountutils "k8s.io/mount-utils"
	"k8s.io/utils/exec"
)

// commands runs programs.
type commands = exec.Interface

const (
	loopControl = "/dev/loop-control"
	makeExt4    = "mkfs.ext4"
	checkExt4   = "e2fsck"
	// diskInodeBytes is for how many bytes of a disk image there is one inode, as mkfs.ext4 has it by default: tables
	// of inodes take their part of the image.
	diskInodeBytes = 16 << 10
	// badImage is the exit status of e2fsck from which on the file system is not as it should be (e2fsck(8)).
	badImage = 4
)

// diskImage is an upper in an ext4 of its own, in a sparse file that a loop device shows. It is for data roots whose file
// system knows no quotas, and for volumes that ask for it: nothing that a pod does gets round it.
type diskImage struct {
	innerMount
	commands  commands
	base      string
	limit     Limit
	ephemeral bool
}

func probeDiskImages(commands commands) error {
	if _, err := os.Stat(loopControl); err != nil {
		return fmt.Errorf("there are no loop devices (modprobe loop): %w", err)
	}
	for _, program := range []string{makeExt4, checkExt4} {
		if _, err := commands.LookPath(program); err != nil {
			return fmt.Errorf("%s is not installed: %w", program, err)
		}
	}
	return nil
}

func (d diskImage) file() string { return filepath.Join(d.base, imageName) }

// Prepare makes the image where it is missing, and mounts it.
func (d diskImage) Prepare(ctx context.Context, root Root) (Dirs, error) {
	made, err := d.make(ctx)
	if err != nil {
		return Dirs{}, err
	}
	dirs, err := d.open(root, func(path string) error { return d.mount(ctx, path, made) })
	if err != nil {
		return Dirs{}, err
	}
	if info, err := os.Stat(d.file()); err == nil && info.Size() < d.limit.Bytes {
		// The volume was expanded while this upper was not in use.
		if err := d.Grow(ctx, d.limit); err != nil {
			dirs.Close()
			return Dirs{}, errors.Join(err, d.Release())
		}
	}
	return dirs, nil
}

// make makes the image beside and renames it in: it is there whole or not at all. What SafeFormatAndMount of mount-utils
// does, to format what looks empty, would make an empty file system of one that was damaged.
func (d diskImage) make(ctx context.Context) (made bool, err error) {
	if _, err := os.Lstat(d.file()); !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	temporary := d.file() + ".new"
	if err := os.WriteFile(temporary, nil, 0o600); err != nil {
		return false, fmt.Errorf("make a disk image: %w", err)
	}
	if err := os.Truncate(temporary, d.limit.Bytes); err != nil {
		return false, fmt.Errorf("make a disk image of %d bytes: %w: this file system may not take a file so large", d.limit.Bytes, err)
	}
	args := []string{"-q", "-F", "-m", "0", "-i", fmt.Sprint(diskInodeBytes), "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"}
	if d.ephemeral {
		// It is thrown away after a crash: a journal would be written for nobody.
		args = append(args, "-O", "^has_journal")
	}
	if output, err := d.commands.CommandContext(ctx, makeExt4, append(args, temporary)...).CombinedOutput(); err != nil {
		return false, errors.Join(fmt.Errorf("make a file system in %s: %s: %w: %s", temporary, makeExt4, err, strings.TrimSpace(string(output))), os.Remove(temporary))
	}
	if !d.ephemeral {
		if err := syncPath(temporary); err != nil {
			return false, err
		}
	}
	if err := os.Rename(temporary, d.file()); err != nil {
		return false, fmt.Errorf("make a disk image: %w", err)
	}
	if d.ephemeral {
		return true, nil
	}
	return true, syncPath(d.base)
}

func syncPath(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := errors.Join(file.Sync(), file.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	return nil
}

// mountOptions: blocks that are free again are free on the node's disk too; the tables of inodes, which are holes of the
// image, are not written to be zeroes; what is damaged is not written to.
const mountOptions = "discard,noinit_itable,errors=remount-ro"

// mount mounts the image. One whose loop device is there still has an overlay on it, in some container that is about to
// end: it is the same file system that is mounted then, never a second one on the same image.
func (d diskImage) mount(ctx context.Context, path string, made bool) error {
	var loop *os.File
	var err error
	if !made {
		if loop, err = findLoop(d.file()); err != nil {
			return err
		}
	}
	if loop == nil {
		if !made {
			if err := d.check(ctx); err != nil {
				return err
			}
		}
		if loop, err = attachLoop(d.file()); err != nil {
			return err
		}
	}
	// Mounted or not, the device goes with its last user (LO_FLAGS_AUTOCLEAR).
	defer loop.Close()
	if err := unix.Mount(loop.Name(), path, "ext4", unix.MS_NOSUID|unix.MS_NODEV, mountOptions); err != nil {
		return fmt.Errorf("mount the disk image %s: %w", d.file(), &os.PathError{Op: "mount", Path: loop.Name(), Err: err})
	}
	return nil
}

// check has e2fsck mend what it safely can. The kernel itself replays the journal.
func (d diskImage) check(ctx context.Context) error {
	output, err := d.commands.CommandContext(ctx, checkExt4, "-p", d.file()).CombinedOutput()
	if err == nil {
		return nil
	}
	if exit, ok := errors.AsType[exec.ExitError](err); ok && exit.ExitStatus() < badImage {
		return nil
	}
	return fmt.Errorf("%w: check the disk image %s: %w: %s: repair it with e2fsck", errdefs.ErrDataLoss, d.file(), err, strings.TrimSpace(string(output)))
}

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

// Grow makes the image and the file system in it larger, while it is mounted. Cut off between, it leaves a file that is
// larger than the file system in it, which harms nothing.
func (d diskImage) Grow(_ context.Context, limit Limit) error {
	info, err := os.Stat(d.file())
	if err != nil {
		return fmt.Errorf("grow a disk image: %w", err)
	}
	if info.Size() < limit.Bytes {
		if err := os.Truncate(d.file(), limit.Bytes); err != nil {
			return fmt.Errorf("grow a disk image to %d bytes: %w", limit.Bytes, err)
		}
		// Before anything is in the part that is new.
		if err := syncPath(d.file()); err != nil {
			return err
		}
	}
	loop, err := findLoop(d.file())
	if err != nil {
		return err
	}
	if loop == nil {
		return fmt.Errorf("%w: grow the disk image %s: it is not mounted", errdefs.ErrFailedPrecondition, d.file())
	}
	defer loop.Close()
	if err := unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("grow the loop device of %s: %w", d.file(), &os.PathError{Op: "LOOP_SET_CAPACITY", Path: loop.Name(), Err: err})
	}
	if _, err := mountutils.NewResizeFs(d.commands).Resize(loop.Name(), d.path); err != nil {
		return fmt.Errorf("grow the file system in %s: %w", d.file(), err)
	}
	return nil
}

// ClearWork empties the work directory.
func (d diskImage) ClearWork() error { return clearWork(d) }

// Discard discards the image.
func (d diskImage) Discard(discard func(path string) error) error {
	return errors.Join(d.Release(), discard(d.file()))
}

// Taken is what the image takes on the disk: holes take nothing.
func (d diskImage) Taken(context.Context) (int64, error) {
	var stat unix.Stat_t
	if err := unix.Stat(d.file(), &stat); err != nil {
		return 0, &os.PathError{Op: "stat", Path: d.file(), Err: err}
	}
	return stat.Blocks * 512, nil
}

// Exists reports whether the image has been made.
func (d diskImage) Exists() (bool, error) { return isThere(d.file()) }

// Check looks whether the image is there and, where it is mounted, can be written to.
func (d diskImage) Check() error {
	there, err := d.Exists()
	if err != nil {
		return fmt.Errorf("look at the disk image: %w", err)
	}
	if !there {
		return fmt.Errorf("%w: the disk image %s is gone", errdefs.ErrNotFound, d.file())
	}
	mounted, err := d.isMounted()
	if err != nil || !mounted {
		return err
	}
	return checkDirs(d)
}
