package upper

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	// smallBlock is the size in bytes of the blocks that mkfs.ext4 chooses for a file system of less than largeImage bytes, of larger
	// ones it is the size of a page (mke2fs.conf(5)).
	smallBlock = 1 << 10
	largeImage = 512 << 20
)

func (d diskImage) file() string { return filepath.Join(d.base, imageName) }

// newFile is what the image is called while it is made.
func (d diskImage) newFile() string { return d.file() + ".new" }

// make makes the image under another name and renames it. SafeFormatAndMount of mount-utils is not used, since it formats what
// looks empty: it would replace a damaged file system by an empty one. What a call that was interrupted left is replaced.
func (d diskImage) make(ctx context.Context) (made bool, err error) {
	if _, err := os.Lstat(d.file()); !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := d.build(ctx); err != nil {
		if removeErr := os.Remove(d.newFile()); !errors.Is(removeErr, fs.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
		return false, fmt.Errorf("make a disk image of %d bytes: %w", d.limit.Bytes, err)
	}
	if err := os.Rename(d.newFile(), d.file()); err != nil {
		return false, fmt.Errorf("make a disk image: %w", err)
	}
	if d.ephemeral {
		return true, nil
	}
	return true, linux.SyncPath(d.base)
}

// build makes the image under its other name, and writes it to the disk if it must survive a crash.
func (d diskImage) build(ctx context.Context) error {
	image, err := os.OpenFile(d.newFile(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer image.Close()
	if linux.FileSystemName(image) == "btrfs" && !d.sparse {
		// What is written a second time would take space that is not reserved.
		if err := linux.DisableCopyOnWrite(image); err != nil {
			return err
		}
	}
	if err := image.Truncate(d.limit.Bytes); err != nil {
		return fmt.Errorf("%w (the data root's file system may not support files of that size)", err)
	}
	// On a full disk mkfs.ext4 says in words only that there is no space.
	if err := d.reserveAll(ctx, image); err != nil {
		return err
	}
	if err := d.format(ctx, image); err != nil {
		return err
	}
	// mkfs.ext4 may have made holes for zeroes.
	if err := d.reserveAll(ctx, image); err != nil || d.ephemeral {
		return err
	}
	return image.Sync()
}

func (d diskImage) format(ctx context.Context, image *os.File) error {
	args := []string{"-q", "-F", "-m", "0", "-i", fmt.Sprint(diskInodeBytes), "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"}
	if d.ephemeral {
		// It is discarded after a crash, so that it needs no journal.
		args = append(args, "-O", "^has_journal")
	}
	if d.limit.Bytes < largeImage {
		sector, err := sectorSize(image)
		if err != nil {
			return err
		}
		if sector > smallBlock {
			args = append(args, "-b", fmt.Sprint(sector))
		}
	}
	output, err := d.programs.run(ctx, d.base, makeExt4, append(args, filepath.Base(image.Name()))...)
	if err != nil {
		return fmt.Errorf("make a file system in %s: %s: %w: %s", image.Name(), makeExt4, err, strings.TrimSpace(string(output)))
	}
	return nil
}

// sectorSize returns the size in bytes of the sectors that an image has on a loop device.
func sectorSize(image *os.File) (int, error) {
	loop, err := linux.AttachLoop(image)
	if err != nil {
		return 0, err
	}
	defer loop.Close()
	return linux.LoopSectorSize(loop)
}

// hasSmallBlocks reports whether the file system of an image has smaller blocks than the sectors of its loop device, so that it cannot be
// mounted there. The sectors may have been smaller when it was made: xfs has those of its blocks for a file that shared blocks with
// another one (cp --reflink), and an image can be moved to another disk.
func hasSmallBlocks(image, loop *os.File) bool {
	// s_log_block_size of the superblock (fs/ext4/ext4.h).
	const superblock, logBlockSize = 1024, 0x18
	var buffer [4]byte
	sector, err := linux.LoopSectorSize(loop)
	if err != nil {
		return false
	}
	if _, err := image.ReadAt(buffer[:], superblock+logBlockSize); err != nil {
		return false
	}
	return 1024<<min(binary.LittleEndian.Uint32(buffer[:]), 6) < sector
}

// reserveAll reserves the disk for all of an image, unless it is sparse. It does nothing where that was done before.
func (d diskImage) reserveAll(ctx context.Context, image *os.File) error {
	if d.sparse {
		return nil
	}
	info, err := image.Stat()
	if err != nil {
		return err
	}
	if err := reserve(image, info.Size()); err != nil {
		return err
	}
	return unshare(ctx, image, info.Size())
}

// unshare has an image share none of its first blocks with a copy of it (cp --reflink): what is written to those takes others, which are
// not reserved. It takes as long as to copy them. An image at rest comes here first in its check, for which no request waits. A file system
// that cannot do that, as btrfs, is left to share.
func unshare(ctx context.Context, image *os.File, bytes int64) error {
	if hasAllBlocks(image, bytes) {
		return nil
	}
	if err := linux.Unshare(ctx, image, bytes); err != nil && !errors.Is(err, syscall.EOPNOTSUPP) {
		return reserveError(image.Name(), bytes, err)
	}
	return nil
}

// reserveClosed is reserveAll for an image that is not open.
func (d diskImage) reserveClosed(ctx context.Context) error {
	if d.sparse {
		return nil
	}
	image, err := os.OpenFile(d.file(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(d.reserveAll(ctx, image), image.Close())
}

// reserve reserves the disk for the first bytes of an image. It looks first whether they fit: fallocate(2) that fails takes until then,
// and on some file systems afterwards too, what others need.
func reserve(image *os.File, bytes int64) error {
	stat, err := linux.StatFile(image)
	if err != nil {
		return err
	}
	disk, err := linux.FileSystemUsage(image)
	if err != nil {
		return err
	}
	// On a full xfs that has fewer free blocks than it keeps for itself, the available bytes are negative.
	if bytes-stat.DiskBytes() > max(disk.Bytes.Available, 0) {
		return reserveError(image.Name(), bytes, syscall.ENOSPC)
	}
	err = linux.Reserve(image, bytes)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC) && stat.DiskBytes() >= bytes && stat.Size >= bytes && hasAllBlocks(image, bytes):
		// xfs wants room for as many others before it looks.
		return nil
	}
	return reserveError(image.Name(), bytes, err)
}

// hasAllBlocks reports whether an image has all of its first blocks. Where the file system does not say, it takes none of the disk for
// anything else, as a tmpfs.
func hasAllBlocks(image *os.File, bytes int64) bool {
	whole, err := linux.HasAllBlocks(image, bytes)
	return whole || errors.Is(err, syscall.EOPNOTSUPP)
}

// extend makes the image larger, and writes to the disk that it is: before anything is written beyond the old end. If it fails, the
// image is as before.
func (d diskImage) extend(bytes int64) error {
	image, err := os.OpenFile(d.file(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer image.Close()
	info, err := image.Stat()
	if err != nil || info.Size() >= bytes {
		return err
	}
	if d.sparse {
		err = image.Truncate(bytes)
	} else if err = reserve(image, bytes); err != nil {
		err = errors.Join(err, image.Truncate(info.Size()))
	}
	if err != nil {
		return err
	}
	return image.Sync()
}

// probeReserve returns an error if the file system of a directory cannot reserve what a file will take. One that cannot be written to
// does not say.
func probeReserve(dir *os.File) error {
	probe, err := linux.OpenFile(dir, ".", os.O_RDWR|linux.O_TMPFILE, 0o600, 0)
	if err != nil {
		return nil
	}
	defer probe.Close()
	if err := linux.Reserve(probe, 1); errors.Is(err, syscall.EOPNOTSUPP) {
		return reserveError(dir.Name(), 1, err)
	}
	return nil
}

func reserveError(path string, bytes int64, err error) error {
	err = fmt.Errorf("reserve %d bytes for %s: %w", bytes, path, err)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		err = fmt.Errorf("%w: %w; its file system cannot do that, and an --overcommit above 1 does without", errdefs.ErrFailedPrecondition, err)
	}
	return err
}
