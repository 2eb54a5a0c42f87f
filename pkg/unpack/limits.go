package unpack

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// checkInterval is the number of bytes that are written between two checks of the free space.
const checkInterval = 64 << 20

// Limits bound the resources that one layer may take. A zero field is no limit.
type Limits struct {
	// MaxBytes is the maximum total size of the layer's files in bytes, holes included.
	MaxBytes int64
	// MaxEntries is the maximum number of entries in the layer's tar.
	MaxEntries int64
	// MinFreePercent is the percentage of the disk that must stay free.
	MinFreePercent int
}

// reserve accounts for bytes before they are written. It checks the free space every checkInterval bytes.
func (u *unpacker) reserve(bytes int64) error {
	u.diskBytes += bytes
	u.uncheckedBytes += bytes
	if u.uncheckedBytes < checkInterval || u.limits.MinFreePercent <= 0 {
		return nil
	}
	u.uncheckedBytes = 0
	return checkFreeSpace(u.root, u.limits.MinFreePercent)
}

// checkFreeSpace returns ErrResourceExhausted if less than minPercent of the disk of dir is free.
func checkFreeSpace(dir *os.File, minPercent int) error {
	usage, err := linux.FileSystemUsage(dir)
	if err != nil {
		return err
	}
	if usage.Bytes.Available*100 < usage.Bytes.Total*int64(minPercent) {
		return fmt.Errorf("%w: less than %d %% of the disk of %s is free; free disk space or lower --min-free-disk-percent",
			errdefs.ErrResourceExhausted, minPercent, dir.Name())
	}
	return nil
}
