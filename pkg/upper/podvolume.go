package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// DefaultPath is the path of an upper in another volume if the user names none. It is not the volume's root, because the busy
// mount must lie beneath the volume's mount point.
const DefaultPath = "overlay-csi"

// PodVolumePath is the directory of an upper in another volume of the pod. It is part of a volume's record, which is written
// before Prepare mounts anything there.
type PodVolumePath struct {
	// Volume is the path of the other volume's root, Path that of the directory beneath it.
	Volume string `json:"volume"`
	Path   string `json:"path"`
}

// String quotes the path, which the pod chooses.
func (p PodVolumePath) String() string { return quote(filepath.Join(p.Volume, p.Path)) }

// podVolume is an upper inside another volume of the pod, which thereby determines its size, accounting and snapshots. The volume
// belongs to the pod, which may change anything in it at any moment: no path in it is followed out of it.
type podVolume struct {
	at      PodVolumePath
	podDir  string
	holder  LockHolder
	layers  []string
	holders holders
	mounter busyMounter
	handles *handles
}

var _ Upper = podVolume{}

// Prepare locks the upper for its holder, probes the file system, keeps the volume mounted, and makes the directories. They are opened
// on the mount of the volume: the busy mount above them is read-only.
func (p podVolume) Prepare(ctx context.Context, root RootAttr) (dirs Dirs, err error) {
	volume, err := p.openVolume()
	if err != nil {
		return Dirs{}, err
	}
	defer volume.Close()
	// That of an earlier Prepare.
	if err := p.unmountBusyAtPath(volume); err != nil {
		return Dirs{}, err
	}
	base, err := pathrs.MkdirAllHandle(volume, p.at.Path, 0o755)
	if errors.Is(err, syscall.ENOTDIR) {
		return Dirs{}, p.wrap("make the upper's directory", fmt.Errorf("%w: the pod has something else than a directory there; "+
			"remove that, or name another path", errdefs.ErrFailedPrecondition))
	}
	if err != nil {
		return Dirs{}, p.wrap("make the upper's directory", err)
	}
	defer base.Close()
	if err := p.lock(ctx, base); err != nil {
		return Dirs{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Release(ctx))
		}
	}()
	if err := p.keepMounted(volume, base); err != nil {
		return Dirs{}, err
	}
	dirs, err = openDirs(base, root)
	if err != nil {
		return Dirs{}, p.wrap("prepare the upper", err)
	}
	return dirs, nil
}

// Release gives up what keeps the volume mounted, and unlocks the upper. If the volume is gone, so are both.
func (p podVolume) Release(ctx context.Context) error {
	p.handles.drop(p.view())
	volume, err := p.openVolume()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer volume.Close()
	if err := p.unmountBusy(volume); err != nil {
		return err
	}
	if err := p.unlock(ctx, volume); err != nil {
		// The lock stays where the volume is full, read-only or failed, or where the pod has changed the lock file. It is of a view that
		// is gone, and another holder takes it over.
		klog.FromContext(ctx).Info("Lock file left in another volume", "reason", err.Error())
	}
	return nil
}

// Discard only releases the upper: what is in it belongs to the pod.
func (p podVolume) Discard(ctx context.Context) error { return p.Release(ctx) }

// Hold takes a handle where there is no busy mount: this process has none yet, or the pod has moved the busy mount away.
func (p podVolume) Hold() error {
	if _, ok := p.handles.held(p.view()); ok {
		return nil
	}
	volume, err := p.openVolume()
	if errors.Is(err, fs.ErrNotExist) {
		// kubelet has unmounted it while no process of the driver was there.
		return nil
	}
	if err != nil {
		return err
	}
	defer volume.Close()
	base, err := p.open(volume, p.at.Path)
	if err == nil {
		compared, err := compareMounts(volume, base)
		base.Close()
		if err == nil && compared.busy {
			return nil
		}
	}
	return p.handles.hold(p)
}

// Yield gives up only what keeps the volume mounted. It is for an upper whose overlay is gone and whose publish or unpublish has not
// finished: the lock remains, and the next Prepare keeps the volume mounted again.
func (p podVolume) Yield() error {
	p.handles.drop(p.view())
	volume, err := p.openVolume()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer volume.Close()
	return p.unmountBusy(volume)
}

func (p podVolume) ClearWork() error {
	base, err := p.openBeneath(p.at.Path)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer base.Close()
	return clearWork(openBase{base})
}

func (p podVolume) Grow(context.Context, Limit) error {
	return p.wrap("grow it", fmt.Errorf("%w: its size is that of the other volume; expand that one", errdefs.ErrInvalidArgument))
}

// Usage counts the files of the upper, and adds what is free in the volume.
func (p podVolume) Usage(ctx context.Context) (Usage, error) {
	upper, err := p.openUpper()
	if err != nil {
		return Usage{}, err
	}
	defer upper.Close()
	return usageOf(ctx, linux.ProcPath(upper))
}

// DiskUsage is zero: the other volume takes the space.
func (p podVolume) DiskUsage(context.Context) (int64, error) { return 0, nil }

func (p podVolume) Free(context.Context) (Usage, error) {
	upper, err := p.openUpper()
	if err != nil {
		return Usage{}, err
	}
	defer upper.Close()
	return linux.FileSystemUsage(upper)
}

func (p podVolume) Exists() (bool, error) {
	base, err := p.openBeneath(p.at.Path)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer base.Close()
	upper, _ := openBase{base}.Paths()
	return exists(upper)
}

func (p podVolume) Check() error {
	base, err := p.openBeneath(p.at.Path)
	if err != nil {
		return err
	}
	defer base.Close()
	if err := checkDirs(openBase{base}); err != nil {
		return p.wrap("check the upper", err)
	}
	return nil
}

func (p podVolume) Paths() (upper, work string) {
	base := filepath.Join(p.at.Volume, p.at.Path)
	return filepath.Join(base, upperName), filepath.Join(base, workName)
}

// openBase is the open base directory of an upper: whatever the pod renames, its paths stay in that directory.
type openBase struct{ dir *os.File }

// Paths returns paths that hold as long as the directory is open.
func (b openBase) Paths() (upper, work string) {
	base := linux.ProcPath(b.dir)
	return base + "/" + upperName, base + "/" + workName
}

// openUpper opens the upper directory. It returns ErrNotFound if that or the volume is gone.
func (p podVolume) openUpper() (*os.File, error) { return p.openBeneath(p.at.Path + "/" + upperName) }

// openBeneath opens a directory beneath the volume, on a copy of its mount without the busy mount, which is read-only. It returns
// ErrNotFound if that or the volume is gone.
func (p podVolume) openBeneath(path string) (*os.File, error) {
	volume, err := p.openVolume()
	if err != nil {
		return nil, notFound(err)
	}
	defer volume.Close()
	bare, err := linux.OpenTree(volume, "")
	if err != nil {
		return nil, p.wrap("copy the mount", err)
	}
	defer bare.Close()
	dir, err := p.open(bare, path)
	return dir, notFound(err)
}

// open opens a directory in the volume, through the busy mount if there is one. It follows no link: the directory was made
// without one, and the pod must not lead the driver to another mount.
func (p podVolume) open(volume *os.File, path string) (*os.File, error) {
	dir, err := linux.OpenDirBeneath(volume, path)
	if err != nil {
		return nil, p.wrap("open the upper's directory", err)
	}
	return dir, nil
}

// isMoved reports whether an error of open says that the pod has moved the directory, or put something else at its path.
func isMoved(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENOTDIR)
}

func (p podVolume) wrap(action string, err error) error {
	return fmt.Errorf("upper at %q in volume %s: %s: %w", p.at.Path, p.at.Volume, action, err)
}

func (p podVolume) openVolume() (*os.File, error) {
	volume, err := linux.OpenDirAt(nil, p.at.Volume)
	if err != nil {
		return nil, fmt.Errorf("open the volume that contains the upper: %w", err)
	}
	return volume, nil
}
