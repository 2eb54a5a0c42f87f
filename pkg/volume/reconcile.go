package volume

import (
	"context"
	"errors"

	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// reconcile compares the state with the kernel and with kubelet's directory, and cleans up what no RPC will: publishes
// and unpublishes that a crash or a reboot cut off and that kubelet does not ask for again, because their pods are
// gone. A live view is never touched. A volume that an RPC is working on is passed over, and seen the next time.
func (m *Manager) reconcile(ctx context.Context) {
	ids, err := m.states.ids()
	if err != nil {
		klog.FromContext(ctx).Error(err, "Could not reconcile")
		return
	}
	for _, id := range ids {
		if ctx.Err() != nil {
			return
		}
		unlock, ok := m.locks.tryAcquire(id)
		if !ok {
			continue
		}
		err := m.reconcileVolume(ctx, id)
		unlock()
		if err != nil {
			klog.FromContext(ctx).Error(err, "Could not reconcile a volume; it is tried again", "volume", id)
		}
	}
}

func (m *Manager) reconcileVolume(ctx context.Context, id string) error {
	r, err := m.states.load(id)
	if errors.Is(err, errTorn) {
		return m.trash.put(m.states.volumeDir(id))
	}
	if err != nil {
		return err
	}
	if r == nil {
		return m.discardStateless(ctx, id)
	}
	for _, p := range r.Publications {
		if err := m.reconcilePublication(ctx, id, p); err != nil {
			return err
		}
	}
	if len(r.Publications) == 0 && !r.keepsUpper() {
		return m.trash.put(m.states.volumeDir(id))
	}
	return nil
}

// discardStateless drops a directory that a crash left before the volume had a state. An upper is only made once there
// is a state: where there is one, somebody lost the state, and a person must look.
func (m *Manager) discardStateless(ctx context.Context, id string) error {
	dir := m.states.volumeDir(id)
	if upper.ContainsUpper(dir) || exists(dir+"/"+podUppersName) {
		klog.FromContext(ctx).Info("An upper has no state: it is left alone; move it away or restore its "+stateName, "directory", dir)
		return nil
	}
	return m.trash.put(dir)
}

func (m *Manager) reconcilePublication(ctx context.Context, id string, p publication) error {
	live, err := m.isLive(&p)
	if err != nil || live {
		return err
	}
	r, err := m.states.load(id)
	if err != nil || r == nil {
		return err
	}
	// By the target: a pod whose target is not in kubelet's directory cannot be looked up there.
	if m.pods.PodGone(m.pods.PodUID(p.Target)) {
		klog.FromContext(ctx).Info("Cleaning up after a pod that is gone", "volume", id, "pod", p.Pod, "target", p.Target)
		return m.forget(ctx, r, p.Target)
	}
	if r.Spec.Upper == spec.UpperNone {
		return nil
	}
	// kubelet may be waiting to unmount the volume that holds the upper. The next publish prepares it again.
	return m.openUpper(r, &p).Yield()
}
