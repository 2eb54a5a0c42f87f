package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// checkInterval is the number of bytes that are written between two checks of the free space. It is small against the reserve of a small
// disk.
const checkInterval = 4 << 20

// Limits bound the resources that one layer may take. A zero field is no limit.
type Limits struct {
	// MaxBytes is the maximum total size of the layer's files in bytes, holes and extended attributes included.
	MaxBytes int64
	// MaxEntries is the maximum number of entries in the layer's tar, with the directories that it has no entry for.
	MaxEntries int64
	// MinFreePercent is the percentage of the disk that must stay free.
	MinFreePercent int
}

// CopyToFile copies from to file until ctx is done. It returns the number of bytes, and errdefs.ErrResourceExhausted if they are more
// than MaxBytes or if less than MinFreePercent of the disk is free.
func (l Limits) CopyToFile(ctx context.Context, file *os.File, from io.Reader) (int64, error) {
	content := ContextReader(ctx, from)
	var size int64
	for {
		if l.MinFreePercent > 0 {
			if err := CheckFreeSpace(file, l.MinFreePercent); err != nil {
				return size, err
			}
		}
		n, err := io.CopyN(file, content, checkInterval)
		size += n
		if err := l.CheckSize(size); err != nil {
			return size, err
		}
		if errors.Is(err, io.EOF) {
			return size, nil
		}
		if err != nil {
			return size, err
		}
	}
}

// CheckSize returns errdefs.ErrResourceExhausted if size bytes are more than MaxBytes.
func (l Limits) CheckSize(size int64) error {
	if l.MaxBytes > 0 && size > l.MaxBytes {
		return fmt.Errorf("%w: it has more than %d bytes; raise --max-layer-size", errdefs.ErrResourceExhausted, l.MaxBytes)
	}
	return nil
}

// checkSize returns ErrResourceExhausted if the files of the layer are larger than it may be.
func (u *unpacker) checkSize() error {
	if u.limits.MaxBytes > 0 && u.contentBytes+u.attributeBytes > u.limits.MaxBytes {
		return fmt.Errorf("%w: the layer's files have more than %d bytes; raise --max-layer-size",
			errdefs.ErrResourceExhausted, u.limits.MaxBytes)
	}
	return nil
}

// reserve accounts for bytes before they are written. It checks the free space every checkInterval bytes.
func (u *unpacker) reserve(bytes int64) error {
	u.diskBytes += bytes
	u.uncheckedBytes += bytes
	if u.uncheckedBytes < checkInterval || u.limits.MinFreePercent <= 0 {
		return nil
	}
	u.uncheckedBytes = 0
	return CheckFreeSpace(u.disk, u.limits.MinFreePercent)
}

// ErrNoFreeSpace is wrapped by errors about a disk of which less is free than must be.
var ErrNoFreeSpace = fmt.Errorf("%w: no free disk space", errdefs.ErrResourceExhausted)

// CheckFreeSpace returns ErrNoFreeSpace if less than minPercent of the bytes or of the inodes of the disk of dir is free.
func CheckFreeSpace(dir *os.File, minPercent int) error {
	usage, err := linux.FileSystemUsage(dir)
	if err != nil {
		return err
	}
	if usage.Bytes.Available*100 < usage.Bytes.Total*int64(minPercent) {
		return fmt.Errorf("%w: less than %d %% of the disk of %s is free; free disk space or lower --min-free-disk-percent",
			ErrNoFreeSpace, minPercent, dir.Name())
	}
	// Some file systems, such as btrfs, have no limit of inodes: both numbers are 0.
	if usage.Inodes.Available*100 < usage.Inodes.Total*int64(minPercent) {
		return fmt.Errorf("%w: less than %d %% of the inodes of the disk of %s are free; delete files or lower --min-free-disk-percent",
			ErrNoFreeSpace, minPercent, dir.Name())
	}
	return nil
}
