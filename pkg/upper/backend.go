package upper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"
)

// Backend is how an upper is stored and limited. A volume keeps the backend that its first upper was made with.
type Backend string

// The backends. The package comment has what each of them puts on the disk.
const (
	Directory    Backend = "directory"
	ProjectQuota Backend = "project-quota"
	BtrfsQgroup  Backend = "btrfs-qgroup"
	DiskImage    Backend = "disk-image"
	Tmpfs        Backend = "tmpfs"
	PodVolume    Backend = "pod-volume"
)

// CountsFiles reports whether Usage reads the whole tree, which takes the longer the more files there are.
func (b Backend) CountsFiles() bool { return b == Directory || b == PodVolume }

// Config is what Backends needs.
type Config struct {
	// Root is the data root, open, on the mount on which uppers are used.
	Root *os.File
	// MountDir is a directory for the file systems of disk images and tmpfs uppers, made if it is missing. It must not lie in
	// the data root: a mount there would slow down every publish that takes a layer from it.
	MountDir string
	// Discard moves a file or directory of the data root to the trash, and does nothing if there is none.
	Discard func(path string) error
	// Sparse is set if the sizes of disk images are not reserved on the disk: all of them together may be more than it has.
	Sparse bool
	// Commands run the programs that make, check and grow file systems.
	Commands commands
	// Mounter mounts and unmounts busy mounts, for pod-volume.
	Mounter busyMounter
	// InUse reports whether a holder on this node still has its publication, and where its upper is by its record, for pod-volume. Both
	// are as good as the record: where that cannot be read, at is zero and inUse true.
	InUse func(LockHolder) (at PodVolumePath, inUse bool)
}

// Backends chooses backends and opens uppers on one data root.
type Backends struct {
	config Config
	// unavailable has the reason for each enforcing backend, nil if it is available.
	unavailable map[Backend]error
	quota       *projects
	programs    imagePrograms
	handles     *handles
	// imageChecks are the checks of disk images in progress.
	imageChecks singleflight.Group
	// moments is held while the file system of a disk image is frozen.
	moments sync.Mutex
	// attaching lets one caller at a time look for a loop device of a frozen disk image, or attach one.
	attaching sync.Mutex
}

// NewBackends probes which backends the data root supports, removes the mount points and loop devices that an earlier process left, and
// thaws what it left frozen.
func NewBackends(config Config) *Backends {
	clearMountDir(config.MountDir)
	removeFreeLoops()
	b := &Backends{config: config, quota: newProjects(config.Root), handles: newHandles(), programs: newImagePrograms(config.Commands)}
	b.unavailable = map[Backend]error{
		ProjectQuota: b.quota.probe(),
		BtrfsQgroup:  probeBtrfs(config.Root, config.Commands),
		DiskImage:    probeDiskImage(config.Root, config.Commands, config.Sparse),
	}
	_ = b.Thaw()
	return b
}

// enforcing are the backends that enforce a size on the disk, the best first.
var enforcing = []Backend{ProjectQuota, BtrfsQgroup, DiskImage}

// Enforcing returns the available backends that enforce a size on the disk, the best first.
func (b *Backends) Enforcing() []Backend {
	var available []Backend
	for _, backend := range enforcing {
		if b.unavailable[backend] == nil {
			available = append(available, backend)
		}
	}
	return available
}

// Requirements are what a volume needs of its uppers.
type Requirements struct {
	// Bytes is the size of each upper, 0 for none.
	Bytes int64
	// Accepted are the backends that the volume accepts, the best first, nil for any.
	Accepted []Backend
	// Unenforced is set if the size need not be enforced.
	Unenforced bool
}

// Choose returns the best backend for a volume's uppers. It returns ErrFailedPrecondition, with the reason for each backend
// and what to do, if the size cannot be enforced here.
func (b *Backends) Choose(need Requirements) (Backend, error) {
	switch {
	case need.Accepted != nil:
		backend, err := b.firstAvailable(need.Accepted)
		if err != nil {
			return "", fmt.Errorf("%w: the data root %s does not support what the volume accepts: %w",
				errdefs.ErrFailedPrecondition, b.config.Root.Name(), err)
		}
		return backend, nil
	case b.unavailable[ProjectQuota] == nil:
		// It costs nothing, and reports usage without a walk also if nothing is limited.
		return ProjectQuota, nil
	case need.Bytes == 0 || need.Unenforced:
		return Directory, nil
	}
	backend, err := b.firstAvailable(enforcing)
	if err != nil {
		return "", fmt.Errorf("%w: the data root %s cannot enforce a size of %d bytes (%w); make one of these available, or set "+
			"sizeEnforcement: none",
			errdefs.ErrFailedPrecondition, b.config.Root.Name(), need.Bytes, err)
	}
	return backend, nil
}

// firstAvailable returns the first of the backends that is available, or the reason why each of them is not.
func (b *Backends) firstAvailable(backends []Backend) (Backend, error) {
	var reasons []error
	for _, backend := range backends {
		err := b.unavailable[backend]
		if err == nil {
			return backend, nil
		}
		reasons = append(reasons, fmt.Errorf("%s: %w", backend, err))
	}
	return "", errors.Join(reasons...)
}

// Location says which upper to open.
type Location struct {
	Backend Backend
	// Base is the path of the upper's base directory beneath the data root.
	Base string
	// Limit is the limit that Prepare sets.
	Limit Limit
	// Ephemeral is set if the upper need not survive a crash of the node.
	Ephemeral bool
	// Made is set if the upper was made, and is not to be made again if it is gone: Prepare then returns ErrDataLoss. It is for
	// disk-image, whose content nothing but Prepare sees. Exists tells it of the others.
	Made bool

	// The rest is for pod-volume, which uses none of the above.

	// PodVolume is the directory in the other volume.
	PodVolume PodVolumePath
	// PodDir is kubelet's directory of the pod, in which the volume is, "" if that is not known.
	PodDir string
	// Holder is the view that the upper is for.
	Holder LockHolder
	// Layers are the references of the layers of that view, the topmost first.
	Layers []string
}

// Open returns the upper at a location. It touches nothing.
func (b *Backends) Open(at Location) Upper {
	dir := directory{b.config.Root, at.Base, b.config.Discard}
	data := directory{b.config.Root, filepath.Join(at.Base, dataName), b.config.Discard}
	switch at.Backend {
	case ProjectQuota:
		return projectQuota{data, b.quota, at.Limit}
	case BtrfsQgroup:
		return btrfsQgroup{data, b.config.Commands, at.Limit}
	case DiskImage:
		return diskImage{
			b.innerMount(at.Base), b.programs, dir.path(), b.config.Discard, at.Limit, at.Ephemeral, at.Made, b.config.Sparse,
			&b.imageChecks,
		}
	case Tmpfs:
		return tmpfs{b.innerMount(at.Base), at.Limit}
	case PodVolume:
		return podVolume{at.PodVolume, at.PodDir, at.Holder, at.Layers, holders{b.config.InUse}, b.config.Mounter, b.handles}
	case Directory:
	}
	return dir
}

const (
	dataName  = "data"
	imageName = "disk.img"
)

// ContainsUpper reports whether a base directory contains an upper of any backend. It returns true if that is unknown.
func ContainsUpper(base string) bool {
	for _, name := range []string{upperName, dataName, imageName} {
		if _, err := os.Lstat(filepath.Join(base, name)); !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}
