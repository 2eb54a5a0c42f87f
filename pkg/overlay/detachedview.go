package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Detached mounts a view that is in no directory yet and can be written to, whatever its attributes say: nobody has its files before they
// are as they should be. It ends with the process, and when the handle is closed without Attach.
func (m *Mounter) Detached(spec Spec) (view *os.File, err error) {
	spec.Attributes.ReadOnly = false
	err = m.mapped(spec, func(spec Spec) (err error) {
		if !m.features.MountAPI {
			view, err = m.detachWithCommand(spec)
			return err
		}
		// See mountWithAPI.
		defer linux.HoldStarts()()
		view, err = m.create(spec)
		return explain(err)
	})
	return view, err
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

// detachWithCommand mounts a view by mount(8), and takes it out of the tree. After a crash in between, NewMounter unmounts it.
func (m *Mounter) detachWithCommand(spec Spec) (view *os.File, err error) {
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
	root, err := linux.OpenDir(path)
	if err == nil {
		view, err = linux.OpenTree(root, "")
		root.Close()
	}
	return view, errors.Join(err, linux.UnmountLazily(path))
}
