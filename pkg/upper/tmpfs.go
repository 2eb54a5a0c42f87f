package upper

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// tmpfs is an upper in a tmpfs of its own (Linux, Documentation/filesystems/tmpfs.rst). The memory is charged to the pod whose
// processes write.
type tmpfs struct {
	innerMount
	limit Limit
}

var _ Upper = tmpfs{}

// Prepare mounts the tmpfs. It is not swapped out if the kernel supports that (Linux 6.4): what a pod has in memory is there
// for speed, or because it must not reach a disk.
func (m tmpfs) Prepare(ctx context.Context, root RootAttr) (Dirs, error) {
	return m.open(ctx, root, func(path string) error {
		options := "mode=0700," + tmpfsOptions(m.limit)
		err := mountTmpfs(path, 0, options+",noswap")
		if errors.Is(err, syscall.EINVAL) {
			err = mountTmpfs(path, 0, options)
		}
		return err
	})
}

func mountTmpfs(path string, flags uintptr, options string) error {
	if err := linux.Mount("overlay-csi", path, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV|flags, options); err != nil {
		return fmt.Errorf("mount a tmpfs (%s): %w", options, err)
	}
	return nil
}

func tmpfsOptions(limit Limit) string {
	return fmt.Sprintf("size=%d,nr_inodes=%d", limit.Bytes, limit.Inodes)
}

func (m tmpfs) ClearWork() error { return clearWork(m) }

// Discard releases the tmpfs. There is nothing in the data root.
func (m tmpfs) Discard(ctx context.Context) error { return m.Release(ctx) }

func (m tmpfs) Grow(_ context.Context, limit Limit) error {
	if err := m.Check(); err != nil {
		return err
	}
	return mountTmpfs(m.path, syscall.MS_REMOUNT, tmpfsOptions(limit))
}

// DiskUsage is zero: memory takes nothing of the disk.
func (m tmpfs) DiskUsage(context.Context) (int64, error) { return 0, nil }

func (m tmpfs) Exists() (bool, error) { return m.isMounted() }

func (m tmpfs) Check() error {
	if err := m.checkMounted(); err != nil {
		return err
	}
	return checkDirs(m)
}
