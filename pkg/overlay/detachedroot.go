package overlay

import (
	"fmt"
	"os"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// DetachedRoot is a copy of the root mount that is in no mount namespace and that nothing is mounted on. Directories are reopened on
// it before overlayfs takes them as layers and uppers.
//
// To take a directory as a layer, the kernel looks at every mount on the directory's own mount (clone_private_mount in
// fs/namespace.c). Where the data root or a layer root is on the same mount as kubelet's directory, these are all the views of the
// node, and the latency of a publish would grow with their number. Directories on other mounts are used as they are: in a container,
// the data root and the layer roots are on mounts of their own with nothing on them. The zero DetachedRoot reopens nothing.
type DetachedRoot struct {
	copy    *os.File
	mountID uint64
}

// NewDetachedRoot returns a copy of the root mount, or the zero DetachedRoot for a kernel without the feature detached-layer.
func NewDetachedRoot(features Features) (*DetachedRoot, error) {
	if !features.DetachedLayer {
		return &DetachedRoot{}, nil
	}
	stat, err := linux.StatMount(nil, "/")
	if err != nil {
		return nil, err
	}
	root, err := detachedCopy("/")
	if err != nil {
		return nil, err
	}
	return &DetachedRoot{copy: root, mountID: stat.MountID}, nil
}

// Close closes the copy. Directories that were reopened on it stay open.
func (d *DetachedRoot) Close() error {
	if d.copy == nil {
		return nil
	}
	return d.copy.Close()
}

// Reopen opens the same directory on the copy (O_PATH). It returns nil where the directory is not on the root mount or cannot be
// found on the copy for certain: then the directory has to be used as it is.
//
// The copy shows directories that are hidden by mounts in the real tree. Resolve a path in the real tree first.
func (d *DetachedRoot) Reopen(dir *os.File) *os.File {
	if d.copy == nil {
		return nil
	}
	want, err := linux.StatMount(dir, "")
	if err != nil || want.MountID != d.mountID {
		return nil
	}
	path, err := linux.CurrentPath(dir)
	if err != nil {
		return nil
	}
	reopened, err := linux.Open(d.copy, path, linux.O_PATH|linux.O_DIRECTORY, linux.ResolveInRoot|linux.ResolveNoSymlinks)
	if err != nil {
		return nil
	}
	if got, err := linux.StatMount(reopened, ""); err != nil || got.ID != want.ID {
		reopened.Close()
		return nil
	}
	return reopened
}

// detachedCopy returns a copy of the mount at path that is in no namespace and that no mount propagates to.
func detachedCopy(path string) (*os.File, error) {
	mount, err := linux.OpenTree(nil, path)
	if err != nil {
		return nil, err
	}
	if err := linux.MountSetattr(mount, linux.MountChange{Private: true}); err != nil {
		mount.Close()
		return nil, fmt.Errorf("make a copy of the mount at %s private: %w", path, err)
	}
	return mount, nil
}
