package upper

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// innerMount is where the file system of an upper is mounted that has one of its own.
type innerMount struct{ path string }

// mountPoint is where the file system of the upper with that base is mounted.
func (k *Keeper) mountPoint(base string) string {
	sum := sha256.Sum256([]byte(base))
	return filepath.Join(k.config.Mounts, hex.EncodeToString(sum[:16]))
}

// Paths are where the upper and work directories are, while it is mounted.
func (m innerMount) Paths() (upper, work string) {
	return filepath.Join(m.path, upperName), filepath.Join(m.path, workName)
}

// isMounted reports whether the file system is mounted.
func (m innerMount) isMounted() (bool, error) {
	var stat unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, m.path, unix.AT_SYMLINK_NOFOLLOW, 0, &stat)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "statx", Path: m.path, Err: err}
	}
	return stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// open mounts the file system where it is not mounted, and makes and opens the upper in it. On an error nothing that was
// not mounted before is.
func (m innerMount) open(root Root, mount func(path string) error) (dirs Dirs, err error) {
	mounted, err := m.isMounted()
	if err != nil {
		return Dirs{}, err
	}
	if !mounted {
		if err := os.MkdirAll(m.path, 0o700); err != nil {
			return Dirs{}, fmt.Errorf("make the mount point of an upper: %w", err)
		}
		if err := mount(m.path); err != nil {
			return Dirs{}, errors.Join(err, m.Release())
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, m.Release())
			}
		}()
	}
	base, err := os.OpenFile(m.path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return Dirs{}, fmt.Errorf("open the file system of an upper: %w", err)
	}
	defer base.Close()
	if dirs, err = openDirs(base, root); err != nil {
		return Dirs{}, fmt.Errorf("prepare an upper: %w", err)
	}
	return dirs, nil
}

// Release takes the mount away. A process that looks at it keeps the file system, and not the mount.
func (m innerMount) Release() error {
	for {
		mounted, err := m.isMounted()
		if err != nil {
			return err
		}
		if !mounted {
			break
		}
		if err := unix.Unmount(m.path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("unmount the file system of an upper: %w", &os.PathError{Op: "umount", Path: m.path, Err: err})
		}
	}
	if err := os.Remove(m.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the mount point of an upper: %w", err)
	}
	return nil
}

// Usage is how full the file system is: nothing else is in it.
func (m innerMount) Usage(context.Context) (Usage, error) { return FileSystemUsage(m.path) }

// Free is what is left in the file system.
func (m innerMount) Free(ctx context.Context) (Usage, error) { return m.Usage(ctx) }
