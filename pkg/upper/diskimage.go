package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"
	mountutils "k8s.io/mount-utils"
	"k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	makeExt4  = "mkfs.ext4"
	checkExt4 = "e2fsck"
	// diskInodeBytes is how many bytes of a disk image there are for each inode. It is the default of mkfs.ext4: more inodes
	// would take their tables from the size.
	diskInodeBytes = 16 << 10
	// badImage is the lowest exit status of e2fsck that says that errors are left (e2fsck(8)).
	badImage = 4
)

// diskImage is an upper in an ext4 of its own, in a file behind a loop device. It is for data roots whose file system has no quotas, and
// for volumes that ask for it: nothing that a pod does gets past its size. All of its size is reserved on the disk, so that what a pod
// has written and the page cache has taken can always be written to the disk as well, unless the file is sparse.
type diskImage struct {
	innerMount
	programs imagePrograms
	// base is the path of the base directory.
	base      string
	discard   func(path string) error
	limit     Limit
	ephemeral bool
	// made is set if there must be an upper in the image.
	made bool
	// sparse is set if the disk is not reserved.
	sparse bool
	checks *singleflight.Group
}

var _ Upper = diskImage{}

func probeDiskImage(root *os.File, commands commands, sparse bool) error {
	if err := linux.HasLoopDevices(); err != nil {
		return fmt.Errorf("there are no loop devices (modprobe loop): %w", err)
	}
	for _, program := range []string{makeExt4, checkExt4} {
		if _, err := commands.LookPath(program); err != nil {
			return fmt.Errorf("%s is not installed: %w", program, err)
		}
	}
	if sparse {
		return nil
	}
	return probeReserve(root)
}

// Prepare makes the image if it is missing, mounts it, and grows it to the limit.
func (d diskImage) Prepare(ctx context.Context, root RootAttr) (Dirs, error) {
	made, err := d.make(ctx)
	if err != nil {
		return Dirs{}, err
	}
	dirs, err := d.open(ctx, root, func(path string) error {
		if err := d.mount(ctx, path, made); err != nil {
			return err
		}
		return d.checkMade(path)
	})
	if err != nil {
		return Dirs{}, err
	}
	if info, err := os.Stat(d.file()); err == nil && info.Size() < d.limit.Bytes {
		// The volume was expanded while this upper was at rest.
		if err := d.Grow(ctx, d.limit); err != nil {
			dirs.Close()
			return Dirs{}, errors.Join(err, d.Release(ctx))
		}
	}
	return dirs, nil
}

// checkMade returns ErrDataLoss if the upper was made and is not where the image is mounted. A repair can have moved it.
func (d diskImage) checkMade(path string) error {
	if !d.made {
		return nil
	}
	there, err := exists(filepath.Join(path, upperName))
	if err == nil && !there {
		err = fmt.Errorf("%w: the upper in the disk image %s is gone, with what was written to it, and an empty one does not replace it; "+
			"look into its lost+found, or delete the claim",
			errdefs.ErrDataLoss, d.file())
	}
	return err
}

// mountOptions: the tables of inodes, which are empty, are not filled with zeroes (noinit_itable). A damaged file system becomes
// read-only. Of a sparse image, blocks that are freed are freed on the node's disk as well (discard).
const (
	mountOptions  = "noinit_itable,errors=remount-ro"
	sparseOptions = mountOptions + ",discard"
)

// mount mounts the image. If the image still has a loop device, the overlay of a container that has not ended is still on it:
// mount then uses that device, so that there is never a second file system on one image.
func (d diskImage) mount(ctx context.Context, path string, made bool) error {
	loop, err := d.attach(ctx, made)
	if err != nil {
		return err
	}
	// The kernel detaches the device with its last user (LO_FLAGS_AUTOCLEAR).
	defer loop.Close()
	options := sparseOptions
	if !d.sparse {
		options = mountOptions
		if err := linux.KeepLoopBlocks(loop); err != nil {
			return fmt.Errorf("keep what is reserved for the disk image %s: %w", d.file(), err)
		}
	}
	if err := linux.Mount(loop.Name(), path, "ext4", syscall.MS_NOSUID|syscall.MS_NODEV, options); err != nil {
		return fmt.Errorf("mount the disk image %s: %w", d.file(), err)
	}
	return nil
}

// attach returns the loop device of the image, or checks the image and attaches it to a new device.
func (d diskImage) attach(ctx context.Context, made bool) (*os.File, error) {
	if !made {
		loop, err := linux.FindLoop(d.file(), d.path)
		if !errors.Is(err, fs.ErrNotExist) {
			return loop, err
		}
		if err := d.check(ctx); err != nil {
			return nil, err
		}
	}
	image, err := os.OpenFile(d.file(), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer image.Close()
	if !made {
		if err := d.reserveAll(ctx, image); err != nil {
			return nil, err
		}
	}
	loop, err := linux.AttachLoop(image)
	if err == nil && d.sparse && linux.RefusesDiscards(loop) {
		// It is one that another image left.
		loop.Close()
		removeLoop(loop.Name())
		removeFreeLoops()
		loop, err = linux.AttachLoop(image)
	}
	if err == nil && !made && hasSmallBlocks(image, loop) {
		loop.Close()
		loop, err = linux.AttachBufferedLoop(image)
	}
	if err != nil {
		return nil, fmt.Errorf("attach the disk image %s to a loop device: %w", d.file(), err)
	}
	return loop, nil
}

// check checks the image. A check may take longer than a request: it then goes on, check returns ErrUnavailable, and the next request
// waits for the same check. A later check of an image that is in order takes milliseconds.
func (d diskImage) check(ctx context.Context) error {
	checked := d.checks.DoChan(d.file(), func() (any, error) { return nil, d.runCheck(context.WithoutCancel(ctx)) })
	select {
	case result := <-checked:
		return result.Err
	case <-ctx.Done():
		return fmt.Errorf("%w: the disk image %s is being checked by %s, which goes on; try again later (%s)",
			errdefs.ErrUnavailable, d.file(), checkExt4, context.Cause(ctx))
	}
}

// runCheck lets e2fsck repair what it safely can. It returns ErrDataLoss if more is wrong, and ErrUnavailable if e2fsck did not end by
// itself, so that nothing is known of the image, or if somebody else has the image open for writing.
func (d diskImage) runCheck(ctx context.Context) error {
	// A loop device of another name of the image, for instance, which linux.FindLoop does not find. Where it cannot be told, nothing says so.
	if isOpen, err := linux.IsOpenForWriting(d.file()); err == nil && isOpen {
		return fmt.Errorf("%w: the disk image %s is open for writing elsewhere, and a second file system on it would destroy it; "+
			"find out who has it (losetup --list, lsof), and detach it", errdefs.ErrUnavailable, d.file())
	}
	// An e2fsck that finds no room for what it writes leaves the image damaged.
	if err := d.reserveClosed(ctx); err != nil {
		return err
	}
	output, err := d.programs.run(ctx, d.base, checkExt4, "-p", imageName)
	if err == nil {
		return nil
	}
	exit, ok := errors.AsType[exec.ExitError](err)
	if !ok || !exit.Exited() {
		return fmt.Errorf("%w: check the disk image %s: %s did not finish: %w", errdefs.ErrUnavailable, d.file(), checkExt4, err)
	}
	if exit.ExitStatus() < badImage {
		return nil
	}
	return fmt.Errorf("%w: check the disk image %s: %w: %s; repair it with e2fsck",
		errdefs.ErrDataLoss, d.file(), err, strings.TrimSpace(string(output)))
}

// Grow grows the image, and the file system in it while it is mounted. A crash between the two leaves a file that is larger than
// its file system, which is harmless.
func (d diskImage) Grow(_ context.Context, limit Limit) error {
	if err := d.checkMounted(); err != nil {
		return fmt.Errorf("grow the disk image %s: %w", d.file(), err)
	}
	if err := d.extend(limit.Bytes); err != nil {
		return fmt.Errorf("grow the disk image %s to %d bytes: %w", d.file(), limit.Bytes, err)
	}
	loop, err := linux.FindLoop(d.file(), d.path)
	if err != nil {
		return fmt.Errorf("grow the disk image %s: %w", d.file(), err)
	}
	defer loop.Close()
	if err := linux.GrowLoop(loop); err != nil {
		return fmt.Errorf("grow the disk image %s: %w", d.file(), err)
	}
	if _, err := mountutils.NewResizeFs(d.programs.commands).Resize(loop.Name(), d.path); err != nil {
		return fmt.Errorf("grow the file system in %s: %w", d.file(), err)
	}
	return nil
}

func (d diskImage) ClearWork() error { return clearWork(d) }

// Release unmounts the image. Its loop device goes as well: another file could not be discarded from there.
func (d diskImage) Release(ctx context.Context) error {
	if d.sparse {
		return d.innerMount.Release(ctx)
	}
	loop, err := linux.FindLoop(d.file(), d.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err = d.innerMount.Release(ctx)
	if loop != nil {
		loop.Close()
	}
	if err != nil {
		return err
	}
	if loop != nil {
		removeLoop(loop.Name())
	}
	removeFreeLoops()
	return nil
}

// removeLoop removes a loop device. Others may have it open for a moment: udev, or whoever looks for the device of another file. It stays
// where a container that has not ended still uses it, until [removeFreeLoops].
func removeLoop(name string) {
	for range 5 {
		if err := linux.RemoveLoop(name); !errors.Is(err, syscall.EBUSY) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// removeFreeLoops removes the loop devices that could not be removed when their images were released, or that a crash or a failed mount
// left: whoever got one of them could not discard there. It is done when another image is released, when a device is wanted that takes
// discards and is given one that does not, and at start.
func removeFreeLoops() {
	free, err := linux.FreeLoopsWithoutDiscards()
	if err != nil {
		return
	}
	for _, name := range free {
		_ = linux.RemoveLoop(name)
	}
}

// Discard releases and discards the image.
func (d diskImage) Discard(ctx context.Context) error {
	return errors.Join(d.Release(ctx), d.discard(d.file()))
}

// DiskUsage is what the image takes on the disk, also while it is made. Its holes take nothing.
func (d diskImage) DiskUsage(context.Context) (int64, error) {
	stat, err := linux.StatPath(d.file())
	if errors.Is(err, fs.ErrNotExist) {
		stat, err = linux.StatPath(d.newFile())
	}
	if err != nil {
		return 0, notFound(err)
	}
	return stat.DiskBytes(), nil
}

func (d diskImage) Exists() (bool, error) { return exists(d.file()) }

// Check checks the directories in the image only if it is mounted.
func (d diskImage) Check() error {
	there, err := d.Exists()
	if err != nil {
		return fmt.Errorf("stat the disk image: %w", err)
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
