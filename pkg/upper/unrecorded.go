package upper

import (
	"fmt"
	"os"
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

// FindPodVolumes returns the uppers in other volumes of a pod that a view at a target of a volume holds, by the handles of this process
// and by the busy mounts in a directory, which is the pod's. unknown are the paths of busy mounts that have no lock file which says
// whose they are, or one that names a view which cannot have them.
func (b *Backends) FindPodVolumes(dir, volumeID, target string) (held []Upper, unknown []string, err error) {
	mounts, err := linux.Mounts(nil)
	if err != nil {
		return nil, nil, fmt.Errorf("find busy mounts in %s: %w", dir, err)
	}
	resolved, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("find busy mounts in %s: %w", dir, err)
	}
	if upper, ok := b.handles.held(viewID{volumeID, target}); ok {
		held = append(held, upper)
	}
	podDir := dir
	dir = resolved
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
		path := strings.TrimPrefix(mount.Mountpoint, volume+"/")
		file, err := lockFileAt(volume, path)
		// As in records, where links are not resolved.
		volume = filepath.Join(podDir, strings.TrimPrefix(volume, dir))
		switch {
		case err != nil || file.Holder == nil:
			unknown = append(unknown, quote(mount.Mountpoint))
		case file.Holder.VolumeID == volumeID && file.Holder.Target == target:
			held = append(held, b.Open(Location{
				Backend: PodVolume, PodVolume: PodVolumePath{Volume: volume, Path: path}, PodDir: podDir, Holder: *file.Holder, Layers: file.Layers,
			}))
		case !(holders{b.config.InUse}).mayHaveMounted(*file.Holder, volume, podDir):
			unknown = append(unknown, quote(mount.Mountpoint))
		}
	}
	return held, unknown, nil
}

// isOnItself reports whether a mount is that of a directory of its parent on that directory itself.
func isOnItself(mount, parent *mountinfo.Info) bool {
	beneath, ok := strings.CutPrefix(mount.Mountpoint, strings.TrimSuffix(parent.Mountpoint, "/")+"/")
	return ok && mount.Major == parent.Major && mount.Minor == parent.Minor && mount.Root == filepath.Join(parent.Root, beneath)
}

// lockFileAt reads the lock file of an upper in another volume, without following a link of the pod.
func lockFileAt(volume, path string) (lockFile, error) {
	root, err := linux.OpenDirAt(nil, volume)
	if err != nil {
		return lockFile{}, err
	}
	defer root.Close()
	base, err := linux.OpenDirBeneath(root, path)
	if err != nil {
		return lockFile{}, err
	}
	defer base.Close()
	file, existed, err := readLockFile(base)
	if err == nil && !existed {
		err = os.ErrNotExist
	}
	return file, err
}
