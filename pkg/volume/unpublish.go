package volume

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
)

// Unpublish unmounts what is mounted at the target of the request, and removes the target directory. The rest goes by the
// record: it discards an ephemeral upper, and releases a persistent one, which stays. It returns nil if there is nothing to do.
// Where the record is damaged or missing, it releases what it finds of the view, and leaves what is in the data root for a person.
func (m *Manager) Unpublish(ctx context.Context, id, target string) error {
	unlock, err := m.locks.acquire(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.views.unmountAndRemove(target); err != nil {
		return fmt.Errorf("unpublish volume %s: %w", id, err)
	}
	r, err := m.records.Load(id)
	switch {
	case errdefs.IsNotFound(err):
		return m.unrecorded.release(ctx, id, target)
	case errors.Is(err, record.ErrEmpty):
		if err := m.unrecorded.release(ctx, id, target); err != nil {
			return err
		}
		err := m.unrecorded.discard(ctx, id)
		if errors.Is(err, overlay.ErrUpperInUse) {
			// That is another pod's. Reconcile discards the volume after it.
			klog.FromContext(ctx).Error(err, "Unpublished; the record is empty", keyVolume, id)
			return nil
		}
		return err
	case errdefs.IsDataLoss(err):
		// kubelet asked for the unmount. A pod must not stay Terminating because of a damaged record; reconcile reports it.
		klog.FromContext(ctx).Error(err, "Unpublished; the record is damaged", keyVolume, id)
		return m.unrecorded.release(ctx, id, target)
	case linux.IsNotWritable(err):
		// The disk has failed.
		klog.FromContext(ctx).Error(err, "Unpublished; the data root cannot be read, reconcile will retry", keyVolume, id)
		return m.unrecorded.releasePodVolumes(ctx, id, target)
	case err != nil:
		return err
	}
	return m.dropPublication(ctx, r, target)
}

// dropPublication removes a publication whose view is not mounted from the record, and discards what was for that view only.
func (m *Manager) dropPublication(ctx context.Context, r *record.Record, target string) error {
	p := r.Publication(target)
	if p == nil {
		return nil
	}
	m.usage.forget(target)
	left := r.Without(target)
	last := len(left.Publications) == 0
	if hasUpper(r) && (!sharesUpper(r) || last) {
		if err := m.uppers.open(r, p).Release(ctx); err != nil {
			return err
		}
	}
	err := m.forgetPublication(r, left, target)
	if linux.IsNotWritable(err) {
		// The view is gone, and a pod must not stay Terminating because of the disk: often the end of pods makes room. The extra
		// publication does no harm until reconcile finds that its pod is gone.
		klog.FromContext(ctx).Error(err, "Unpublished; the data root cannot be written to, reconcile will retry", keyVolume, r.ID)
		return nil
	}
	return err
}

// forgetPublication discards what was for the view at a target only, and saves the record that is left.
func (m *Manager) forgetPublication(r, left *record.Record, target string) error {
	if len(left.Publications) == 0 && !r.Spec.Persistent() {
		return m.ledger.discard(r.ID)
	}
	if r.Spec.Ephemeral() {
		// Before the record: no other operation would find an upper without its publication.
		if err := m.config.Root.Discard(m.uppers.path(r, target)); err != nil {
			return err
		}
	}
	return m.ledger.save(left)
}
