package upper

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/squash"
)

// A frozen upper is an upper that became read-only, so that overlayfs can take it as a lower. It lies in a directory of its own,
// frozen/<id>, with the name that its backend used.

// frozenDir is the directory of all frozen uppers in the data root (dataroot.Frozen).
const frozenDir = "frozen"

// frozenIDBytes is how many random bytes an ID of a frozen upper has.
const frozenIDBytes = 16

// NewFrozenID returns an ID for a frozen upper.
func NewFrozenID() string {
	var id [frozenIDBytes]byte
	// It never fails (crypto/rand).
	_, _ = rand.Read(id[:])
	return hex.EncodeToString(id[:])
}

// checkFrozenID returns ErrDataLoss for what NewFrozenID does not return: a record on a damaged disk may have it.
func checkFrozenID(id string) error {
	if raw, err := hex.DecodeString(id); err != nil || len(raw) != frozenIDBytes {
		return fmt.Errorf("%w: %q is not the ID of a frozen upper", errdefs.ErrDataLoss, id)
	}
	return nil
}

// frozenName returns what an upper of a backend consists of in its base directory.
func (b Backend) frozenName() (string, error) {
	switch b {
	case Directory:
		return upperName, nil
	case ProjectQuota, BtrfsQgroup:
		return dataName, nil
	case DiskImage:
		return imageName, nil
	case Tmpfs, PodVolume:
	}
	return "", fmt.Errorf("%w: an upper of the backend %q cannot be frozen", errdefs.ErrInvalidArgument, b)
}

// FrozenPath returns where a frozen upper is, beneath the data root.
func FrozenPath(backend Backend, id string) string {
	name, err := backend.frozenName()
	if err != nil {
		return filepath.Join(frozenDir, id)
	}
	if backend == ProjectQuota || backend == BtrfsQgroup {
		name = filepath.Join(name, upperName)
	}
	return filepath.Join(frozenDir, id, name)
}

// PrepareFreeze releases an upper at rest, checks that nothing can write to it any more, and makes the directory of the frozen upper,
// all that can be refused or fail for want of space. The caller has made certain that no overlay is mounted on the upper. It returns
// ErrUnavailable where that passes.
func (b *Backends) PrepareFreeze(ctx context.Context, at Location, id string) error {
	if _, err := at.Backend.frozenName(); err != nil {
		return err
	}
	resting := b.Open(at)
	if err := resting.Release(ctx); err != nil {
		return err
	}
	if image, ok := resting.(diskImage); ok {
		// It is mounted without a replay of its journal.
		if err := image.check(ctx); err != nil {
			return err
		}
	}
	frozen, err := b.makeFrozen(id)
	if err != nil {
		return err
	}
	return frozen.Close()
}

// Freeze renames an upper at rest to a frozen one, and discards its work directory. It may be called again after a crash, and then
// finishes what was left undone. It returns ErrDataLoss if there is neither the upper nor the frozen one.
func (b *Backends) Freeze(at Location, id string) error {
	if err := b.freeze(at, id); err != nil {
		return fmt.Errorf("freeze the upper in %s: %w", filepath.Join(b.config.Root.Name(), at.Base), err)
	}
	return nil
}

func (b *Backends) freeze(at Location, id string) error {
	name, err := at.Backend.frozenName()
	if err != nil {
		return err
	}
	frozen, err := b.makeFrozen(id)
	if err != nil {
		return err
	}
	defer frozen.Close()
	base, err := linux.Open(b.config.Root, at.Base, linux.O_PATH|linux.O_DIRECTORY, linux.ResolveBeneath|linux.ResolveNoSymlinks)
	if err != nil {
		return err
	}
	defer base.Close()
	if _, err := linux.Fstatat(frozen, name); errors.Is(err, fs.ErrNotExist) {
		err = linux.Renameat(base, name, frozen, name, linux.RenameNoReplace)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: neither the upper nor the frozen one, %s, is there: %w", errdefs.ErrDataLoss, frozen.Name(), err)
		}
		if err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	if err := errors.Join(linux.SyncDir(frozen), linux.SyncDir(base)); err != nil {
		return err
	}
	if at.Backend == DiskImage {
		digHoles(frozen)
	}
	// It belongs to the upper that is gone. The next one gets another.
	return b.config.Discard(filepath.Join(base.Name(), workName))
}

// makeFrozen makes the directory of a frozen upper if it is missing, writes its name to the disk, and opens it (O_PATH).
func (b *Backends) makeFrozen(id string) (*os.File, error) {
	if err := checkFrozenID(id); err != nil {
		return nil, err
	}
	all, err := linux.OpenDirAt(b.config.Root, frozenDir)
	if err != nil {
		return nil, err
	}
	defer all.Close()
	err = linux.Mkdirat(all, id, 0o700)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if err := linux.SyncDir(all); err != nil {
		return nil, err
	}
	return linux.OpenDirAt(all, id)
}

// WrittenBytes returns how much of the disk an upper takes once it is frozen or copied.
func (b *Backends) WrittenBytes(ctx context.Context, at Location) (int64, error) {
	u := b.Open(at)
	if image, ok := u.(diskImage); ok {
		return image.writtenBytes()
	}
	return u.DiskUsage(ctx)
}

// CopyInUse copies an upper that pods write to, as it is at one moment, into a new frozen upper. It returns ErrFailedPrecondition, with
// what to do, for a backend that has no such moment. What a failed call left is discarded by DiscardFrozen.
func (b *Backends) CopyInUse(ctx context.Context, at Location, id string) error {
	if !at.Backend.HasMoments() {
		return fmt.Errorf("%w: an upper of the backend %s cannot be copied at one moment while pods write to it; stop the pods, or use a "+
			"volume with sizeEnforcement: image, a data root on btrfs with quotas, or a VolumeSnapshotClass with inUse: copy, whose snapshots "+
			"are not of one moment", errdefs.ErrFailedPrecondition, at.Backend)
	}
	frozen, err := b.makeFrozen(id)
	if err != nil {
		return err
	}
	defer frozen.Close()
	if at.Backend == BtrfsQgroup {
		from, to := filepath.Join(b.config.Root.Name(), at.Base, dataName), filepath.Join(frozen.Name(), dataName)
		_, err = runBtrfs(ctx, b.config.Commands, "subvolume", "snapshot", "-r", from, to)
	} else {
		err = b.copyImage(ctx, b.Open(at).(diskImage), frozen)
	}
	if err == nil {
		err = linux.SyncDir(frozen)
	}
	if err != nil {
		return fmt.Errorf("copy the upper in %s: %w", filepath.Join(b.config.Root.Name(), at.Base), err)
	}
	return nil
}

// OpenFrozen opens the directory of a frozen upper (O_PATH). It returns ErrDataLoss if it is gone. That of a disk image is the root of a
// detached read-only mount, which ends with the handle and with all views of it.
func (b *Backends) OpenFrozen(ctx context.Context, backend Backend, id string) (*os.File, error) {
	if err := checkFrozenID(id); err != nil {
		return nil, err
	}
	path := FrozenPath(backend, id)
	if backend == DiskImage {
		return b.openFrozenImage(ctx, path)
	}
	dir, err := linux.Open(b.config.Root, path, linux.O_PATH|linux.O_DIRECTORY, linux.ResolveBeneath|linux.ResolveNoSymlinks)
	if err != nil {
		return nil, lostFrozen(path, err)
	}
	return dir, nil
}

// lostFrozen wraps ErrDataLoss around an error that says that a frozen upper does not exist.
func lostFrozen(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: the frozen upper %s is gone, with what was written before the snapshot; restore it, or delete what was made "+
			"of it: %w", errdefs.ErrDataLoss, path, err)
	}
	return fmt.Errorf("open a frozen upper: %w", err)
}

// CheckFrozen returns ErrNotFound if a frozen upper is gone. It does not look into disk images.
func (b *Backends) CheckFrozen(backend Backend, id string) error {
	path := filepath.Join(b.config.Root.Name(), FrozenPath(backend, id))
	there, err := exists(path)
	if err == nil && !there {
		err = fmt.Errorf("%w: the frozen upper %s is gone, with what was written before the snapshot", errdefs.ErrNotFound, path)
	}
	return err
}

// ListFrozen returns the IDs of all frozen uppers.
func (b *Backends) ListFrozen() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(b.config.Root.Name(), frozenDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list frozen uppers: %w", err)
	}
	ids := make([]string, len(entries))
	for i, entry := range entries {
		ids[i] = entry.Name()
	}
	return ids, nil
}

// DiscardFrozen moves a frozen upper to the trash. It returns nil if there is none.
func (b *Backends) DiscardFrozen(id string) error {
	b.makeWritable(id)
	if err := b.config.Discard(filepath.Join(b.config.Root.Name(), frozenDir, id)); err != nil {
		return fmt.Errorf("discard a frozen upper: %w", err)
	}
	return nil
}

// CopyRootXattr gives the root of a new upper the extended attributes of the root of a frozen one: those that pods have set, and the
// driver's own. Those of overlayfs say what is in one upper, and those of security modules come from the node.
func CopyRootXattr(frozen, dir *os.File) error {
	names, err := linux.ListXattr(frozen)
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "security.") {
			continue
		}
		value, err := linux.GetXattr(frozen, name)
		if err != nil {
			return err
		}
		// They may be on other file systems.
		if err := linux.SetXattr(dir, name, value); err != nil && !errors.Is(err, syscall.EOPNOTSUPP) {
			return err
		}
	}
	return nil
}

// makeWritable lets the files of a snapshot of btrfs be deleted. Where that fails, they stay in the trash, and the log says so.
func (b *Backends) makeWritable(id string) {
	if b.unavailable[BtrfsQgroup] != nil {
		return
	}
	data := filepath.Join(b.config.Root.Name(), frozenDir, id, dataName)
	if there, err := exists(data); err == nil && there {
		_, _ = runBtrfs(context.Background(), b.config.Commands, "property", "set", "-ts", data, "ro", "false")
	}
}

// MergeFrozen merges frozen uppers of one backend, the topmost first, into a new one, which is on the disk when it returns. Where views may
// have them mounted, isApart has it copy files that it would link otherwise: a link changes what a view shows of a file, its link count.
// What a failed call left is discarded by DiscardFrozen. It returns ErrFailedPrecondition if their roots have different groups, which
// views may map, and ErrInvalidArgument for disk images.
func (b *Backends) MergeFrozen(ctx context.Context, backend Backend, ids []string, into string, isApart bool) error {
	if backend == DiskImage {
		return fmt.Errorf("%w: frozen uppers in disk images are not merged", errdefs.ErrInvalidArgument)
	}
	uppers, err := b.openAllFrozen(ctx, backend, ids)
	if err != nil {
		return err
	}
	defer closeFiles(uppers)
	frozen, err := b.makeFrozen(into)
	if err != nil {
		return err
	}
	defer frozen.Close()
	merged, err := makeMerged(frozen, backend)
	if err != nil {
		return err
	}
	defer merged.Close()
	merge := squash.Merge
	if isApart || backend == ProjectQuota {
		// A file that was linked would still count for the project of the upper that it was in.
		merge = squash.MergeApart
	}
	if err := merge(ctx, uppers, merged); err != nil {
		return fmt.Errorf("merge %d frozen uppers: %w", len(ids), err)
	}
	return nil
}

// makeMerged makes the directory of a frozen upper where OpenFrozen looks for it.
func makeMerged(frozen *os.File, backend Backend) (*os.File, error) {
	if backend != ProjectQuota && backend != BtrfsQgroup {
		if err := linux.Mkdirat(frozen, upperName, 0o755); err != nil {
			return nil, err
		}
		return linux.OpenDirAt(frozen, upperName)
	}
	if err := linux.Mkdirat(frozen, dataName, 0o755); err != nil {
		return nil, err
	}
	data, err := linux.OpenDirAt(frozen, dataName)
	if err != nil {
		return nil, err
	}
	defer data.Close()
	if err := linux.Mkdirat(data, upperName, 0o755); err != nil {
		return nil, err
	}
	return linux.OpenDirAt(data, upperName)
}

func (b *Backends) openAllFrozen(ctx context.Context, backend Backend, ids []string) (uppers []*os.File, err error) {
	defer func() {
		if err != nil {
			closeFiles(uppers)
		}
	}()
	for _, id := range ids {
		dir, err := b.OpenFrozen(ctx, backend, id)
		if err != nil {
			return uppers, err
		}
		uppers = append(uppers, dir)
		root, err := RootAttrOf(dir)
		if err != nil {
			return uppers, err
		}
		first, err := RootAttrOf(uppers[0])
		if err != nil {
			return uppers, err
		}
		if root.GID != first.GID {
			return uppers, fmt.Errorf("%w: the roots of the frozen uppers %s and %s have the groups %d and %d",
				errdefs.ErrFailedPrecondition, ids[0], id, first.GID, root.GID)
		}
	}
	return uppers, nil
}

func closeFiles(files []*os.File) {
	for _, file := range files {
		file.Close()
	}
}

// MakeFrozen makes a frozen upper of the backend Directory, and an empty directory beside it with the ID scratch, and calls fill with both.
// Both are discarded by DiscardFrozen: the scratch directory afterwards, and the frozen upper after an error.
func (b *Backends) MakeFrozen(id, scratch string, fill func(into, scratch *os.File) error) error {
	frozen, err := b.makeFrozen(id)
	if err != nil {
		return err
	}
	defer frozen.Close()
	beside, err := b.makeFrozen(scratch)
	if err != nil {
		return err
	}
	defer beside.Close()
	into, err := makeMerged(frozen, Directory)
	if err != nil {
		return err
	}
	defer into.Close()
	return fill(into, beside)
}
