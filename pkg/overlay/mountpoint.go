package overlay

import (
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/moby/sys/mountinfo"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Unmount unmounts what is mounted at target (mount.Interface). A link at target itself is not followed. A mount whose file system does
// not answer is taken out of the tree: a thread of this process that waits for the answer keeps it in use.
func (m *Mounter) Unmount(target string) error {
	if m.questions.isOverdue(target) {
		return linux.UnmountLazily(target)
	}
	return linux.Unmount(target)
}

// IsMountPoint reports whether something is mounted at path, a bind mount included (mount.Interface). A link at path itself is not
// followed. It returns fs.ErrNotExist if there is no such path.
func (m *Mounter) IsMountPoint(path string) (bool, error) { return linux.IsMountRoot(nil, path) }

// IsLikelyNotMountPoint is the opposite of IsMountPoint, and as certain (mount.Interface).
func (m *Mounter) IsLikelyNotMountPoint(path string) (bool, error) {
	mounted, err := m.IsMountPoint(path)
	return !mounted, err
}

// CanSafelySkipMountPointCheck returns false: Unmount fails where nothing is mounted (mount.Interface).
func (m *Mounter) CanSafelySkipMountPointCheck() bool { return false }

// Mounted is what is mounted at a path.
type Mounted int

// What can be mounted at a path.
const (
	Nothing Mounted = iota // nothing, or there is no such path
	Overlay                // an overlay
	Other                  // another file system
)

// At returns what is mounted at path itself: a directory within a mount is not a mount point. It answers also where the file system
// does not, such as that of an overlay on layers of a server that is away.
func (m *Mounter) At(path string) (Mounted, error) {
	root, err := m.questions.ask(path, func() (mountRoot, error) { return m.mountRootAt(path) })
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Nothing, nil
	case err != nil:
		return atByTable(path, err)
	case !root.isRoot:
		return Nothing, nil
	case root.magic == linux.OverlayMagic:
		return Overlay, nil
	}
	return Other, nil
}

// atByTable is At by the mount table, which is read whole. A file system that has failed, the upper's for instance, does not answer
// statx(2) or answers with an error, and must be unmounted all the same. statErr is that answer.
func atByTable(path string, statErr error) (Mounted, error) {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return Nothing, errors.Join(statErr, err)
	}
	path = filepath.Join(dir, filepath.Base(path))
	mounts, err := linux.Mounts(func(mount *mountinfo.Info) (skip, stop bool) { return mount.Mountpoint != path, false })
	if err != nil {
		return Nothing, errors.Join(statErr, err)
	}
	switch {
	case len(mounts) == 0 && errors.Is(statErr, errNoAnswer):
		// Another goroutine is asking, or what does not answer has been unmounted since.
		return Nothing, nil
	case len(mounts) == 0:
		return Nothing, statErr
	case mounts[len(mounts)-1].FSType == "overlay":
		return Overlay, nil
	}
	return Other, nil
}

func (m *Mounter) fileSystemMagic(path string, mountID uint64) (int64, error) {
	if !m.features.StatMount {
		return linux.FileSystemMagicAt(path)
	}
	status, err := linux.Statmount(mountID)
	return status.Magic, err
}
