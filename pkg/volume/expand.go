package volume

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// Expand raises the limit of the volume that is published at path, while pods write to it, and returns the new limit. A repeated
// call does what is missing. Expand returns ErrOutOfRange if the volume is larger than limit, and ErrInvalidArgument if its size is
// not the driver's to change.
func (m *Manager) Expand(ctx context.Context, id, path string, required, limit int64) (int64, error) {
	unlock, err := m.locks.acquire(ctx, id)
	if err != nil {
		return 0, err
	}
	defer unlock()
	r, p, err := published(m.records, id, path)
	if err != nil {
		return 0, err
	}
	live, err := m.views.isLive(p)
	if err != nil {
		return 0, err
	}
	size := max(required, r.Size)
	switch {
	case !live:
		return 0, fmt.Errorf("%w: volume %s is not mounted at %s, and is expanded while it is mounted", errdefs.ErrFailedPrecondition, id, path)
	case r.Spec.Upper == spec.UpperPodVolume:
		return 0, fmt.Errorf("%w: the upper of volume %s is in another volume; expand that one", errdefs.ErrInvalidArgument, id)
	case limit > 0 && r.Size == 0 && r.Spec.ManagesUpper():
		return 0, fmt.Errorf("%w: volume %s has no size and cannot be limited to %d bytes", errdefs.ErrOutOfRange, id, limit)
	case limit > 0 && size > limit:
		return 0, fmt.Errorf("%w: volume %s has %d bytes and cannot shrink to %d", errdefs.ErrOutOfRange, id, size, limit)
	case !r.Spec.ManagesUpper() || r.Size == 0:
		return size, nil
	}
	grown := *r
	grown.Size = size
	used, err := mountedUppers(r, m.views, m.uppers)
	if err != nil {
		return 0, fmt.Errorf("expand volume %s: %w", id, err)
	}
	release, err := m.ledger.grow(ctx, &grown, size-r.Size, used)
	if err != nil {
		return 0, fmt.Errorf("expand volume %s: %w", id, err)
	}
	defer release()
	// After the limit: if a crash comes between, kubelet repeats the call.
	if err := m.ledger.save(&grown); err != nil {
		return 0, err
	}
	klog.FromContext(ctx).Info("Volume expanded", keyVolume, id, keyBytes, size)
	return size, nil
}

// mountedUppers returns one publication for each upper of the volume that is mounted.
func mountedUppers(r *record.Record, views views, uppers uppers) ([]*record.Publication, error) {
	var used []*record.Publication
	seen := map[string]bool{}
	for i := range r.Publications {
		p := &r.Publications[i]
		live, err := views.isLive(p)
		if err != nil {
			return nil, err
		}
		if base := uppers.base(r, p.Target); live && !seen[base] {
			seen[base] = true
			used = append(used, p)
		}
	}
	return used, nil
}
