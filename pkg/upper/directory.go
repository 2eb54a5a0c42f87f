package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/squash"
)

// directory is an upper in a plain directory of the data root. It has no limit.
type directory struct {
	// root is the data root, open, on the mount on which uppers are used. base is a path beneath it.
	root    *os.File
	base    string
	discard func(path string) error
}

var _ Upper = directory{}

func (d directory) Prepare(_ context.Context, root RootAttr) (Dirs, error) {
	base, err := d.open(linux.O_PATH)
	if errors.Is(err, fs.ErrNotExist) {
		if err := linux.Mkdirat(d.root, d.base, 0o700); err != nil {
			return Dirs{}, fmt.Errorf("make the upper's directory %s: %w", d.path(), err)
		}
		base, err = d.open(linux.O_PATH)
	}
	if err != nil {
		return Dirs{}, err
	}
	defer base.Close()
	dirs, err := openDirs(base, root)
	if err != nil {
		return Dirs{}, fmt.Errorf("prepare an upper: %w", err)
	}
	return dirs, nil
}

// open opens the base directory. It follows no link and does not leave the root.
func (d directory) open(flags int) (*os.File, error) {
	dir, err := linux.Open(d.root, d.base, flags|linux.O_DIRECTORY, linux.ResolveBeneath|linux.ResolveNoSymlinks)
	if err != nil {
		return nil, notFound(fmt.Errorf("open the upper's directory: %w", err))
	}
	return dir, nil
}

func (d directory) Paths() (upper, work string) {
	return d.path() + "/" + upperName, d.path() + "/" + workName
}

func (d directory) path() string { return d.root.Name() + "/" + d.base }

func (d directory) ClearWork() error { return clearWork(d) }

func (d directory) Hold() error { return nil }

func (d directory) Yield() error { return nil }

func (d directory) Release(context.Context) error { return nil }

// Discard leaves the base directory, which also has the volume's record. The upper goes last: it tells the next process that there is
// something to discard, and a work directory that outlives it may have the mark with which the kernel refuses a new view.
func (d directory) Discard(context.Context) error {
	upper, work := d.Paths()
	if err := d.discard(work); err != nil {
		return err
	}
	return d.discard(upper)
}

func (d directory) Grow(context.Context, Limit) error { return nil }

// Usage counts the files of the upper, and adds what is free on its file system.
func (d directory) Usage(ctx context.Context) (Usage, error) {
	path, _ := d.Paths()
	return usageOf(ctx, path)
}

func (d directory) DiskUsage(ctx context.Context) (int64, error) {
	path, _ := d.Paths()
	used, err := countTree(ctx, path)
	return used.bytes, err
}

func (d directory) Free(context.Context) (Usage, error) {
	path, _ := d.Paths()
	return fileSystemUsage(path)
}

func (d directory) Exists() (bool, error) {
	path, _ := d.Paths()
	return exists(path)
}

func (d directory) Check() error { return checkDirs(d) }

// HasMoments reports whether an upper of the backend can be copied as it is at one moment, while pods write to it.
func (b Backend) HasMoments() bool { return b == BtrfsQgroup || b == DiskImage }

// copySlack is how much larger a copy may be than the upper was before: a quarter, and this.
var copySlack = squash.Room{Bytes: 16 << 20, Inodes: 4096}

// MeasureInUse returns how many bytes and inodes a copy of an upper by CopyFiles may take.
func (b *Backends) MeasureInUse(ctx context.Context, at Location) (bytes, inodes int64, err error) {
	path, _ := b.Open(at).Paths()
	used, err := countTree(ctx, path)
	if err != nil {
		return 0, 0, err
	}
	return used.bytes + used.bytes/4 + copySlack.Bytes, used.inodes + used.inodes/4 + copySlack.Inodes, nil
}

// CopyFiles copies an upper that pods write to, file by file, into a new frozen upper. It takes at most that many bytes and inodes. The
// copy is not of one moment: squash.CopyInUse says what that means, and has the errors. It is for backends that have no moments. What a
// failed call left is discarded by DiscardFrozen.
func (b *Backends) CopyFiles(ctx context.Context, at Location, id string, bytes, inodes int64) error {
	if at.Backend != Directory && at.Backend != ProjectQuota {
		return fmt.Errorf("%w: an upper of the backend %s is not copied file by file", errdefs.ErrInvalidArgument, at.Backend)
	}
	path := at.Base + "/" + upperName
	from, err := linux.Open(b.config.Root, path, os.O_RDONLY|linux.O_DIRECTORY, linux.ResolveBeneath|linux.ResolveNoSymlinks)
	if err != nil {
		return fmt.Errorf("open the upper: %w", err)
	}
	defer from.Close()
	frozen, err := b.makeFrozen(id)
	if err != nil {
		return err
	}
	defer frozen.Close()
	into, err := makeMerged(frozen, at.Backend)
	if err != nil {
		return err
	}
	defer into.Close()
	return squash.CopyInUse(ctx, from, into, squash.Room{Bytes: bytes, Inodes: inodes})
}
