package volume

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/record"
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
	unlock, ok := m.locks.tryAcquire(id)
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
// record is saved: if there is one, somebody lost the record, and a person has to decide.
func (m *Manager) discardWithoutRecord(ctx context.Context, id string) error {
	dir := m.records.Dir(id)
	if record.ContainsUppers(dir) {
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
