package upper

import (
	"fmt"
	"os"
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
