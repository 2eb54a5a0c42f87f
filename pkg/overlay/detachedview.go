package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Detached mounts a view that is in no directory yet and can be written to, whatever its attributes say: nobody has its files before they
// are as they should be. It ends with the process, and when the handle is closed without Attach.
func (m *Mounter) Detached(spec Spec) (view *os.File, err error) {
	spec.Attributes.ReadOnly = false
	return m.detached(spec)
}

// Attach puts a view of Detached at target, an open directory, and closes the handle.
func (m *Mounter) Attach(view, target *os.File, attributes Attributes) error {
	// See mountWithAPI.
	defer linux.HoldStarts()()
	defer view.Close()
	if attributes.ReadOnly {
		if err := linux.MountSetattr(view, linux.MountChange{Set: linux.MountAttrReadOnly}); err != nil {
			return err
		}
	}
	return attach(view, target)
}

// OpenDetached mounts a read-only overlay that is in no mount namespace, and returns its root, open for reading. Nobody else sees the
// overlay, and the kernel unmounts it with the last file that is open in it. It follows redirects and metacopy files in all lowers.
// The spec has no upper, and its attributes are not used. None of its directories may be the upper of an overlay that is written to.
func (m *Mounter) OpenDetached(spec Spec) (*os.File, error) {
	if spec.Upper != nil {
		return nil, fmt.Errorf("%w: a detached overlay that is only read has no upper", errdefs.ErrInvalidArgument)
	}
	spec.Metacopy, spec.followsLowers = true, true
	spec.Attributes = Attributes{ReadOnly: true, NoSUID: true, NoDev: true, NoExec: true, ATime: "noatime"}
	root, err := m.detached(spec)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// The handle of a mount is one of O_PATH.
	return linux.Open(root, ".", os.O_RDONLY|linux.O_DIRECTORY, 0)
}

// detached mounts an overlay that is in no directory, and returns its root (O_PATH).
func (m *Mounter) detached(spec Spec) (root *os.File, err error) {
	err = m.mapped(spec, func(spec Spec) (err error) {
		if !m.features.MountAPI {
			root, err = m.detachWithCommand(spec)
			return err
		}
		// See mountWithAPI.
		defer linux.HoldStarts()()
		root, err = m.create(spec)
		return explain(err)
	})
	return root, err
}

// detachWithCommand mounts an overlay by mount(8), and takes it out of the tree. After a crash in between, NewMounter unmounts it.
func (m *Mounter) detachWithCommand(spec Spec) (root *os.File, err error) {
	scratch, err := m.makeScratch()
	if err != nil {
		return nil, err
	}
	defer func() {
		// Nothing is removed of a view that could not be unmounted.
		err = errors.Join(err, removeScratch(scratch))
	}()
	path := filepath.Join(scratch, "view")
	if err := os.Mkdir(path, 0o700); err != nil {
		return nil, fmt.Errorf("make a mount point for a view: %w", err)
	}
	target, err := linux.OpenDir(path)
	if err != nil {
		return nil, err
	}
	err = m.mountWithCommand(spec, target)
	target.Close()
	if err != nil {
		return nil, err
	}
	root, err = detachedCopy(path)
	return root, errors.Join(err, linux.UnmountLazily(path))
}
