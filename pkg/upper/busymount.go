package upper

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// busyMounter mounts and unmounts busy mounts. A busy mount is a directory mounted on itself: the mount that it lies on cannot be
// unmounted (EBUSY) before the busy mount is.
type busyMounter interface {
	AddBusyMount(dir *os.File) error
	Detach(root *os.File) error
}

func (p podVolume) mountBusy(volume, base *os.File) error {
	compared, err := compareMounts(volume, base)
	if err != nil {
		return p.wrap("stat the upper's directory", err)
	}
	switch {
	case compared.inside:
		if err := p.mounter.AddBusyMount(base); err != nil {
			return p.wrap("mount the busy mount", err)
		}
		return nil
	case compared.busy:
		// The busy mount of an earlier Prepare.
		return nil
	}
	return fmt.Errorf("%w: upper volume path %q in %s is a mount point; name a path that nothing is mounted on",
		errdefs.ErrInvalidArgument, p.at.Path, p.at.Volume)
}

// maxBusyMounts is how many busy mounts are unmounted at one path. There is more than one only after a crash.
const maxBusyMounts = 8

func (p podVolume) unmountBusy(volume *os.File) error {
	for unmounted := range maxBusyMounts {
		base, err := p.open(volume, p.at.Path)
		if err == nil {
			var isBusy bool
			isBusy, err = p.detach(volume, base)
			base.Close()
			if err == nil && isBusy {
				continue
			}
		}
		if err != nil && !isMoved(err) {
			return p.wrap("unmount the busy mount", err)
		}
		if unmounted > 0 {
			return nil
		}
		return p.unmountBusyElsewhere(volume)
	}
	return p.wrap("unmount the busy mount", fmt.Errorf("it is still there after %d unmounts", maxBusyMounts))
}

// detach unmounts the mount whose root is base, if it is a busy mount in the volume.
func (p podVolume) detach(volume, base *os.File) (isBusy bool, err error) {
	compared, err := compareMounts(volume, base)
	if err != nil || !compared.busy {
		return false, err
	}
	return true, p.mounter.Detach(base)
}

// unmountBusyElsewhere searches the mount table for a busy mount that the pod has moved by renaming a directory above it.
func (p podVolume) unmountBusyElsewhere(volume *os.File) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(p.at.Volume))
	if err != nil {
		return p.wrap("find the busy mount", err)
	}
	for _, mount := range mounts {
		path, beneath := strings.CutPrefix(mount.Mountpoint, p.at.Volume+"/")
		if !beneath {
			continue
		}
		base, err := p.open(volume, path)
		if err != nil {
			continue
		}
		if file, _, err := readLockFile(base); err == nil && file.Holder != nil && *file.Holder == p.holder {
			_, err = p.detach(volume, base)
			base.Close()
			if err != nil {
				return p.wrap("unmount the busy mount", err)
			}
			continue
		}
		base.Close()
	}
	return nil
}

// mountComparison says where a directory beneath a volume is mounted. If neither is set, it is on another mount.
type mountComparison struct {
	// inside: it is on the mount of the volume, and nothing is mounted on it.
	inside bool
	// busy: it is the root of another mount of the same file system.
	busy bool
}

func compareMounts(volume, dir *os.File) (mountComparison, error) {
	ofVolume, err := linux.StatMount(volume, "")
	if linux.IsNotWritable(err) {
		return compareMountsByTable(volume, dir)
	}
	if err != nil {
		return mountComparison{}, err
	}
	ofDir, err := linux.StatMount(dir, "")
	if err != nil {
		return mountComparison{}, err
	}
	same := ofDir.MountID == ofVolume.MountID
	return mountComparison{
		inside: same && !ofDir.IsRoot,
		busy:   !same && ofDir.IsRoot && ofDir.ID.Dev == ofVolume.ID.Dev,
	}, nil
}

// compareMountsByTable is compareMounts for a file system that has failed, and does not answer statx(2). The busy mount must be
// unmounted all the same, or the other volume could not be.
func compareMountsByTable(volume, dir *os.File) (mountComparison, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return mountComparison{}, err
	}
	ofVolume, err := tableMount(mounts, volume)
	if err != nil {
		return mountComparison{}, err
	}
	ofDir, err := tableMount(mounts, dir)
	if err != nil {
		return mountComparison{}, err
	}
	path, err := linux.CurrentPath(dir)
	if err != nil {
		return mountComparison{}, err
	}
	same, isRoot := ofDir.ID == ofVolume.ID, ofDir.Mountpoint == path
	return mountComparison{
		inside: same && !isRoot,
		busy:   !same && isRoot && ofDir.Major == ofVolume.Major && ofDir.Minor == ofVolume.Minor,
	}, nil
}

// tableMount finds the mount of an open directory in the mount table.
func tableMount(mounts []*mountinfo.Info, dir *os.File) (*mountinfo.Info, error) {
	id, err := linux.TableMountID(dir)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(mounts, func(mount *mountinfo.Info) bool { return mount.ID == id })
	if i < 0 {
		return nil, fmt.Errorf("%w: the mount of %s is not in the mount table", errdefs.ErrNotFound, dir.Name())
	}
	return mounts[i], nil
}
