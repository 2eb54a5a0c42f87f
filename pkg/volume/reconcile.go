package volume

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume/flatten"
)

const (
	// parallelReconciles is how many volumes are reconciled at the same time. Whether a view is mounted takes a second where the file
	// system of its layers does not answer, and many views may have layers of one server.
	parallelReconciles = 16
	// reconcilePatience is how long the other volumes wait for one.
	reconcilePatience = 10 * time.Second
)

// reconcile compares the records with the kernel's mounts and with kubelet's directory, and cleans up what no RPC will: a
// publish or unpublish that a crash or a reboot interrupted, and that kubelet does not repeat because the pod is gone. It never
// touches a mounted view. It skips a volume that an RPC is working on until the next time, and leaves one behind whose file system does
// not answer.
func (m *Manager) reconcile(ctx context.Context) {
	if err := m.config.Ballast.Fill(); err != nil {
		klog.FromContext(ctx).Error(err, "Could not reconcile the ballast")
	}
	if err := m.config.Backends.Thaw(); err != nil {
		klog.FromContext(ctx).Error(err, "Could not thaw the disk images")
	}
	ids, err := m.records.List()
	if err != nil {
		klog.FromContext(ctx).Error(err, "Could not reconcile")
		return
	}
	if err := m.ledger.keep(ids); err != nil {
		klog.FromContext(ctx).Error(err, "Could not read what is reserved on the disk")
	}
	var group errgroup.Group
	group.SetLimit(parallelReconciles)
	for _, id := range ids {
		group.Go(func() error {
			if ctx.Err() == nil {
				m.reconcileInTime(ctx, id)
			}
			return nil
		})
	}
	_ = group.Wait()
	if err := m.sweep(ctx); err != nil {
		klog.FromContext(ctx).Error(err, "Could not discard frozen uppers, will retry")
	}
}

// reconcileInTime reconciles a volume, and waits at most reconcilePatience for that.
func (m *Manager) reconcileInTime(ctx context.Context, id string) {
	unlock, ok := m.locks.TryAcquire(id)
	if !ok {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer unlock()
		if err := m.reconcileVolume(ctx, id); err != nil {
			klog.FromContext(ctx).Error(err, "Could not reconcile a volume, will retry", keyVolume, id)
		}
	}()
	select {
	case <-done:
	case <-time.After(reconcilePatience):
		// It keeps the volume's lock until the file system answers, and is not waited for again.
		klog.FromContext(ctx).Info("A file system of a volume does not answer; reconcile goes on with the others", keyVolume, id)
	}
}

func (m *Manager) reconcileVolume(ctx context.Context, id string) error {
	r, err := m.records.Load(id)
	switch {
	case errdefs.IsNotFound(err):
		return m.discardWithoutRecord(ctx, id)
	case errors.Is(err, record.ErrEmpty):
		return m.unrecorded.discard(ctx, id)
	case err != nil:
		return err
	}
	// A person may have restored it.
	m.ledger.set(r)
	if err := m.finishFreezing(r); err != nil {
		return err
	}
	var failed error
	for _, p := range r.Publications {
		failed = errors.Join(failed, m.reconcilePublication(ctx, r, p))
	}
	if failed != nil {
		return failed
	}
	if len(r.Publications) == 0 && !r.Spec.Persistent() {
		return m.unrecorded.discard(ctx, id)
	}
	return nil
}

// discardWithoutRecord discards a directory that a crash left before the volume had a record. An upper is made only after the
// record is saved: if there is one, somebody lost the record, and a person has to decide. Uppers of pods are ephemeral, whose records are
// not synced: after a power cut, btrfs may have the upper alone. It stays while a view is mounted on it.
func (m *Manager) discardWithoutRecord(ctx context.Context, id string) error {
	dir := m.records.Dir(id)
	isOfPods := m.records.IsEphemeral(id) && (kubelet.IsInlineHandle(id) || !upper.ContainsUpper(dir))
	if record.ContainsUppers(dir) && !isOfPods {
		klog.FromContext(ctx).Info("Upper without a record; move it away or restore "+dataroot.Record, keyDir, dir)
		return nil
	}
	return m.unrecorded.discard(ctx, id)
}

func (m *Manager) reconcilePublication(ctx context.Context, r *record.Record, p record.Publication) error {
	live, err := m.views.isLive(&p)
	switch {
	case err != nil:
		return err
	case live && hasUpper(r):
		return m.uppers.open(r, &p).Hold()
	case live:
		return nil
	}
	id := r.ID
	// The publication before this one may have been dropped.
	r, err = m.records.Load(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	// By the target: a pod whose target is not in kubelet's directory cannot be found there.
	if m.config.Pods.PodGone(m.config.Pods.PodUID(p.Target)) {
		klog.FromContext(ctx).Info("Cleaning up after a pod that is gone", keyVolume, id, keyPod, p.Pod, keyTarget, p.Target)
		return m.dropPublication(ctx, r, p.Target)
	}
	if !hasUpper(r) {
		return nil
	}
	// kubelet may be waiting to unmount the volume that has the upper. The next publish prepares it again.
	return m.uppers.open(r, &p).Yield()
}

// flattenAll merges frozen uppers of lists that are too long, one run after the other, and looks for new ones from time to time. It
// returns when ctx is done.
func (s *snapshots) flattenAll(ctx context.Context, interval time.Duration) {
	// The thread ends with the goroutine: it keeps its priority.
	runtime.LockOSThread()
	if err := errors.Join(linux.Setpriority(lowestPriority), linux.SetIdleIO()); err != nil {
		klog.FromContext(ctx).Error(err, "Could not lower the priority of merging frozen uppers")
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	failed := map[string]bool{}
	for ctx.Err() == nil {
		if s.flatten(ctx, failed) {
			continue
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
}

// lowestPriority is the niceness of what is done when there is nothing else to do.
const lowestPriority = 19

// flatten merges one run of frozen uppers. It reports whether there may be more to do. failed has the runs that could not be merged, and
// are not tried again before the driver starts again.
func (s *snapshots) flatten(ctx context.Context, failed map[string]bool) bool {
	logger := klog.FromContext(ctx)
	lists, run, unpin, err := s.plan(failed)
	if err != nil {
		logger.Error(err, "Could not look for frozen uppers to merge, will retry")
		return false
	}
	defer unpin()
	if run == nil {
		return false
	}
	merged := newMerged(run)
	// The sweep would discard it before it is complete, and a record lists it.
	defer s.pins.Pin(merged.ID)()
	err = s.merge(ctx, lists, run, merged)
	switch {
	case ctx.Err() != nil:
		return false
	case errdefs.IsResourceExhausted(err) || linux.IsNotWritable(err):
		logger.Info("Frozen uppers are not merged now", keyReason, err.Error())
		return false
	case err != nil:
		failed[runKey(run)] = true
		logger.Error(err, "Could not merge frozen uppers")
		return true
	}
	replaced := 0
	for _, list := range lists {
		if list.IsMounted || !flatten.Has(list.Frozen, run) {
			continue
		}
		isDone, err := s.replace(ctx, list, run, merged)
		if err != nil {
			logger.Error(err, "Could not replace merged frozen uppers, will retry", keyVolume, list.Volume, keySnapshot, list.Snapshot)
		}
		if isDone || err != nil {
			// After an error the disk may have the record. The sweep finds out.
			replaced++
		}
	}
	logger.Info("Frozen uppers merged", keyFrozen, merged.ID, keyCount, len(run), keyReplaced, replaced)
	if replaced == 0 {
		return false
	}
	return ctx.Err() == nil
}

// plan returns the lists of frozen uppers of all records, and a run of them to merge, nil if there is none. The run is not discarded until
// unpin is called.
func (s *snapshots) plan(failed map[string]bool) (lists []flatten.List, run []record.Frozen, unpin func(), err error) {
	s.listing.RLock()
	defer s.listing.RUnlock()
	if lists, err = s.lists(); err != nil {
		return nil, nil, nil, err
	}
	run = flatten.Plan(lists, func(run []record.Frozen) bool { return failed[runKey(run)] })
	return lists, run, s.pins.Pin(idsOf(run)...), nil
}

// runKey names a run of frozen uppers: there is one with these ends.
func runKey(run []record.Frozen) string { return run[0].ID + run[len(run)-1].ID }

// lists returns the lists of frozen uppers of all records.
func (s *snapshots) lists() ([]flatten.List, error) {
	var lists []flatten.List
	ids, err := s.volumes.List()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		// Reconcile reports a record that cannot be read.
		if r, err := s.volumes.Load(id); err == nil && len(r.Frozen) > 0 {
			// The first of an upper that is being frozen is not there yet.
			lists = append(lists, flatten.List{Volume: id, Frozen: r.Frozen, IsMounted: len(r.Publications) > 0 || r.Freezing})
		}
	}
	if ids, err = s.records.List(); err != nil {
		return nil, err
	}
	for _, id := range ids {
		if made, err := s.records.Load(id); err == nil {
			lists = append(lists, flatten.List{Snapshot: id, Frozen: made.Frozen})
		}
	}
	return lists, nil
}

// newMerged returns the frozen upper that a run becomes.
func newMerged(run []record.Frozen) record.Frozen {
	merged := record.Frozen{ID: upper.NewFrozenID(), Backend: run[0].Backend, Group: run[0].Group}
	for _, frozen := range run {
		merged.Metacopy = merged.Metacopy || frozen.Metacopy
	}
	return merged
}

// merge merges a run of frozen uppers into a new one.
func (s *snapshots) merge(ctx context.Context, lists []flatten.List, run []record.Frozen, merged record.Frozen) error {
	ids := idsOf(run)
	// As much as a copy takes: not every file system takes links.
	bytes, inodes, err := s.uppers.backends.MeasureFrozen(ctx, merged.Backend, ids)
	if err != nil {
		return err
	}
	release, err := s.reserveMerged(ctx, bytes, inodes)
	if err != nil {
		return err
	}
	defer release()
	if err := s.uppers.backends.MergeFrozen(ctx, merged.Backend, ids, merged.ID, isMounted(lists, run)); err != nil {
		return errors.Join(err, s.uppers.backends.DiscardFrozen(merged.ID))
	}
	return nil
}

// reserveMerged reserves what a copy of frozen uppers takes, until release is called.
func (s *snapshots) reserveMerged(ctx context.Context, bytes, inodes int64) (release func(), err error) {
	usage, err := linux.FileSystemUsageAt(s.root.Path())
	if err != nil {
		return nil, err
	}
	// btrfs has no limit, and says 0.
	if usage.Inodes.Total > 0 && usage.Inodes.Available < inodes {
		return nil, fmt.Errorf("%w: merging frozen uppers takes up to %d inodes, and %d are free",
			errdefs.ErrResourceExhausted, inodes, usage.Inodes.Available)
	}
	if release, err = s.ledger.reserveFrozen(ctx, bytes); err != nil {
		return nil, fmt.Errorf("merge frozen uppers: %w", err)
	}
	return release, nil
}

// isMounted reports whether a view may have one of these frozen uppers.
func isMounted(lists []flatten.List, run []record.Frozen) bool {
	return slices.ContainsFunc(lists, func(l flatten.List) bool { return l.IsMounted && flatten.Shares(l.Frozen, run) })
}

// replace puts the merged frozen upper into the record of a volume or snapshot in place of a run. It reports false if the list has changed,
// or is that of a volume that is mounted now: the lowers of a view stay in its record, so that nobody discards them.
func (s *snapshots) replace(ctx context.Context, list flatten.List, run []record.Frozen, merged record.Frozen) (bool, error) {
	lock := list.Volume
	if lock == "" {
		lock = snapshotLock(list.Snapshot)
	}
	unlock, err := s.locks.Acquire(ctx, lock)
	if err != nil {
		return false, err
	}
	defer unlock()
	if list.Snapshot != "" {
		made, err := s.records.Load(list.Snapshot)
		if errdefs.IsNotFound(err) || err == nil && !flatten.Has(made.Frozen, run) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		made.Frozen = flatten.Replaced(made.Frozen, run, merged)
		return true, s.records.Save(made)
	}
	r, err := s.volumes.Load(list.Volume)
	if errdefs.IsNotFound(err) || err == nil && (len(r.Publications) > 0 || !flatten.Has(r.Frozen, run)) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := s.finishFreezing(r); err != nil {
		return false, err
	}
	if r.Backend != "" {
		if err := s.checkFree(s.uppers.open(r, nil)); err != nil {
			return false, err
		}
	}
	r.Frozen = flatten.Replaced(r.Frozen, run, merged)
	return true, s.ledger.saveDurably(r)
}
