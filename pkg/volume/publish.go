package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// PublishRequest asks for a view of a volume at a target path.
type PublishRequest struct {
	VolumeID string
	Target   string
	Spec     spec.Spec
	Inline   bool
	// Provisioned: CreateVolume made the volume. If its upper is to be kept it must be here.
	Provisioned bool
	Access      spec.AccessMode
	Attributes  overlay.Attributes
	Pod         kubelet.Pod
	// Group is the pod's fsGroup, nil where it has none.
	Group *uint32
	// Secrets have the credentials for registries.
	Secrets map[string]string
}

// step is what has been done of a publish, and how it is taken back.
type step struct {
	name string
	undo func() error
}

// Publish mounts the volume at the target. It answers at once where that is done already. Where it fails, or where
// ctx ends before the mount, everything is taken back; what a crash leaves is found in the state by the next Publish,
// Unpublish or reconcile.
//
// The order is fixed here and nowhere else: layers, target, state, upper, mount. The state comes before whatever it
// describes, the mount comes last.
func (m *Manager) Publish(ctx context.Context, req PublishRequest) (err error) {
	unlock, err := m.locks.acquire(ctx, req.VolumeID)
	if err != nil {
		return err
	}
	defer unlock()
	before, err := m.loadForPublish(req)
	if err != nil {
		return err
	}
	if done, err := m.admit(before, req); err != nil || done {
		return err
	}
	if err := m.unmountUnfinished(before, req); err != nil {
		return err
	}
	stack, err := m.layers.Resolve(ctx, req.Spec.Layers, layer.Request{Pod: req.Pod, Secrets: req.Secrets, Digests: before.pins()})
	if err != nil {
		return err
	}
	defer stack.Close()
	if len(stack.Dirs) > overlay.MaxLowers {
		return fmt.Errorf("%w: volume %s: its images have %d layers together: overlayfs takes at most %d", errdefs.ErrInvalidArgument, req.VolumeID, len(stack.Dirs), overlay.MaxLowers)
	}

	var steps []step
	defer func() {
		if err != nil {
			err = errors.Join(err, undo(ctx, steps))
		}
	}()
	target, made, err := openTarget(req.Target)
	if made {
		steps = append(steps, step{"make the target", func() error { return removeTarget(req.Target) }})
	}
	if err != nil {
		return err
	}
	defer target.Close()
	if mounted, err := m.mounter.At(req.Target); err != nil {
		return fmt.Errorf("look at target %s: %w", req.Target, err)
	} else if mounted != overlay.Nothing {
		return fmt.Errorf("%w: target path %s: something that is not this volume is mounted there: unmount it", errdefs.ErrFailedPrecondition, req.Target)
	}

	r, p, err := m.plan(ctx, before, req, stack)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("publish volume %s: %w", req.VolumeID, err)
	}
	if err := m.discardStale(ctx, before, r, p); err != nil {
		return err
	}
	steps = append(steps, step{"write the state", func() error { return m.restore(before, req.VolumeID) }})
	if err := m.states.save(r); err != nil {
		return err
	}
	return m.mountView(ctx, r, p, stack, target, &steps)
}

// loadForPublish reads the state. An ephemeral volume whose state a power cut tore begins anew; an upper that is to be
// kept and has no state is left alone, because nothing says what layers it was made on.
func (m *Manager) loadForPublish(req PublishRequest) (*record, error) {
	r, err := m.states.load(req.VolumeID)
	if r != nil || (err != nil && !errors.Is(err, errTorn)) {
		return r, err
	}
	dir := m.states.volumeDir(req.VolumeID)
	if !req.Inline && upper.ContainsUpper(dir) {
		return nil, fmt.Errorf("%w: volume %s: %s holds an upper without its state, so that its layers are not known: restore %s or move the directory away", errdefs.ErrDataLoss, req.VolumeID, dir, stateName)
	}
	if req.Spec.Upper == spec.UpperClaim && req.Provisioned {
		return nil, fmt.Errorf("%w: volume %s: node %s does not have it: its upper was made here or elsewhere and is lost: an empty one is not put in its place", errdefs.ErrNotFound, req.VolumeID, m.config.Node)
	}
	if !exists(dir) {
		return nil, nil
	}
	return nil, m.trash.put(dir)
}

// discardStale drops an ephemeral upper of an earlier boot: nothing of it was synced. It comes before the state that
// says that the upper is of this boot.
func (m *Manager) discardStale(ctx context.Context, before, r *record, p *publication) error {
	if before == nil || !r.Spec.Ephemeral() {
		return nil
	}
	if old := before.publication(p.Target); old != nil && old.BootID == p.BootID {
		return nil
	}
	if !upper.ContainsUpper(filepath.Join(m.root.Path(), m.baseDir(r, p.Target))) {
		return nil
	}
	return m.openUpper(r, p).Discard(ctx)
}

// admit compares the request with what the volume is on this node. done says that the volume is mounted at the target
// as asked.
func (m *Manager) admit(r *record, req PublishRequest) (done bool, err error) {
	if r == nil {
		return false, nil
	}
	if !r.Spec.Equal(req.Spec) || r.Inline != req.Inline {
		return false, fmt.Errorf("%w: volume %s is of layers %v with upper %q on this node, and is asked for with layers %v and upper %q: an upper stays on the layers that it was made on: use another volume",
			errdefs.ErrAlreadyExists, r.ID, r.Spec.LayerNames(), r.Spec.Upper, req.Spec.LayerNames(), req.Spec.Upper)
	}
	if p := r.publication(req.Target); p != nil {
		live, err := m.isLive(p)
		if err != nil {
			return false, err
		}
		if live {
			if p.Attributes != req.Attributes || p.Access != req.Access || !sameGroup(p.Group, req.Group) {
				return false, fmt.Errorf("%w: volume %s is published at %s with other mount options, another access mode or another group", errdefs.ErrAlreadyExists, r.ID, req.Target)
			}
			return r.isWalked(p)
		}
	}
	if req.Access != spec.ReadWriteOncePod && !req.Inline {
		return false, nil
	}
	for i := range r.Publications {
		other := &r.Publications[i]
		if other.Target == req.Target {
			continue
		}
		live, err := m.isLive(other)
		if err != nil {
			return false, err
		}
		if live {
			return false, fmt.Errorf("%w: volume %s is for one pod, and is published at %s for pod %s: it can be published again when that is unpublished", errdefs.ErrFailedPrecondition, r.ID, other.Target, other.Pod)
		}
	}
	return false, nil
}

// plan is the state in which the volume is going to be.
func (m *Manager) plan(ctx context.Context, before *record, req PublishRequest, stack *layer.ResolvedLayers) (*record, *publication, error) {
	r := before
	if r == nil {
		r = &record{ID: req.VolumeID, Spec: req.Spec, Inline: req.Inline, Size: req.Spec.Size}
	}
	pod := req.Pod
	if uid := m.pods.PodUID(req.Target); uid != "" {
		pod.UID = uid
	}
	p := publication{Target: req.Target, Pod: pod, Access: req.Access, Attributes: req.Attributes, Group: req.Group, BootID: m.config.BootID, LowerDirs: stack.Paths(), LowerMarks: stack.Fingerprints}
	if req.Spec.Upper == spec.UpperPodVolume {
		root, err := m.podVolumes.Root(ctx, *req.Spec.UpperRef, req.Pod)
		if err != nil {
			return nil, nil, err
		}
		root.Close()
		p.PodVolume = upper.PodVolumePath{Volume: root.Name(), Path: podVolumePath(*req.Spec.UpperRef)}
	}
	if len(stack.Digests) > 0 {
		klog.FromContext(ctx).Info("Layers resolved", "digests", stack.Digests)
	}
	r = r.with(p)
	r.Pins, r.Stored = stack.Digests, stack.Stored
	if r.Kept == "" && r.Spec.Upper != spec.UpperNone {
		kept, err := m.chooseKind(r)
		if err != nil {
			return nil, nil, fmt.Errorf("publish volume %s: %w", r.ID, err)
		}
		r.Kept = kept
	}
	return r, r.publication(req.Target), nil
}

// mountView prepares the upper and mounts the view at target.
func (m *Manager) mountView(ctx context.Context, r *record, p *publication, stack *layer.ResolvedLayers, target *os.File, steps *[]step) error {
	if shared, err := m.openShared(r, p); err != nil {
		return err
	} else if shared != nil {
		defer shared.Close()
		return m.mounter.Bind(shared, target, p.Attributes)
	}
	view := overlay.Spec{Lowers: stack.Dirs, LayerOwner: r.shownOwner(p), Metacopy: r.Spec.Ownership == spec.OwnershipChown, Attributes: p.Attributes}
	if r.Spec.Upper != spec.UpperNone {
		root, err := r.root(p, stack.Dirs[0])
		if err != nil {
			return err
		}
		dirs, err := m.prepareUpper(ctx, r, p, root, steps)
		if err != nil {
			return fmt.Errorf("publish volume %s: %w", r.ID, err)
		}
		defer dirs.Close()
		if dirs.Existed && p.Group != nil {
			if err := upper.SetGroup(dirs.Upper, *p.Group, groupDirMode); err != nil {
				return fmt.Errorf("publish volume %s: %w", r.ID, err)
			}
		}
		view.Upper, view.Work, view.Volatile = dirs.Upper, dirs.Work, r.Spec.Ephemeral()
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("publish volume %s: %w", r.ID, err)
	}
	if err := m.mounter.Overlay(view, target); err != nil {
		return fmt.Errorf("publish volume %s: %w", r.ID, err)
	}
	if err := r.walk(ctx, p); err != nil {
		return errors.Join(fmt.Errorf("publish volume %s: %w", r.ID, err), m.unmount(p.Target))
	}
	return nil
}

// openShared opens the root of the volume's view at another target, if there is one: pods that share an upper share
// the overlay on it. It is nil where there is none.
func (m *Manager) openShared(r *record, p *publication) (*os.File, error) {
	if r.Spec.Upper != spec.UpperClaim {
		return nil, nil
	}
	for i := range r.Publications {
		other := &r.Publications[i]
		if other.Target == p.Target {
			continue
		}
		live, err := m.isLive(other)
		if err != nil {
			return nil, err
		}
		if live && !sameGroup(other.Group, p.Group) {
			return nil, fmt.Errorf("%w: volume %s is published at %s for another fsGroup: pods that share an upper at the same time have the same one", errdefs.ErrFailedPrecondition, r.ID, other.Target)
		}
		if live {
			view, err := os.OpenFile(other.Target, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
			if err != nil {
				return nil, fmt.Errorf("open the view that is to be shared: %w", err)
			}
			return view, nil
		}
	}
	return nil, nil
}

// prepareUpper prepares the upper of a view, and checks that no other overlay is mounted on it.
func (m *Manager) prepareUpper(ctx context.Context, r *record, p *publication, root upper.RootAttr, steps *[]step) (dirs upper.Dirs, err error) {
	if r.Spec.Ephemeral() && !r.Inline {
		base := filepath.Join(m.root.Path(), m.baseDir(r, p.Target))
		if !exists(base) {
			*steps = append(*steps, step{"make the pod's upper", func() error { return m.trash.put(base) }})
		}
		if err := os.MkdirAll(base, 0o700); err != nil {
			return upper.Dirs{}, fmt.Errorf("make the directory of the pod's upper: %w", err)
		}
	}
	u := m.openUpper(r, p)
	if err := m.checkUpperThere(r, u); err != nil {
		return upper.Dirs{}, err
	}
	dirs, err = u.Prepare(ctx, root)
	if err != nil {
		return upper.Dirs{}, err
	}
	*steps = append(*steps, step{"prepare the upper", func() error { return u.Release(context.WithoutCancel(ctx)) }})
	defer func() {
		if err != nil {
			dirs.Close()
		}
	}()
	if r.keepsUpper() && !r.Made {
		r.Made = true
		if err := m.states.save(r); err != nil {
			return dirs, err
		}
	}
	if !dirs.Existed {
		return dirs, nil
	}
	inUse, err := m.mounter.UpperInUse(dirs.Upper)
	if err != nil {
		return dirs, err
	}
	if inUse {
		return dirs, fmt.Errorf("%w: %w: %s: a container that had the volume may still be going: it is tried again", errdefs.ErrUnavailable, overlay.ErrUpperInUse, dirs.Upper.Name())
	}
	if r.Spec.Ephemeral() {
		// Of this boot: its view was unmounted by other hands or never mounted. The kernel marks the work directory of a
		// volatile view so that it is not mounted again after a crash of the node, which this is not.
		return dirs, u.ClearWork()
	}
	return dirs, nil
}

// checkUpperThere returns ErrDataLoss if the volume's upper was made and is gone.
func (m *Manager) checkUpperThere(r *record, u upper.Upper) error {
	if !r.Made {
		return nil
	}
	there, err := u.Exists()
	if err != nil {
		return fmt.Errorf("look for the upper: %w", err)
	}
	if !there {
		return fmt.Errorf("%w: the upper in %s is gone, with what was written to it: an empty one is not put in its place: restore it, or delete the claim", errdefs.ErrDataLoss, m.states.volumeDir(r.ID))
	}
	return nil
}

// restore puts the state back as it was before a publish that failed.
func (m *Manager) restore(before *record, id string) error {
	if before == nil {
		return m.trash.put(m.states.volumeDir(id))
	}
	return m.states.save(before)
}

// undo takes steps back, the last one first. An error is reported with the error of the publish: it makes kubelet
// unpublish, which goes by the state.
func undo(ctx context.Context, steps []step) error {
	var failed error
	for _, s := range slices.Backward(steps) {
		if err := s.undo(); err != nil {
			klog.FromContext(ctx).Error(err, "Could not take a step of a failed publish back", "step", s.name)
			failed = errors.Join(failed, fmt.Errorf("take back %q: %w", s.name, err))
		}
	}
	return failed
}

// podVolumePath returns the path of the upper in another volume of the pod.
func podVolumePath(ref reference.Reference) string {
	if ref.Path() == "" {
		return upper.DefaultPath
	}
	return ref.Path()
}
