package volume

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// chooseKind chooses how a volume's uppers are kept on this node. Where its size cannot be kept to, the error says why;
// where it is more than the node may ever promise, it is of the kind ResourceExhausted.
func (m *Manager) chooseKind(r *record) (upper.Backend, error) {
	if r.Spec.Upper == spec.UpperPodVolume {
		return upper.PodVolume, nil
	}
	if exists(filepath.Join(m.states.volumeDir(r.ID), "upper")) {
		// Of a driver that knew no other kind.
		return upper.Directory, nil
	}
	want := upper.Requirements{Bytes: r.Size, Unenforced: r.Spec.SizeEnforcement == spec.EnforceNone}
	switch {
	case r.Spec.Medium == spec.MediumMemory:
		want.Backend = upper.Tmpfs
	case r.Spec.SizeEnforcement == spec.EnforceImage:
		want.Backend = upper.DiskImage
	case r.Spec.SizeEnforcement == spec.EnforceQuota:
		want.Backend = upper.ProjectQuota
	}
	disk, err := linux.FileSystemUsageAt(m.root.Path())
	if err != nil {
		return "", err
	}
	if most := m.promisable(disk.Bytes.Total); want.Backend != upper.Tmpfs && !want.Unenforced && r.Size > most {
		return "", fmt.Errorf("%w: a size of %d bytes is asked for, and node %s has a disk of %d for volumes", errdefs.ErrResourceExhausted, r.Size, m.config.Node, most)
	}
	return m.uppers.Choose(want)
}

// promisable is what may be promised of that many bytes.
func (m *Manager) promisable(bytes int64) int64 { return int64(float64(bytes) * m.config.Overcommit) }

// Capacity is how many bytes can still be promised to new volumes of this node: what is free and what limited volumes
// take already, as many times as the operator lets it be promised, less what is promised.
func (m *Manager) Capacity(ctx context.Context) (int64, error) {
	disk, err := linux.FileSystemUsageAt(m.root.Path())
	if err != nil {
		return 0, err
	}
	ids, err := m.states.ids()
	if err != nil {
		return 0, err
	}
	var promised, taken int64
	for _, id := range ids {
		r, err := m.states.load(id)
		if err != nil || r == nil {
			// Reconcile reports it. What it takes is not free.
			continue
		}
		promisedHere, takenHere := m.promisedTo(ctx, r)
		promised += promisedHere
		taken += takenHere
	}
	return max(m.promisable(disk.Bytes.Available+taken)-promised, 0), nil
}

// promisedTo is what a volume was promised of the disk, and what it has taken of that.
func (m *Manager) promisedTo(ctx context.Context, r *record) (promised, taken int64) {
	if r.Size == 0 || r.Spec.SizeEnforcement == spec.EnforceNone || r.Kept == upper.Tmpfs || !r.Spec.ManagesUpper() {
		return 0, 0
	}
	targets := []string{""}
	if r.Spec.Upper == spec.UpperPod {
		targets = nil
		for _, p := range r.Publications {
			targets = append(targets, p.Target)
		}
	}
	for _, target := range targets {
		promised += r.Size
		if !upper.ContainsUpper(filepath.Join(m.root.Path(), m.baseDir(r, target))) {
			continue
		}
		bytes, err := m.openUpper(r, r.publication(target)).DiskUsage(ctx)
		if err != nil {
			klog.FromContext(ctx).V(4).Info("What a volume takes is not known", "volume", r.ID, "reason", err.Error())
			continue
		}
		taken += min(bytes, r.Size)
	}
	return promised, taken
}

// promise writes the state of a volume down that wants so many bytes more than it was promised before, where the node has
// them.
func (m *Manager) promise(ctx context.Context, r *record, more int64) error {
	m.promises.Lock()
	defer m.promises.Unlock()
	if r.Spec.SizeEnforcement != spec.EnforceNone && r.Kept != upper.Tmpfs {
		left, err := m.Capacity(ctx)
		if err != nil {
			return err
		}
		if more > left {
			return fmt.Errorf("%w: %d bytes are asked for, and node %s can promise %d more", errdefs.ErrResourceExhausted, more, m.config.Node, left)
		}
	}
	return m.states.save(r)
}

// Expand makes the limit of the volume that is published at path larger, while pods write to it, and returns what it is
// then. Asked again it does what is missing. It is of the kind OutOfRange where the volume is larger than limit already, and
// InvalidArgument where the size is not the driver's to change.
func (m *Manager) Expand(ctx context.Context, id, path string, required, limit int64) (int64, error) {
	unlock, err := m.locks.acquire(ctx, id)
	if err != nil {
		return 0, err
	}
	defer unlock()
	r, p, err := m.published(id, path)
	if err != nil {
		return 0, err
	}
	if live, err := m.isLive(p); err != nil {
		return 0, err
	} else if !live {
		return 0, fmt.Errorf("%w: volume %s is not mounted at %s: it is expanded when it is", errdefs.ErrFailedPrecondition, id, path)
	}
	size := max(required, r.Size)
	switch {
	case r.Spec.Upper == spec.UpperPodVolume:
		return 0, fmt.Errorf("%w: volume %s has its upper in another volume: make that one larger", errdefs.ErrInvalidArgument, id)
	case limit > 0 && size > limit:
		return 0, fmt.Errorf("%w: volume %s has %d bytes, and is to have at most %d: a volume does not become smaller", errdefs.ErrOutOfRange, id, size, limit)
	case !r.Spec.ManagesUpper() || r.Size == 0:
		return size, nil
	}
	grown := *r
	grown.Size = size
	if r.Spec.SizeEnforcement != spec.EnforceNone {
		if err := m.grow(ctx, &grown, size-r.Size); err != nil {
			return 0, fmt.Errorf("expand volume %s: %w", id, err)
		}
	}
	// After the limit: where a crash comes between, kubelet asks again.
	if err := m.states.save(&grown); err != nil {
		return 0, err
	}
	klog.FromContext(ctx).Info("Expanded a volume", "volume", id, "bytes", size)
	return size, nil
}

// grow sets the limits of the volume's uppers on this node, if the node can promise so much more to each.
func (m *Manager) grow(ctx context.Context, r *record, more int64) error {
	m.promises.Lock()
	defer m.promises.Unlock()
	targets, err := m.targetsInUse(r)
	if err != nil {
		return err
	}
	if wanted := more * int64(len(targets)); wanted > 0 && r.Kept != upper.Tmpfs {
		left, err := m.Capacity(ctx)
		if err != nil {
			return err
		}
		if wanted > left {
			return fmt.Errorf("%w: %d bytes more are asked for, and node %s can promise %d", errdefs.ErrResourceExhausted, wanted, m.config.Node, left)
		}
	}
	for _, target := range targets {
		if err := m.openUpper(r, r.publication(target)).Grow(ctx, r.limit()); err != nil {
			return err
		}
	}
	return nil
}

// targetsInUse is one target of each upper of the volume that is mounted.
func (m *Manager) targetsInUse(r *record) ([]string, error) {
	byBase := map[string]string{}
	for _, p := range r.Publications {
		live, err := m.isLive(&p)
		if err != nil {
			return nil, err
		}
		if live {
			byBase[m.baseDir(r, p.Target)] = p.Target
		}
	}
	return slices.Sorted(maps.Values(byBase)), nil
}
