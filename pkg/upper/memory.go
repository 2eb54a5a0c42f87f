package upper

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// memory is an upper in a tmpfs of its own (Linux, Documentation/filesystems/tmpfs.rst). The memory is that of the pod
// whose processes write.
type memory struct {
	innerMount
	limit Limit
}

// Prepare mounts the tmpfs. It is not swapped out where the kernel can do that (Linux 6.4): what a pod has in memory is
// kept there for its speed, or because it must not reach a disk.
func (m memory) Prepare(_ context.Context, root Root) (Dirs, error) {
	return m.open(root, func(path string) error {
		options := "mode=0700," + m.options()
		err := m.mount(path, 0, options+",noswap")
		if errors.Is(err, unix.EINVAL) {
			err = m.mount(path, 0, options)
		}
		return err
	})
}

func (m memory) mount(path string, flags uintptr, options string) error {
	err := unix.Mount("overlay-csi", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|flags, options)
	if err != nil {
		return fmt.Errorf("mount a tmpfs (%s): %w", options, &os.PathError{Op: "mount", Path: path, Err: err})
	}
	return nil
}

func (m memory) options() string {
	return fmt.Sprintf("size=%d,nr_inodes=%d", m.limit.Bytes, m.limit.Inodes)
}

// ClearWork empties the work directory.
func (m memory) ClearWork() error { return clearWork(m) }

// Discard takes the tmpfs away. There is nothing in the data root.
func (m memory) Discard(func(path string) error) error { return m.Release() }

// Grow gives the tmpfs a new size.
func (m memory) Grow(_ context.Context, limit Limit) error {
	if err := m.Check(); err != nil {
		return err
	}
	return memory{m.innerMount, limit}.mount(m.path, unix.MS_REMOUNT, memory{limit: limit}.options())
}

// Taken is nothing: memory is not of the disk.
func (m memory) Taken(context.Context) (int64, error) { return 0, nil }

// Exists reports whether the tmpfs is there.
func (m memory) Exists() (bool, error) { return m.isMounted() }

// Check looks whether the tmpfs is there.
func (m memory) Check() error {
	mounted, err := m.isMounted()
	if err == nil && !mounted {
		err = fmt.Errorf("%w: the upper in memory at %s is gone", errdefs.ErrNotFound, m.path)
	}
	if err != nil {
		return err
	}
	return checkDirs(m)
}
