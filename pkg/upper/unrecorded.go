package upper

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// OpenUnrecorded returns the upper in a base directory of which no record says anything, by what is there. It is for Release alone.
// Where nothing is there, it is a tmpfs: that has nothing in the data root.
func (b *Backends) OpenUnrecorded(base string) Upper {
	at := Location{Backend: Tmpfs, Base: base}
	for name, backend := range map[string]Backend{imageName: DiskImage, dataName: ProjectQuota, upperName: Directory} {
		if there, err := exists(filepath.Join(b.config.Root.Name(), base, name)); err != nil || there {
			at.Backend = backend
		}
	}
	return b.Open(at)
}

// FoundPodVolumes are the uppers of which there is something in the other volumes of a pod.
type FoundPodVolumes struct {
	// Held are those that a view had.
	Held []Upper
	// Others are the other views that have a busy mount, by its lock file.
	Others []LockHolder
	// Unknown are where the busy mounts are of which it is not known whose they are.
	Unknown []PodVolumePath
}

// FindPodVolumes returns the uppers in other volumes of a pod that a view, the holder, had there, by the handles of this process
// and by the busy mounts in a directory, which is the pod's. The view is not mounted any more. A busy mount whose lock file does not say
// whose it is, or names a view that cannot have it, is taken for the view's if no overlay is mounted on its upper.
func (b *Backends) FindPodVolumes(dir string, holder LockHolder) (found FoundPodVolumes, err error) {
	mounts, err := busyMountsIn(dir)
	if err != nil {
		return FoundPodVolumes{}, fmt.Errorf("find busy mounts in %s: %w", dir, err)
	}
	if upper, ok := b.handles.held(viewOf(holder)); ok {
		found.Held = append(found.Held, upper)
	}
	for _, mount := range mounts {
		file, owner := b.ownerOf(mount, dir, holder)
		switch owner {
		case thisView:
			found.Held = append(found.Held, b.Open(Location{
				Backend: PodVolume, PodVolume: mount.PodVolumePath, PodDir: dir, Holder: *file.Holder, Layers: file.Layers,
			}))
		case unknownView:
			found.Unknown = append(found.Unknown, mount.PodVolumePath)
		case otherView:
			found.Others = append(found.Others, *file.Holder)
		}
	}
	return found, nil
}

// busyMountIn is a busy mount, with the resolved path of the volume that it is in.
type busyMountIn struct {
	PodVolumePath
	resolved string
}

// busyMountsIn finds the busy mounts in the directory of a pod.
func busyMountsIn(podDir string) ([]busyMountIn, error) {
	mounts, err := linux.Mounts(nil)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(podDir)
	if err != nil {
		return nil, err
	}
	var found []busyMountIn
	for _, mount := range mounts {
		if !strings.HasPrefix(mount.Mountpoint, dir+"/") {
			continue
		}
		i := slices.IndexFunc(mounts, func(parent *mountinfo.Info) bool { return parent.ID == mount.Parent })
		if i < 0 || !isOnItself(mount, mounts[i]) {
			continue
		}
		volume := mounts[i].Mountpoint
		if !strings.HasPrefix(volume, dir+"/") {
			// A volume that has no mount of its own, as an emptyDir: it is <dir>/volumes/<plugin>/<name>.
			parts := strings.Split(strings.TrimPrefix(mount.Mountpoint, dir+"/"), "/")
			if len(parts) < 4 || parts[0] != "volumes" {
				continue
			}
			volume = filepath.Join(append([]string{dir}, parts[:3]...)...)
		}
		found = append(found, busyMountIn{
			// As in records, where links are not resolved.
			PodVolumePath{Volume: filepath.Join(podDir, strings.TrimPrefix(volume, dir)), Path: strings.TrimPrefix(mount.Mountpoint, volume+"/")},
			volume,
		})
	}
	return found, nil
}

// busyOwner says whose a busy mount is.
type busyOwner int

const (
	unknownView busyOwner = iota
	thisView
	otherView
)

// ownerOf returns whose a busy mount in the directory of a pod is, and if that is known, its lock file, or what stands for it.
func (b *Backends) ownerOf(mount busyMountIn, podDir string, view LockHolder) (lockFile, busyOwner) {
	volume, err := linux.OpenDirAt(nil, mount.resolved)
	if err != nil {
		return lockFile{}, unknownView
	}
	defer volume.Close()
	base, err := linux.OpenDirBeneath(volume, mount.Path)
	if err != nil {
		return lockFile{}, unknownView
	}
	defer base.Close()
	if file, _, err := readLockFile(base); err == nil && file.Holder != nil {
		switch {
		case viewOf(*file.Holder) == viewOf(view):
			return file, thisView
		case (holders{b.config.InUse}).mayHaveMounted(*file.Holder, mount.Volume, podDir):
			return file, otherView
		}
	}
	if mayBeInUse(b.config.Mounter, volume, mount.Path) {
		return lockFile{}, unknownView
	}
	return lockFile{Holder: &view}, thisView
}

// isOnItself reports whether a mount is that of a directory of its parent on that directory itself.
func isOnItself(mount, parent *mountinfo.Info) bool {
	beneath, ok := strings.CutPrefix(mount.Mountpoint, strings.TrimSuffix(parent.Mountpoint, "/")+"/")
	return ok && mount.Major == parent.Major && mount.Minor == parent.Minor && mount.Root == filepath.Join(parent.Root, beneath)
}
