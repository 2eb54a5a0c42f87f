package overlay

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	fsType = "overlay"
	// mountSource is the source of views in the mount table, as df(1) and findmnt(8) show it.
	mountSource = "overlay-csi"
)

// mountWithAPI mounts the overlay by fsopen(2), fsconfig(2), fsmount(2) and move_mount(2).
func (m *Mounter) mountWithAPI(spec Spec, target *os.File) error {
	// In a process that is being started, a copy of the context would keep the upper in use when the view has been unmounted, and one of
	// the mount would keep the view busy.
	defer linux.HoldStarts()()
	view, err := m.create(spec)
	if err != nil {
		return explain(err)
	}
	defer view.Close()
	return attach(view, target)
}

// create returns a detached mount of the overlay.
func (m *Mounter) create(spec Spec) (*os.File, error) {
	context, err := linux.Fsopen(fsType)
	if err != nil {
		return nil, err
	}
	defer context.Close()
	if err := m.setParameters(context, spec); err != nil {
		return nil, err
	}
	if err := context.Create(); err != nil {
		return nil, err
	}
	attributes := spec.Attributes.bits()
	view, err := context.Mount(attributes &^ linux.MountAttrReadOnly)
	if err != nil {
		return nil, err
	}
	// Before the mount is made read-only: pods that share a view do not all ask for that.
	err = spec.checkWritable(view)
	if err == nil && spec.Attributes.ReadOnly {
		err = linux.MountSetattr(view, linux.MountChange{Set: linux.MountAttrReadOnly})
	}
	if err != nil {
		view.Close()
		return nil, err
	}
	return view, nil
}

func (m *Mounter) setParameters(context *linux.FSContext, spec Spec) error {
	if err := context.SetString("source", mountSource); err != nil {
		return err
	}
	for _, lower := range spec.Lowers {
		if err := m.setDir(context, "lowerdir+", lower); err != nil {
			return err
		}
	}
	if spec.Upper == nil && !spec.followsLowers {
		return nil
	}
	if spec.Upper != nil {
		if err := m.setDir(context, "upperdir", spec.Upper); err != nil {
			return err
		}
		if err := m.setDir(context, "workdir", spec.Work); err != nil {
			return err
		}
	}
	for _, option := range spec.upperOptions() {
		if err := option.set(context); err != nil {
			return err
		}
	}
	return nil
}

// set sets the option.
func (o option) set(context *linux.FSContext) error {
	if o.value == "" {
		return context.SetFlag(o.key)
	}
	return context.SetString(o.key, o.value)
}

// setDir hands a directory to overlayfs. By descriptor, the kernel shows the directory's real path in mountinfo; by its path in /proc,
// the kernel shows that.
func (m *Mounter) setDir(context *linux.FSContext, key string, dir *os.File) error {
	if m.features.LayerFD {
		return context.SetFile(key, dir)
	}
	return context.SetPath(key, dir)
}

// explain wraps the error kind of an overlay that the kernel refused, where the cause is known.
func explain(err error) error {
	if err == nil {
		return nil
	}
	if refused, ok := errors.AsType[*linux.FSContextError](err); ok && len(refused.Messages) == 0 {
		err = fmt.Errorf("%w (the kernel log may say why)", err)
	}
	switch {
	case errors.Is(err, syscall.ELOOP):
		return fmt.Errorf("%w: a layer is named twice or lies inside another one of the same volume: %w", errdefs.ErrInvalidArgument, err)
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%w: %w", ErrUpperInUse, err)
	}
	return err
}
