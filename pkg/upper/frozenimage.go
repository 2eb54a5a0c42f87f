package upper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// maxImageCopy is how many bytes are copied of a disk image while pods wait, where the file system cannot share blocks.
const maxImageCopy = 1 << 30

// copyImage copies a mounted disk image into a frozen upper's directory, as it is at one moment. Its file system is frozen for that: then
// the copy's journal is empty, and it is marked clean.
func (b *Backends) copyImage(ctx context.Context, d diskImage, frozen *os.File) error {
	if err := d.checkMounted(); err != nil {
		return err
	}
	from, err := os.Open(d.file())
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := linux.OpenFile(frozen, imageName+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC|linux.O_NOFOLLOW, 0o600, 0)
	if err != nil {
		return err
	}
	defer to.Close()
	// The blocks of an image on btrfs that is not sparse would be shared for good: see diskImage.build.
	if linux.CanClone(frozen) && (d.sparse || linux.FileSystemName(frozen) != "btrfs") {
		err = b.cloneImage(ctx, d, from, to)
	} else {
		err = b.copyData(ctx, d, from, to)
	}
	if err == nil {
		err = to.Sync()
	}
	if err != nil {
		return err
	}
	return linux.Renameat(frozen, imageName+".new", frozen, imageName, linux.RenameNoReplace)
}

// cloneImage has the copy share the blocks of the image. If those are reserved, the copy gets blocks of its own afterwards, when the pods
// go on: what is written to the image must find room.
func (b *Backends) cloneImage(ctx context.Context, d diskImage, from, to *os.File) error {
	if err := b.atOneMoment(d.path, func() error { return linux.Clone(to, from) }); err != nil || d.sparse {
		return err
	}
	info, err := to.Stat()
	if err != nil {
		return err
	}
	return linux.Unshare(ctx, to, info.Size())
}

// copyData copies what was ever written to the image.
func (b *Backends) copyData(ctx context.Context, d diskImage, from, to *os.File) error {
	bytes, err := dataBytes(from)
	if err != nil {
		return err
	}
	if bytes > maxImageCopy {
		return fmt.Errorf("%w: %d bytes were written to the disk image %s; pods can wait for a copy of at most %d, and the file system of "+
			"the data root cannot share blocks (xfs with reflink can); stop the pods", errdefs.ErrFailedPrecondition, bytes, d.file(), maxImageCopy)
	}
	disk, err := linux.FileSystemUsage(to)
	if err != nil {
		return err
	}
	if bytes > disk.Bytes.Available {
		return reserveError(to.Name(), bytes, syscall.ENOSPC)
	}
	return b.atOneMoment(d.path, func() error { return copyRanges(ctx, from, to) })
}

// writtenBytes returns how many bytes of the image were ever written.
func (d diskImage) writtenBytes() (int64, error) {
	image, err := os.Open(d.file())
	if err != nil {
		return 0, notFound(err)
	}
	defer image.Close()
	return dataBytes(image)
}

// digHoles gives back what is reserved for a frozen image and was never written. Where that fails, it stays reserved.
func digHoles(frozen *os.File) {
	image, err := linux.OpenFile(frozen, imageName, os.O_RDWR|linux.O_NOFOLLOW, 0, 0)
	if err != nil {
		return
	}
	defer image.Close()
	info, err := image.Stat()
	if err != nil {
		return
	}
	at := int64(0)
	err = linux.Data(image, func(offset, bytes int64) error {
		hole := offset - at
		if at = offset + bytes; hole == 0 {
			return nil
		}
		return linux.PunchHole(image, offset-hole, hole)
	})
	if err == nil && at < info.Size() {
		_ = linux.PunchHole(image, at, info.Size()-at)
	}
}

func dataBytes(file *os.File) (sum int64, err error) {
	err = linux.Data(file, func(_, bytes int64) error {
		sum += bytes
		return nil
	})
	return sum, err
}

// copyRanges copies the ranges of a file that have data, at most maxImageCopy bytes, into an empty one.
func copyRanges(ctx context.Context, from, to *os.File) error {
	const step = 8 << 20
	info, err := from.Stat()
	if err != nil {
		return err
	}
	if err := to.Truncate(info.Size()); err != nil {
		return err
	}
	left := int64(maxImageCopy)
	return linux.Data(from, func(offset, bytes int64) error {
		if left -= bytes; left < 0 {
			return fmt.Errorf("%w: more than %d bytes were written to %s during the copy", errdefs.ErrFailedPrecondition, maxImageCopy, from.Name())
		}
		for end := offset + bytes; offset < end; offset += step {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			part := io.NewSectionReader(from, offset, min(step, end-offset))
			if _, err := io.Copy(io.NewOffsetWriter(to, offset), part); err != nil {
				return err
			}
		}
		return nil
	})
}

// atOneMoment calls do while the file system that is mounted at path is frozen: all that was written before is on its disk, and whoever
// writes waits. Thaw does nothing until do returns.
func (b *Backends) atOneMoment(path string, do func() error) (err error) {
	b.moments.Lock()
	defer b.moments.Unlock()
	dir, err := linux.Open(nil, path, os.O_RDONLY|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := linux.FreezeFS(dir); err != nil {
		if errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("%w: the file system at %s is frozen by another program (fsfreeze); thaw it: %w", errdefs.ErrUnavailable, path, err)
		}
		return err
	}
	defer func() { err = errors.Join(err, linux.ThawFS(dir)) }()
	return do()
}

// Thaw thaws the file systems of disk images. A process that was killed while it copied one has left it frozen, and the pods that write to
// it wait.
func (b *Backends) Thaw() error {
	if !b.moments.TryLock() {
		return nil // This process is copying one.
	}
	defer b.moments.Unlock()
	entries, err := os.ReadDir(b.config.MountDir)
	if err != nil {
		return nil // Nothing is mounted there.
	}
	var failed error
	for _, entry := range entries {
		failed = errors.Join(failed, thawAt(filepath.Join(b.config.MountDir, entry.Name())))
	}
	return failed
}

func thawAt(path string) error {
	if mounted, err := linux.IsMountPoint(path); err != nil || !mounted {
		return err
	}
	dir, err := linux.Open(nil, path, os.O_RDONLY|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	err = linux.ThawFS(dir)
	// It is not frozen, or is a tmpfs.
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EOPNOTSUPP) {
		return nil
	}
	return err
}

// openFrozenImage mounts a frozen disk image, and returns the upper in it as the root of a detached mount. Nothing that the image contains
// is trusted or changed: there is no replay of a journal (noload), no program of it gets rights (nosuid), no device can be used (nodev).
func (b *Backends) openFrozenImage(ctx context.Context, path string) (*os.File, error) {
	image, err := linux.Open(b.config.Root, path, os.O_RDONLY, linux.ResolveBeneath|linux.ResolveNoSymlinks)
	if err != nil {
		return nil, lostFrozen(path, err)
	}
	defer image.Close()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	mounted, err := b.mountFrozenImage(image)
	if err != nil {
		return nil, fmt.Errorf("mount the frozen disk image %s: %w", image.Name(), err)
	}
	defer mounted.Close()
	upper, err := linux.OpenDirAt(mounted, upperName)
	if err != nil {
		return nil, lostFrozen(path+"/"+upperName, err)
	}
	defer upper.Close()
	dir, err := linux.OpenTree(upper, "")
	if errors.Is(err, syscall.EINVAL) {
		dir, err = b.openAttached(mounted)
	}
	if err != nil {
		return nil, fmt.Errorf("open the upper in the frozen disk image %s: %w", image.Name(), err)
	}
	return dir, nil
}

// openAttached is for a kernel before Linux 6.15, which makes no clone of a part of a detached mount: the mount is attached until the clone
// is made. What a crash leaves attached is detached at start.
func (b *Backends) openAttached(mounted *os.File) (*os.File, error) {
	if err := os.MkdirAll(b.config.MountDir, 0o700); err != nil {
		return nil, err
	}
	path, err := os.MkdirTemp(b.config.MountDir, attachedPrefix)
	if err != nil {
		return nil, err
	}
	defer os.Remove(path)
	target, err := linux.OpenDir(path)
	if err != nil {
		return nil, err
	}
	defer target.Close()
	if err := linux.MoveMount(mounted, target); err != nil {
		return nil, err
	}
	upper, err := linux.OpenDirAt(nil, filepath.Join(path, upperName))
	var dir *os.File
	if err == nil {
		dir, err = linux.OpenTree(upper, "")
		upper.Close()
	}
	if unmountErr := linux.UnmountLazily(path); unmountErr != nil {
		if dir != nil {
			dir.Close()
		}
		return nil, errors.Join(err, unmountErr)
	}
	return dir, err
}

// attachedPrefix begins the names of mount points of openAttached.
const attachedPrefix = "frozen-"

// mountFrozenImage returns a detached read-only mount of a disk image. All mounts of one image have one loop device and one page cache.
func (b *Backends) mountFrozenImage(image *os.File) (*os.File, error) {
	loop, err := b.attachFrozenImage(image)
	if err != nil {
		return nil, err
	}
	// The kernel detaches the device with its last user.
	defer loop.Close()
	fsContext, err := linux.Fsopen("ext4")
	if err != nil {
		return nil, err
	}
	defer fsContext.Close()
	err = fsContext.SetString("source", loop.Name())
	for _, flag := range []string{"ro", "noload"} {
		if err == nil {
			err = fsContext.SetFlag(flag)
		}
	}
	if err == nil {
		err = fsContext.SetString("errors", "remount-ro")
	}
	if err == nil {
		err = fsContext.Create()
	}
	if err != nil {
		return nil, err
	}
	return fsContext.Mount(linux.MountAttrReadOnly | linux.MountAttrNoSUID | linux.MountAttrNoDev)
}

func (b *Backends) attachFrozenImage(image *os.File) (*os.File, error) {
	b.attaching.Lock()
	defer b.attaching.Unlock()
	loop, err := linux.FindReadOnlyLoop(image.Name())
	if !errors.Is(err, fs.ErrNotExist) {
		return loop, err
	}
	if loop, err = linux.AttachLoop(image); err != nil {
		return nil, err
	}
	if hasSmallBlocks(image, loop) {
		loop.Close()
		return linux.AttachBufferedLoop(image)
	}
	return loop, nil
}
