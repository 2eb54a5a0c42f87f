package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// DefaultPath is where in another volume an upper is kept when the volume names no path: not the root, because a pin
// must lie beneath the volume's mount point.
const DefaultPath = "overlay-csi"

// Pin is what has to be let go of when an upper in another volume is no longer used. It is kept in the state of the
// volume, and is written there before the pin is mounted.
type Pin struct {
	// Volume is the path of the other volume's root, Path the upper's base beneath it.
	Volume string `json:"volume"`
	Path   string `json:"path"`
}

// Paths are where the upper and its work directory are.
func (p Pin) Paths() (upper, work string) {
	base := filepath.Join(p.Volume, p.Path)
	return filepath.Join(base, upperName), filepath.Join(base, workName)
}

// pinner mounts a directory on itself, and takes such a mount away.
type pinner interface {
	Pin(dir *os.File) error
	Detach(root *os.File) error
}

// PodVolume is an upper inside another volume of the pod, whose size, accounting and snapshots it then has. The volume
// belongs to the pod, which may change everything in it while the driver looks: no path in it is followed out of it.
type PodVolume struct {
	pin    Pin
	owner  Owner
	layers []string
	// alive tells whether an owner on this node still uses its upper.
	alive  func(Owner) bool
	pinner pinner
}

// NewPodVolume returns the upper at pin for owner, whose view is of these layers.
func NewPodVolume(pin Pin, owner Owner, layers []string, alive func(Owner) bool, pinner pinner) PodVolume {
	return PodVolume{pin: pin, owner: owner, layers: layers, alive: alive, pinner: pinner}
}

// Prepare locks the upper for its owner, sees that the file system can hold one, pins the volume, and makes the
// directories. It may be done again by the same owner. On an error nothing is held.
func (p PodVolume) Prepare(ctx context.Context, root Root) (dirs Dirs, err error) {
	volume, err := openVolume(p.pin.Volume)
	if err != nil {
		return Dirs{}, err
	}
	defer volume.Close()
	base, err := pathrs.MkdirAllHandle(volume, p.pin.Path, 0o755)
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
	if err := p.pinVolume(volume, base); err != nil {
		return Dirs{}, err
	}
	// What was opened before the pin is on the volume's mount. The upper is used through the pin's.
	pinned, err := p.open(volume, p.pin.Path)
	if err != nil {
		return Dirs{}, err
	}
	defer pinned.Close()
	dirs, err = openDirs(pinned, root)
	if err != nil {
		return Dirs{}, p.wrap("prepare the upper", err)
	}
	return dirs, nil
}

// Release takes the pin and the lock away. What was written stays. It is done again without harm, and without error
// where the volume is gone.
func (p PodVolume) Release(ctx context.Context) error {
	volume, err := openVolume(p.pin.Volume)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer volume.Close()
	if err := p.unpin(volume); err != nil {
		return err
	}
	base, err := p.open(volume, p.pin.Path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		// The pod moved it or put something in its place. The lock in it is one of a view that is gone.
		return nil
	}
	if err != nil {
		return err
	}
	defer base.Close()
	return p.unlock(ctx, base)
}

// Usage counts the files of the upper, and what is free in the volume.
func (p PodVolume) Usage(ctx context.Context) (Usage, error) {
	volume, err := openVolume(p.pin.Volume)
	if err != nil {
		return Usage{}, err
	}
	defer volume.Close()
	upper, err := p.open(volume, p.pin.Path+"/"+upperName)
	if err != nil {
		return Usage{}, err
	}
	defer upper.Close()
	return usageOf(ctx, fmt.Sprintf("/proc/self/fd/%d", upper.Fd()))
}

// Check looks whether the upper is there, and can be written to.
func (p PodVolume) Check() error {
	volume, err := openVolume(p.pin.Volume)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	}
	if err != nil {
		return err
	}
	defer volume.Close()
	base, err := p.open(volume, p.pin.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	}
	if err != nil {
		return err
	}
	defer base.Close()
	if err := checkDirs(openBase{base}); err != nil {
		return p.wrap("look at the upper", err)
	}
	return nil
}

// openBase is the base directory of an upper, open: what the pod renames above it leads nowhere else.
type openBase struct{ dir *os.File }

// Paths are where the upper and work directories are, as long as it is open.
func (b openBase) Paths() (upper, work string) {
	base := fmt.Sprintf("/proc/self/fd/%d/", b.dir.Fd())
	return base + upperName, base + workName
}

// Free is what is left in the volume.
func (p PodVolume) Free(context.Context) (Usage, error) { return FileSystemUsage(p.pin.Volume) }

// Unpin takes only the pin away, so that kubelet can unmount the volume: for an upper whose overlay is gone, and whose
// publish or unpublish is not finished.
func (p PodVolume) Unpin() error {
	volume, err := openVolume(p.pin.Volume)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer volume.Close()
	return p.unpin(volume)
}

func (p PodVolume) pinVolume(volume, base *os.File) error {
	isRoot, sameMount, err := compareMounts(volume, base)
	if err != nil {
		return p.wrap("stat the upper's directory", err)
	}
	switch {
	case sameMount && !isRoot:
		if err := p.pinner.Pin(base); err != nil {
			return p.wrap("pin the volume", err)
		}
		return nil
	case isRoot && !sameMount && sameDevice(volume, base):
		// The pin of an earlier try.
		return nil
	}
	return fmt.Errorf("%w: upper volume path %q in %s is on a mount of its own: name a path that nothing is mounted on", errdefs.ErrInvalidArgument, p.pin.Path, p.pin.Volume)
}

// maxPins is how many pins are taken away at one place. More than one is there only after a crash.
const maxPins = 8

func (p PodVolume) unpin(volume *os.File) error {
	for detached := range maxPins {
		base, err := p.open(volume, p.pin.Path)
		if err == nil {
			var isPin bool
			isPin, err = p.detachPin(volume, base)
			base.Close()
			if err == nil && isPin {
				continue
			}
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ELOOP) && !errors.Is(err, unix.ENOTDIR) {
			return p.wrap("take away the pin", err)
		}
		if detached > 0 {
			return nil
		}
		return p.unpinElsewhere(volume)
	}
	return p.wrap("take away the pin", errors.New("another one appears each time"))
}

// detachPin takes the mount away whose root base is, if that is a pin in the volume.
func (p PodVolume) detachPin(volume, base *os.File) (isPin bool, err error) {
	isRoot, sameMount, err := compareMounts(volume, base)
	if err != nil || !isRoot || sameMount || !sameDevice(volume, base) {
		return false, err
	}
	return true, p.pinner.Detach(base)
}

// unpinElsewhere looks for the pin where the pod may have moved it: a directory above a mount point can be renamed, and
// the mount goes with it. This reads the mount table, for a pod that plays tricks or a pin that was never made.
func (p PodVolume) unpinElsewhere(volume *os.File) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(p.pin.Volume))
	if err != nil {
		return p.wrap("look for the pin", err)
	}
	for _, mount := range mounts {
		path, beneath := strings.CutPrefix(mount.Mountpoint, p.pin.Volume+"/")
		if !beneath {
			continue
		}
		base, err := p.open(volume, path)
		if err != nil {
			continue
		}
		if file, _, err := readOwnerFile(base); err == nil && file.Owner != nil && *file.Owner == p.owner {
			_, err = p.detachPin(volume, base)
			base.Close()
			if err != nil {
				return p.wrap("take away the pin", err)
			}
			continue
		}
		base.Close()
	}
	return nil
}

// open opens the upper's base directory, through the pin where there is one. No link is followed: the directory was
// made without one, and the pod must not lead the driver to another mount.
func (p PodVolume) open(volume *os.File, path string) (*os.File, error) {
	fd, err := unix.Openat2(int(volume.Fd()), path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, p.wrap("open the upper's directory", err)
	}
	return os.NewFile(uintptr(fd), p.pin.Volume+"/"+path), nil
}

func (p PodVolume) wrap(action string, err error) error {
	return fmt.Errorf("upper at %q in volume %s: %s: %w", p.pin.Path, p.pin.Volume, action, err)
}

func openVolume(path string) (*os.File, error) {
	volume, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open the volume that holds the upper: %w", err)
	}
	return volume, nil
}

// compareMounts tells whether dir is the root of a mount, and whether that is the mount that volume is on.
func compareMounts(volume, dir *os.File) (isRoot, same bool, err error) {
	var ofVolume, ofDir unix.Statx_t
	err = errors.Join(
		unix.Statx(int(volume.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &ofVolume),
		unix.Statx(int(dir.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &ofDir))
	return ofDir.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, ofDir.Mnt_id == ofVolume.Mnt_id, err
}

func sameDevice(a, b *os.File) bool {
	var ofA, ofB unix.Stat_t
	return unix.Fstat(int(a.Fd()), &ofA) == nil && unix.Fstat(int(b.Fd()), &ofB) == nil && ofA.Dev == ofB.Dev
}

// lock makes the upper this owner's, once it is sure that its layers are the ones that the upper was made on, and that
// the file system can hold an upper.
func (p PodVolume) lock(ctx context.Context, base *os.File) error {
	return p.withOwnerFile(ctx, base, func(file ownerFile, existed bool) error {
		if !existed {
			if err := Probe(base); err != nil {
				return err
			}
		}
		if existed && !slices.Equal(file.Layers, p.layers) {
			return p.wrap("lock it", fmt.Errorf("%w: it was made on other layers (%q): overlayfs takes an upper only on the layers that it was made on: name these, or another path", errdefs.ErrFailedPrecondition, file.Layers))
		}
		if file.Owner != nil && *file.Owner == p.owner {
			return nil
		}
		if err := p.takeOver(file.Owner, base); err != nil {
			return err
		}
		return writeOwnerFile(base, ownerFile{Layers: p.layers, Owner: &p.owner})
	})
}

// takeOver decides whether the owner that the lock names is one that a crash left behind.
func (p PodVolume) takeOver(owner *Owner, base *os.File) error {
	switch {
	case owner == nil:
		return nil
	case owner.Node == p.owner.Node && owner.BootID != p.owner.BootID:
		return nil
	case owner.Node == p.owner.Node && !p.alive(*owner):
		return nil
	case owner.Node != p.owner.Node && isNodeLocal(base):
		return nil
	}
	return p.wrap("lock it", fmt.Errorf("%w: volume %s on node %s has it (published at %s): two overlays never share one upper: name another path, or remove %s there once nothing uses it",
		errdefs.ErrFailedPrecondition, owner.VolumeID, owner.Node, owner.Target, ownerName))
}

func (p PodVolume) unlock(ctx context.Context, base *os.File) error {
	return p.withOwnerFile(ctx, base, func(file ownerFile, existed bool) error {
		if !existed || file.Owner == nil || *file.Owner != p.owner {
			return nil
		}
		return writeOwnerFile(base, ownerFile{Layers: file.Layers})
	})
}

// withOwnerFile reads the owner file and calls do with it while no other process and no other volume does the same.
func (p PodVolume) withOwnerFile(ctx context.Context, base *os.File, do func(file ownerFile, existed bool) error) error {
	fd, err := unix.Openat(int(base.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return p.wrap("open it", err)
	}
	dir := os.NewFile(uintptr(fd), base.Name())
	defer dir.Close()
	// Held for milliseconds by another overlay volume. A pod that holds it for good hurts its own volumes alone.
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return p.wrap("lock it (flock)", err)
		}
		select {
		case <-ctx.Done():
			return p.wrap("wait for its lock (flock)", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	file, existed, err := readOwnerFile(dir)
	if err != nil {
		return p.wrap("read "+ownerName, err)
	}
	return do(file, existed)
}
