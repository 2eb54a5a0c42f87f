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
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// innerMount is the mount of an upper that has a file system of its own.
type innerMount struct{ path string }

// clearMountDir removes the mount points of uppers on which nothing is mounted: a reboot unmounted it, and a power cut may have taken
// the volume. Whoever still needs one makes it again. It must not run beside Prepare.
func clearMountDir(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), attachedPrefix) {
			_ = linux.UnmountLazily(filepath.Join(dir, entry.Name()))
		}
		// rmdir(2) refuses a mount point (EBUSY) and a directory that is not empty.
		_ = linux.Rmdirat(nil, filepath.Join(dir, entry.Name()))
	}
}

// innerMount returns the mount of the upper with that base.
func (b *Backends) innerMount(base string) innerMount {
	sum := sha256.Sum256([]byte(base))
	return innerMount{filepath.Join(b.config.MountDir, hex.EncodeToString(sum[:16]))}
}

func (m innerMount) Paths() (upper, work string) {
	return filepath.Join(m.path, upperName), filepath.Join(m.path, workName)
}

// isMounted reports whether the file system is mounted.
func (m innerMount) isMounted() (bool, error) { return linux.IsMountPoint(m.path) }

// checkMounted returns ErrNotFound if the file system is not mounted.
func (m innerMount) checkMounted() error {
	mounted, err := m.isMounted()
	if err == nil && !mounted {
		err = fmt.Errorf("%w: the file system of the upper is not mounted at %s", errdefs.ErrNotFound, m.path)
	}
	return err
}

// open calls mount if the file system is not mounted, and makes and opens the upper in it. If it fails, it unmounts what it
// mounted.
func (m innerMount) open(ctx context.Context, root RootAttr, mount func(path string) error) (dirs Dirs, err error) {
	mounted, err := m.isMounted()
	if err != nil {
		return Dirs{}, err
	}
	if !mounted {
		if err := os.MkdirAll(m.path, 0o700); err != nil {
			return Dirs{}, fmt.Errorf("make the mount point of an upper: %w", err)
		}
		if err := mount(m.path); err != nil {
			return Dirs{}, errors.Join(err, m.Release(ctx))
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, m.Release(ctx))
			}
		}()
	}
	base, err := linux.OpenDirAt(nil, m.path)
	if err != nil {
		return Dirs{}, fmt.Errorf("open the file system of an upper: %w", err)
	}
	defer base.Close()
	if dirs, err = openDirs(base, root); err != nil {
		return Dirs{}, fmt.Errorf("prepare an upper: %w", err)
	}
	return dirs, nil
}

func (m innerMount) Hold() error { return nil }

func (m innerMount) Yield() error { return nil }

// Release detaches the mount: a process that has a file of it open keeps the file system, not the mount.
func (m innerMount) Release(context.Context) error {
	for {
		mounted, err := m.isMounted()
		if err != nil {
			return err
		}
		if !mounted {
			break
		}
		if err := linux.UnmountLazily(m.path); err != nil {
			return fmt.Errorf("unmount the file system of an upper: %w", err)
		}
	}
	if err := os.Remove(m.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the mount point of an upper: %w", err)
	}
	return nil
}

// Usage is that of the file system: nothing else is in it.
func (m innerMount) Usage(context.Context) (Usage, error) {
	if err := m.checkMounted(); err != nil {
		return Usage{}, err
	}
	return fileSystemUsage(m.path)
}

func (m innerMount) Free(ctx context.Context) (Usage, error) { return m.Usage(ctx) }
