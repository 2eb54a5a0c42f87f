package volume

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/semaphore"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// ledger reserves the disk of the data root for volumes. What is reserved stands in the records: the ledger stores nothing on the
// disk.
type ledger struct {
	*reservations
	node       string
	overcommit float64
	// turn lets one volume at a time compare what is left with what it needs, and reserve it.
	turn *semaphore.Weighted
}

func newLedger(config Config, uppers uppers) *ledger {
	return &ledger{
		reservations: newReservations(config, uppers), node: config.Node, overcommit: config.Overcommit, turn: semaphore.NewWeighted(1),
	}
}

// Capacity returns how many bytes can be reserved for new volumes of this node: what is free and what limited volumes already
// take, times the overcommit, less what is reserved. Where there are many volumes, it may be what it was some time ago.
func (m *Manager) Capacity(ctx context.Context) (int64, error) {
	return m.ledger.left(ctx, m.ledger.recent)
}

// Reserved returns how many bytes of the disk are reserved for volumes, 0 before the records have been read.
func (m *Manager) Reserved() int64 {
	m.ledger.mu.Lock()
	defer m.ledger.mu.Unlock()
	return m.ledger.reservedNow()
}

// left returns how many bytes can be reserved, by a look at the disk.
func (l *ledger) left(ctx context.Context, look func(context.Context) (disk, error)) (int64, error) {
	found, err := look(ctx)
	if err != nil {
		return 0, err
	}
	return max(l.allocatable(found.usable)-found.reserved, 0), nil
}

// allocatable returns how much of a number of bytes may be reserved.
func (l *ledger) allocatable(bytes int64) int64 { return int64(float64(bytes) * l.overcommit) }

// reserves reports whether the size of a volume counts against the disk.
func reserves(r *record.Record) bool {
	return r.Spec.SizeEnforcement != spec.EnforceNone && r.Backend != upper.Tmpfs
}

// choose chooses the backend for a volume's uppers. It returns ErrFailedPrecondition if the node cannot enforce the size, and
// ErrResourceExhausted if the size is larger than the node can ever reserve.
func (l *ledger) choose(r *record.Record) (upper.Backend, error) {
	need := upper.Requirements{Bytes: r.Size, Unenforced: r.Spec.SizeEnforcement == spec.EnforceNone}
	switch {
	case r.Spec.Upper == spec.UpperPodVolume:
		return upper.PodVolume, nil
	case r.Spec.Medium == spec.MediumMemory:
		need.Accepted = []upper.Backend{upper.Tmpfs}
	case r.Spec.SizeEnforcement == spec.EnforceImage:
		need.Accepted = []upper.Backend{upper.DiskImage}
	case r.Spec.SizeEnforcement == spec.EnforceQuota:
		need.Accepted = []upper.Backend{upper.ProjectQuota, upper.BtrfsQgroup}
	}
	disk, err := linux.FileSystemUsageAt(l.root.Path())
	if err != nil {
		return "", err
	}
	if most := l.allocatable(disk.Bytes.Total); r.Spec.Medium != spec.MediumMemory && !need.Unenforced && r.Size > most {
		return "", fmt.Errorf("%w: the size is %d bytes, and the disk of node %s has %d for volumes",
			errdefs.ErrResourceExhausted, r.Size, l.node, most)
	}
	return l.uppers.backends.Choose(need)
}

// reserve saves the record of a new volume with one upper, if the node has room for it. Others do not wait until the record is on the
// disk.
func (l *ledger) reserve(ctx context.Context, r *record.Record) error {
	if reserves(r) {
		release, err := l.reserveMore(ctx, r, r.Size)
		if err != nil {
			return err
		}
		defer release()
	}
	return l.save(r)
}

// grow raises the limits of a volume's mounted uppers to that of its record, if the node has room for more bytes for each of them.
// The bytes are reserved until release is called, after the record says so. Other volumes do not wait while the uppers grow, which
// can take long.
func (l *ledger) grow(ctx context.Context, r *record.Record, more int64, used []*record.Publication) (release func(), err error) {
	if r.Spec.SizeEnforcement == spec.EnforceNone {
		return func() {}, nil
	}
	release, err = l.reserveMore(ctx, r, more*int64(len(used)))
	if err != nil {
		return nil, err
	}
	for _, p := range used {
		if err := l.uppers.open(r, p).Grow(ctx, r.Limit()); err != nil {
			release()
			return nil, err
		}
	}
	return release, nil
}

// reserveMore reserves bytes for a volume that is made or grows, until release is called.
func (l *ledger) reserveMore(ctx context.Context, r *record.Record, bytes int64) (release func(), err error) {
	if bytes == 0 || !reserves(r) {
		return func() {}, nil
	}
	return l.take(ctx, bytes, func() func() { return l.growTo(r.ID, r.Size) })
}

// reserveFrozen reserves bytes for a frozen upper that is made, until release is called, after it is on the disk.
func (l *ledger) reserveFrozen(ctx context.Context, bytes int64) (release func(), err error) {
	return l.take(ctx, bytes, func() func() { return l.hold(bytes) })
}

// take has reserve reserve bytes if the node has room for them.
func (l *ledger) take(ctx context.Context, bytes int64, reserve func() func()) (release func(), err error) {
	if err := l.turn.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	defer l.turn.Release(1)
	if err := l.check(ctx, bytes); err != nil {
		return nil, err
	}
	return reserve(), nil
}

// check returns ErrResourceExhausted if more bytes are wanted than are left. It measures what uppers take, which the more of them there
// are takes the longer, only if it matters.
func (l *ledger) check(ctx context.Context, wanted int64) error {
	left, err := l.left(ctx, l.unmeasured)
	if err == nil && wanted > left {
		left, err = l.left(ctx, l.measured)
	}
	if err != nil {
		return err
	}
	if wanted > left {
		return fmt.Errorf("%w: %d bytes are requested, and node %s can reserve %d", errdefs.ErrResourceExhausted, wanted, l.node, left)
	}
	return nil
}

// Expand raises the limit of the volume that is published at path, while pods write to it, and returns the new limit. A repeated
// call does what is missing. Expand returns ErrOutOfRange if the volume is larger than limit, and ErrInvalidArgument if its size is
// not the driver's to change.
func (m *Manager) Expand(ctx context.Context, id, path string, required, limit int64) (int64, error) {
	unlock, err := m.locks.Acquire(ctx, id)
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
