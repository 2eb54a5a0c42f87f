package volume

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Unpublish unmounts what is mounted at the target of the request, and removes the target directory. The rest goes by the
// record: it discards an ephemeral upper, and releases a persistent one, which stays. It returns nil if there is nothing to do.
// Where the record is damaged or missing, it releases what it finds of the view, and leaves what is in the data root for a person.
func (m *Manager) Unpublish(ctx context.Context, id, target string) error {
	unlock, err := m.locks.Acquire(ctx, id)
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
	if err := m.commit(ctx, r, p); err != nil {
		return err
	}
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

const (
	// phaseWait is how long an unpublish waits until the API server knows how the pod ended: kubelet writes that at about the time at which
	// it unmounts volumes.
	phaseWait = 10 * time.Second
	// phaseInterval is the time between two questions.
	phaseInterval = 200 * time.Millisecond
	// measureWait is how long an unpublish counts what is to be committed.
	measureWait = 30 * time.Second
)

// commit makes the upper of a volume with commit, whose view is not mounted any more, the newest version of its cache if its pod has
// succeeded. It only logs what fails: the pod must be able to end, and its upper is discarded then. It returns an error if ctx was
// canceled: kubelet or the driver was stopped, and the next unpublish goes on.
func (m *Manager) commit(ctx context.Context, r *record.Record, p *record.Publication) error {
	if r.Spec.Commit == "" {
		return nil
	}
	key := record.CacheKey{Namespace: p.Pod.Namespace, Name: r.Spec.Commit}
	err := m.tryCommit(ctx, key, r, p)
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("commit volume %s to cache %s: %w: %w", r.ID, key, ctx.Err(), err)
	}
	if err != nil {
		klog.FromContext(ctx).Info("Not committed", keyCache, key, keyVolume, r.ID, keyPod, p.Pod, keyReason, err.Error())
	}
	return nil
}

// tryCommit is commit with its error. The record says which version of the cache the upper becomes before it is one, so that after a crash
// the next call finishes what was left undone.
func (m *Manager) tryCommit(ctx context.Context, key record.CacheKey, r *record.Record, p *record.Publication) error {
	if p.BootID != m.config.BootID {
		return fmt.Errorf("%w: the node was restarted while the pod wrote, and what it wrote was not synced", errdefs.ErrDataLoss)
	}
	// Of the cache that has the name of the commit, if it is the first layer. The others below it are layers.
	below := r.Caches[key.Name]
	if r.Committing != nil {
		defer m.caches.Lock()()
		return m.finishCommit(ctx, key, r, p, below)
	}
	if err := waitSucceeded(ctx, m.config.PodPhases, p.Pod); err != nil {
		return err
	}
	m.listing.RLock()
	defer m.listing.RUnlock()
	version, err := m.prepareCommit(ctx, r, p)
	if err != nil {
		return err
	}
	generation, unlock, err := m.caches.Next(key, version.Bytes, below)
	if err != nil {
		return err
	}
	defer unlock()
	changed := *r
	changed.Committing = &record.Committing{CacheVersion: version, Generation: generation}
	if err := m.ledger.save(&changed); err != nil {
		return err
	}
	*r = changed
	return m.finishCommit(ctx, key, r, p, below)
}

// prepareCommit releases an upper, and returns the version of a cache that it can become.
func (m *Manager) prepareCommit(ctx context.Context, r *record.Record, p *record.Publication) (record.CacheVersion, error) {
	u := m.uppers.open(r, p)
	if err := m.checkFree(u); err != nil {
		return record.CacheVersion{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, measureWait)
	defer cancel()
	bytes, err := u.DiskUsage(ctx)
	if err != nil {
		return record.CacheVersion{}, fmt.Errorf("measure the upper: %w", err)
	}
	frozen := record.Frozen{ID: upper.NewFrozenID(), Backend: r.Backend}
	if p.Group != nil {
		frozen.Group = newGroup(*p.Group)
	}
	return record.CacheVersion{Frozen: frozen, Bytes: bytes}, m.uppers.backends.PrepareFreeze(ctx, m.uppers.location(r, p), frozen.ID)
}

// finishCommit freezes the upper of a volume whose record says which version of a cache it becomes.
func (m *Manager) finishCommit(
	ctx context.Context, key record.CacheKey, r *record.Record, p *record.Publication, below []record.CacheVersion,
) error {
	if err := m.uppers.backends.Freeze(m.uppers.location(r, p), r.Committing.ID); err != nil {
		return err
	}
	return m.caches.Put(ctx, key, *r.Committing, below)
}

// waitSucceeded returns nil once the API server says that a pod has succeeded, and an error if it has not. It waits for phaseWait while the
// pod has no final phase, or the API server does not answer.
func waitSucceeded(ctx context.Context, phases podPhases, pod kubelet.Pod) error {
	ctx, cancel := context.WithTimeout(ctx, phaseWait)
	defer cancel()
	for {
		phase, err := phases.PodPhase(ctx, pod)
		switch {
		case phase == corev1.PodSucceeded:
			return nil
		case phase == corev1.PodFailed:
			return fmt.Errorf("%w: the pod has failed", errdefs.ErrFailedPrecondition)
		case errdefs.IsNotFound(err), errdefs.IsFailedPrecondition(err):
			return err
		}
		select {
		case <-ctx.Done():
			if err != nil {
				return fmt.Errorf("find out whether the pod has succeeded: %w", err)
			}
			return fmt.Errorf("%w: the pod has not succeeded; its phase is %s", errdefs.ErrFailedPrecondition, phase)
		case <-time.After(phaseInterval):
		}
	}
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
