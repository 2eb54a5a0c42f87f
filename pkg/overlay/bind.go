package overlay

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Bind mounts the directory source at target as well, without what is mounted beneath it. Both are open directories, and neither is
// looked up by a path. open_tree(2), mount_setattr(2) and move_mount(2) are on every supported kernel, whatever its overlayfs takes.
func (m *Mounter) Bind(source, target *os.File, attributes Attributes) error {
	// See mountWithAPI.
	defer linux.HoldStarts()()
	clone, err := linux.OpenTree(source, "")
	if err != nil {
		return err
	}
	defer clone.Close()
	// A clone has the attributes of its source: the ones that are not wanted are cleared.
	all := Attributes{ReadOnly: true, NoSUID: true, NoDev: true, NoExec: true, NoSymFollow: true, NoDirATime: true}
	change := linux.MountChange{Set: attributes.bits(), Clear: all.bits()&^attributes.bits() | linux.MountAttrATime}
	if err := linux.MountSetattr(clone, change); err != nil {
		return err
	}
	return attach(clone, target)
}

// AddBusyMount mounts an open directory on itself, read-only: the mount that it is on then cannot be unmounted (EBUSY) before the busy
// mount is detached. Who has the other mount still writes to the directory, an overlay for instance that was mounted from there.
//
// The directory belongs to a pod, which may put a link of the same name in its place at any moment. Nothing is therefore looked up by
// its name.
func (m *Mounter) AddBusyMount(dir *os.File) error {
	clone, err := linux.OpenTree(dir, "")
	if err != nil {
		return err
	}
	defer clone.Close()
	// Before it is attached: so it is in every place that it propagates to.
	if err := linux.MountSetattr(clone, linux.MountChange{Set: linux.MountAttrReadOnly}); err != nil {
		return err
	}
	return attach(clone, dir)
}

// Detach takes the mount whose root is this open directory out of the tree, also while it is in use. What was written through it
// stays. A directory that is not the root of a mount, or whose mount is out of the tree already, is left alone.
func (m *Mounter) Detach(root *os.File) error {
	mounted, err := linux.IsMountRoot(root, "")
	switch {
	case linux.IsNotWritable(err):
		// The file system has failed and does not answer. umount(2) does not ask it.
	case err != nil || !mounted:
		return err
	}
	if err := linux.DetachFile(root); err != nil && !errors.Is(err, syscall.EINVAL) {
		return err
	}
	return nil
}

// attach puts a detached mount at target, an open directory.
func attach(mount, target *os.File) error {
	err := linux.MoveMount(mount, target)
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("%w: the mount namespace is full (sysctl fs.mount-max): %w", errdefs.ErrResourceExhausted, err)
	}
	return err
}
