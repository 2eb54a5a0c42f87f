package overlay

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Opener opens directories once more where overlayfs can take them as layers and uppers at no cost that grows.
//
// To take a directory as a layer, the kernel looks at every mount that lies on the directory's own mount
// (clone_private_mount in fs/namespace.c). Where the data root or a layer root is on the same mount as kubelet's
// directory, these are all the views of the node, and a publish would cost more with each of them. An opener therefore
// goes through a detached copy of the root mount, on which nothing is mounted. Other mounts are used as they are: in a
// container the data root and the layer roots are on mounts of their own, with nothing on them. The zero Opener uses every
// mount as it is.
type Opener struct {
	copy      *os.File
	rootMount uint64
}

// NewOpener returns an opener for a kernel with these features.
func NewOpener(features Features) (*Opener, error) {
	if !features.DetachedLayer {
		return &Opener{}, nil
	}
	stat, err := statMount(unix.AT_FDCWD, "/", 0)
	if err != nil {
		return nil, err
	}
	root, err := detachedCopy("/")
	if err != nil {
		return nil, err
	}
	return &Opener{copy: root, rootMount: stat.Mnt_id}, nil
}

// Close lets go of the copy. What was opened stays open.
func (o *Opener) Close() error {
	if o.copy == nil {
		return nil
	}
	return o.copy.Close()
}

// Quiet opens the same directory on the copy (O_PATH). It is nil where the directory is not on the root mount, or cannot
// be found on the copy for certain: then the directory is used as it is.
//
// On the copy nothing is mounted: what lies beneath the directory there is what mounts may hide in the tree. A path must
// be resolved in the tree first.
func (o *Opener) Quiet(dir *os.File) *os.File {
	if o.copy == nil {
		return nil
	}
	want, err := statMount(int(dir.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil || want.Mnt_id != o.rootMount {
		return nil
	}
	path, err := os.Readlink(procPath(dir))
	if err != nil {
		return nil
	}
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(int(o.copy.Fd()), path, &how)
	if err != nil {
		return nil
	}
	quiet := os.NewFile(uintptr(fd), dir.Name())
	got, err := statMount(fd, "", unix.AT_EMPTY_PATH)
	if err != nil || got.Ino != want.Ino || got.Dev_major != want.Dev_major || got.Dev_minor != want.Dev_minor {
		quiet.Close()
		return nil
	}
	return quiet
}

// detachedCopy returns the mount at path, alone, as a mount that is in no namespace and that no mount propagates to.
func detachedCopy(path string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open_tree %s: %w", path, err)
	}
	mount := os.NewFile(uintptr(fd), "open_tree:"+path)
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		return nil, errors.Join(fmt.Errorf("mount_setattr of a copy of %s: %w", path, err), mount.Close())
	}
	return mount, nil
}
