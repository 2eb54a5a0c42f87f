package volume

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// maxStacked is how many views are unmounted at one target. More than one is there only if somebody mounted by hand.
const maxStacked = 8

// Unpublish takes the volume away from the target: when it returns nil, nothing is mounted there and the directory is
// gone. It goes by the state, not by the request, and answers at once where there is nothing to do. An ephemeral upper
// is moved to the trash, one that is kept stays.
func (m *Manager) Unpublish(ctx context.Context, id, target string) error {
	unlock, err := m.locks.acquire(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.unmount(target); err != nil {
		return fmt.Errorf("unpublish volume %s: %w", id, err)
	}
	if err := removeTarget(target); err != nil {
		return fmt.Errorf("unpublish volume %s: %w", id, err)
	}
	r, err := m.states.load(id)
	if errors.Is(err, errTorn) {
		return m.trash.put(m.states.volumeDir(id))
	}
	if errdefs.IsDataLoss(err) {
		// The view is gone, which is what kubelet asked for. A pod must not stay Terminating for a damaged state file,
		// which reconcile reports until somebody repairs it.
		klog.FromContext(ctx).Error(err, "Unpublished a volume whose state is damaged", "volume", id)
		return nil
	}
	if err != nil || r == nil {
		return err
	}
	return m.forget(ctx, r, target)
}

// unmount takes down the views at target, and is sure that none is left when it returns nil. What is no overlay is
// not the driver's to unmount.
func (m *Manager) unmount(target string) error {
	for range maxStacked {
		mounted, err := m.mounter.At(target)
		switch {
		case err != nil:
			return fmt.Errorf("look at target %s: %w", target, err)
		case mounted == overlay.Nothing:
			return nil
		case mounted == overlay.Other:
			return fmt.Errorf("%w: what is mounted at target %s is no overlay: the driver did not mount it: unmount it by hand", errdefs.ErrFailedPrecondition, target)
		}
		err = m.mounter.Unmount(target)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w: unmount %s: files in it are open: a container of the pod, or a process on the node, still uses it: %w", errdefs.ErrUnavailable, target, err)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount: %w", err)
		}
	}
	return fmt.Errorf("%w: target %s is still a mount point after %d unmounts: see who mounts there", errdefs.ErrFailedPrecondition, target, maxStacked)
}

// forget takes a publication whose view is not mounted out of the state, and with it what was only for that view.
func (m *Manager) forget(ctx context.Context, r *record, target string) error {
	p := r.publication(target)
	if p == nil {
		return nil
	}
	left := r.without(target)
	if r.Spec.Upper != spec.UpperNone && (!r.sharesUpper() || len(left.Publications) == 0) {
		if err := m.openUpper(r, p).Release(ctx); err != nil {
			return err
		}
	}
	if len(left.Publications) == 0 && !r.keepsUpper() {
		return m.trash.put(m.states.volumeDir(r.ID))
	}
	if r.Spec.Ephemeral() {
		// Before the state: without its publication nobody would look for the upper.
		if err := m.trash.put(filepath.Join(m.root.Path(), m.baseDir(r, target))); err != nil {
			return err
		}
	}
	err := m.states.save(left)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		// The view is gone, which is what kubelet asked for, and a pod must not stay Terminating because the disk is full: often
		// it is the pods' ending that makes room. What is mounted only the kernel knows, so that a publication too many does no
		// harm until reconcile finds that its pod is gone.
		klog.FromContext(ctx).Error(err, "Unpublished a volume, and its state says otherwise until there is room", "volume", r.ID)
		return nil
	}
	return err
}
