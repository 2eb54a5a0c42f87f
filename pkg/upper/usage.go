package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Limit bounds what an upper may take. Zero is no limit.
type Limit struct{ Bytes, Inodes int64 }

const (
	// inodeBytes is how many bytes of a limit there are for each inode of it.
	inodeBytes = 4 << 10
	// minInodes is the limit of inodes of the smallest upper.
	minInodes = 1024
)

// LimitOf returns the limit of an upper of that many bytes. Inodes are limited as well, so that no volume takes those of
// others with empty files.
func LimitOf(bytes int64) Limit {
	if bytes == 0 {
		return Limit{}
	}
	return Limit{Bytes: bytes, Inodes: max(bytes/inodeBytes, minInodes)}
}

// Usage is how much of its limit an upper takes.
type Usage = linux.Usage

// within returns what a limit (0 for none) leaves of a file system's space.
func within(all linux.Space, limit, used int64) linux.Space {
	if limit == 0 {
		return linux.Space{Total: used + all.Available, Used: used, Available: all.Available}
	}
	return linux.Space{Total: limit, Used: used, Available: min(max(limit-used, 0), all.Available)}
}

// tally is what a tree takes on the disk.
type tally struct{ bytes, inodes int64 }

// countTree counts what a directory and all beneath it take on the disk, files with several names once. Pods may write during the
// count: the result is not of one moment, and files that are removed are not counted. No link is followed.
//
// A file with several names counts at each of them with its share. To remember which were met would take memory for each, which
// a pod may have millions of; shares are added for each number of names, of which there cannot be many.
func countTree(ctx context.Context, path string) (tally, error) {
	root, err := linux.Open(nil, path, os.O_RDONLY|linux.O_DIRECTORY, 0)
	if err != nil {
		return tally{}, notFound(fmt.Errorf("count the files: %w", err))
	}
	defer root.Close()
	var sum tally
	shared := map[uint64]tally{}
	_, err = linux.Walk(ctx, root, func(_ *os.File, _ string, stat linux.Stat) error {
		if stat.Nlink > 1 && !stat.IsDir() {
			names := shared[uint64(stat.Nlink)]
			shared[uint64(stat.Nlink)] = tally{names.bytes + stat.DiskBytes(), names.inodes + 1}
			return nil
		}
		sum.bytes += stat.DiskBytes()
		sum.inodes++
		return nil
	})
	if err != nil {
		return tally{}, fmt.Errorf("count the files of %s: %w", path, err)
	}
	for links, names := range shared {
		sum.bytes += names.bytes / int64(links)
		sum.inodes += names.inodes / int64(links)
	}
	return sum, nil
}

// usageOf counts what is beneath path, and adds what is free on its file system.
func usageOf(ctx context.Context, path string) (Usage, error) {
	used, err := countTree(ctx, path)
	if err != nil {
		return Usage{}, err
	}
	free, err := fileSystemUsage(path)
	if err != nil {
		return Usage{}, err
	}
	return Usage{
		Bytes:  linux.Space{Total: used.bytes + free.Bytes.Available, Used: used.bytes, Available: free.Bytes.Available},
		Inodes: linux.Space{Total: used.inodes + free.Inodes.Available, Used: used.inodes, Available: free.Inodes.Available},
	}, nil
}

// fileSystemUsage returns the usage of the file system of a path. It returns ErrNotFound if there is no such path.
func fileSystemUsage(path string) (Usage, error) {
	usage, err := linux.FileSystemUsageAt(path)
	return usage, notFound(err)
}

// notFound wraps ErrNotFound around an error that says that a file does not exist.
func notFound(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	}
	return err
}

// MeasureFrozen returns how many bytes and inodes frozen uppers take.
func (b *Backends) MeasureFrozen(ctx context.Context, backend Backend, ids []string) (bytes, inodes int64, err error) {
	for _, id := range ids {
		dir, err := b.OpenFrozen(ctx, backend, id)
		if err != nil {
			return 0, 0, err
		}
		_, err = linux.Walk(ctx, dir, func(_ *os.File, _ string, stat linux.Stat) error {
			bytes += stat.DiskBytes()
			inodes++
			return nil
		})
		dir.Close()
		if err != nil {
			return 0, 0, fmt.Errorf("measure a frozen upper: %w", err)
		}
	}
	return bytes, inodes, nil
}
