package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// tally is what a tree takes on the disk.
type tally struct{ bytes, inodes int64 }

// countTree counts what the files beneath path take on the disk, files with several names once. Pods may write during the count:
// the result is not of one moment, and files that are removed are not counted. No link is followed.
func countTree(ctx context.Context, path string) (tally, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return tally{}, notFound(fmt.Errorf("count the files: %w", err))
	}
	defer root.Close()
	var sum tally
	linked := map[uint64]bool{}
	err = fs.WalkDir(root.FS(), ".", func(_ string, entry fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return ignoreNotExist(err)
		}
		info, err := entry.Info()
		if err != nil {
			return ignoreNotExist(err)
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return nil
		}
		if stat.Nlink > 1 && !entry.IsDir() {
			if linked[stat.Ino] {
				return nil
			}
			linked[stat.Ino] = true
		}
		sum.bytes += stat.Blocks * 512
		sum.inodes++
		return nil
	})
	if err != nil {
		return tally{}, fmt.Errorf("count the files of %s: %w", path, err)
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

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// notFound wraps ErrNotFound around an error that says that a file does not exist.
func notFound(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	}
	return err
}
