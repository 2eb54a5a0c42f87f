package volume

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// loadRecord loads the record. An ephemeral volume with an empty record starts again. Uppers without a record are refused,
// because the layers that they were made on are not known, and pods may be using them. An inline volume, which is of one pod,
// starts again unless its view is mounted.
func (p *publishing) loadRecord(ctx context.Context) error {
	m, id := p.m, p.req.VolumeID
	r, err := m.records.Load(id)
	if err == nil {
		if r.Committing != nil {
			return fmt.Errorf("%w: the volume is becoming a version of cache %s; unpublish it", errdefs.ErrUnavailable, r.Spec.Commit)
		}
		p.before = r
		return m.finishFreezing(r)
	}
	if !errdefs.IsNotFound(err) && !errors.Is(err, record.ErrEmpty) {
		return err
	}
	dir := m.records.Dir(id)
	if !p.req.Inline {
		if err := m.unrecorded.checkNoUppers(id); err != nil {
			return err
		}
	}
	if p.req.Spec.Persistent() && p.req.Provisioned {
		return fmt.Errorf("%w: node %s has no record of this volume, so that its upper is on another node or was lost; "+
			"the driver does not begin with an empty one",
			errdefs.ErrNotFound, m.config.Node)
	}
	if !exists(dir) {
		return nil
	}
	mounted, err := m.views.At(p.req.Target)
	if err != nil {
		return fmt.Errorf("query the mount at %s: %w", p.req.Target, err)
	}
	if mounted == overlay.Overlay {
		return fmt.Errorf("%w: the view at %s has no record; restore %s in %s, or delete the pod",
			errdefs.ErrDataLoss, p.req.Target, dataroot.Record, dir)
	}
	return m.unrecorded.discard(ctx, id)
}

// checkConflicts compares the request with the record.
func (p *publishing) checkConflicts(context.Context) error {
	r, req := p.before, p.req
	if r == nil {
		return nil
	}
	if !r.Spec.Equal(req.Spec) || r.Inline != req.Inline {
		return fmt.Errorf("%w: on this node the volume has layers %v and upper %q, and the request has layers %v and upper %q; "+
			"an upper stays on the layers that it was made on: use another volume",
			errdefs.ErrAlreadyExists, r.Spec.LayerNames(), r.Spec.Upper, req.Spec.LayerNames(), req.Spec.Upper)
	}
	if here := r.Publication(req.Target); here != nil {
		live, err := p.m.views.isLive(here)
		if err != nil {
			return err
		}
		if live {
			if err := checkPublished(p.req, r, here); err != nil {
				return err
			}
			p.done = true
			return nil
		}
	}
	if req.Access != spec.ReadWriteOncePod && !req.Inline {
		return nil
	}
	other, err := p.m.views.firstLive(r, req.Target)
	switch {
	case errdefs.IsNotFound(err):
		return nil
	case err != nil:
		return err
	}
	return fmt.Errorf("%w: the volume is for one pod, and is published at %s for pod %s; unpublish it there first",
		errdefs.ErrFailedPrecondition, other.Target, other.Pod)
}

// checkPublished compares the request with a mounted view at its target.
func checkPublished(req PublishRequest, r *record.Record, here *record.Publication) error {
	if here.Attributes != req.Attributes || here.Access != req.Access || !same(here.Group, groupFor(r, req.Group)) {
		return fmt.Errorf("%w: the volume is published at %s with other mount options, another access mode or another group",
			errdefs.ErrAlreadyExists, req.Target)
	}
	return nil
}

func (p *publishing) resolveLayers(ctx context.Context) error {
	var resolved reference.Digests
	if p.before != nil {
		resolved = p.before.Resolved
	}
	var err error
	p.layers, err = p.m.config.Layers.Resolve(ctx, p.req.Spec.Layers, layer.Request{Pod: p.req.Pod, Secrets: p.req.Secrets, Digests: resolved})
	if err != nil {
		return err
	}
	frozen := 0
	if p.before != nil {
		frozen = len(p.before.Frozen)
	}
	if len(p.layers.Dirs)+frozen > overlay.MaxLowers {
		return fmt.Errorf("%w: the images have %d layers together, and the volume %d frozen uppers; overlayfs takes at most %d",
			errdefs.ErrInvalidArgument, len(p.layers.Dirs), frozen, overlay.MaxLowers)
	}
	return nil
}

func (p *publishing) openTarget(context.Context) error {
	var err error
	p.target, p.madeTarget, err = openTarget(p.req.Target)
	if err != nil || p.madeTarget {
		// Nothing is mounted on a new directory.
		return err
	}
	mounted, err := p.m.views.At(p.req.Target)
	if err != nil {
		return fmt.Errorf("query the mount at %s: %w", p.req.Target, err)
	}
	if mounted != overlay.Nothing {
		return fmt.Errorf("%w: target path %s has a mount that is not this volume; unmount it", errdefs.ErrFailedPrecondition, p.req.Target)
	}
	return nil
}

func (p *publishing) removeTarget(context.Context) error {
	if !p.madeTarget {
		return nil
	}
	return removeTarget(p.req.Target)
}

// newRecord makes the record that the volume will have.
func (p *publishing) newRecord(ctx context.Context) error {
	req, r := p.req, p.before
	if r == nil {
		r = &record.Record{ID: req.VolumeID, Spec: req.Spec, Inline: req.Inline, Size: req.Spec.Size}
	}
	pod := req.Pod
	if uid := p.m.config.Pods.PodUID(req.Target); uid != "" {
		pod.UID = uid
	}
	publication := record.Publication{
		Target: req.Target, Pod: pod, Access: req.Access, Attributes: req.Attributes, Group: groupFor(r, req.Group), BootID: p.m.config.BootID,
		LowerDirs: p.layers.Paths(), Fingerprints: p.layers.Fingerprints,
	}
	if req.Spec.Upper == spec.UpperPodVolume {
		root, err := p.m.config.PodVolumes.Root(ctx, *req.Spec.UpperRef, req.Pod)
		if err != nil {
			return err
		}
		root.Close()
		publication.PodVolume = upper.PodVolumePath{Volume: root.Name(), Path: podVolumePath(*req.Spec.UpperRef)}
	}
	if len(p.layers.Digests) > 0 {
		klog.FromContext(ctx).Info("Layers resolved", keyDigests, p.layers.Digests)
	}
	p.after = r.With(publication)
	p.after.Resolved, p.after.Layers = p.layers.Digests, p.layers.Stored
	p.publication = p.after.Publication(req.Target)
	if p.after.Backend == "" && hasUpper(p.after) {
		backend, err := p.m.ledger.choose(p.after)
		if err != nil {
			return err
		}
		p.after.Backend = backend
	}
	return ctx.Err()
}

// discardStaleUpper discards an ephemeral upper of an earlier boot, because nothing of it was synced. It comes before the
// record that says that the upper is of this boot.
func (p *publishing) discardStaleUpper(ctx context.Context) error {
	if p.before == nil || !p.after.Spec.Ephemeral() {
		return nil
	}
	if old := p.before.Publication(p.req.Target); old != nil && old.BootID == p.publication.BootID {
		return nil
	}
	if !upper.ContainsUpper(p.m.uppers.path(p.after, p.req.Target)) {
		return nil
	}
	return p.m.uppers.open(p.after, p.publication).Discard(ctx)
}

func (p *publishing) saveRecord(context.Context) error {
	defer p.unlist()
	return p.m.ledger.save(p.after)
}

func (p *publishing) restoreRecord(context.Context) error {
	if p.before == nil {
		return p.m.ledger.discard(p.req.VolumeID)
	}
	return p.m.ledger.save(p.before)
}

// openShared opens the view of another pod with the same upper, if there is one: pods that share an upper share its view.
func (p *publishing) openShared(context.Context) error {
	if !sharesUpper(p.after) {
		return nil
	}
	other, err := p.m.views.firstLive(p.after, p.req.Target)
	switch {
	case errdefs.IsNotFound(err):
		return nil
	case err != nil:
		return err
	case !same(other.Group, p.publication.Group):
		return fmt.Errorf("%w: the volume is published at %s for pod %s with another fsGroup; pods that share an upper at the same time "+
			"need the same one: wait until that pod is gone", errdefs.ErrFailedPrecondition, other.Target, other.Pod)
	}
	p.shared, err = linux.Open(nil, other.Target, linux.O_PATH|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	return err
}

// openFrozen opens the frozen uppers, which a view that is shared has already.
func (p *publishing) openFrozen(ctx context.Context) (err error) {
	if p.shared != nil {
		return nil
	}
	p.frozen, err = p.m.openFrozen(ctx, p.placed())
	return err
}

// makeBase makes the directory of the upper of a pod that shares the volume with others.
func (p *publishing) makeBase(context.Context) error {
	if !p.after.Spec.Ephemeral() || p.after.Inline {
		return nil
	}
	base := p.m.uppers.path(p.after, p.req.Target)
	p.madeBase = !exists(base)
	return os.MkdirAll(base, 0o700)
}

func (p *publishing) discardBase(context.Context) error {
	if !p.madeBase {
		return nil
	}
	return p.m.config.Root.Discard(p.m.uppers.path(p.after, p.req.Target))
}

func (p *publishing) prepareUpper(ctx context.Context) error {
	if !hasUpper(p.after) || p.shared != nil {
		return nil
	}
	p.upper = p.m.uppers.open(p.after, p.publication)
	if err := checkNotLost(p.upper, p.after, p.m.records.Dir(p.after.ID)); err != nil {
		return err
	}
	root, err := p.rootAttr()
	if err != nil {
		return err
	}
	p.dirs, err = p.upper.Prepare(ctx, root)
	p.prepared = err == nil
	if err != nil || len(p.frozen) == 0 || p.after.Made {
		return err
	}
	// No pod has had it yet, also if a crash left it.
	if err := upper.CopyRootXattr(p.frozen[0], p.dirs.Upper); err != nil {
		return fmt.Errorf("copy the attributes of the root: %w", err)
	}
	// An access control list changes the mode.
	return upper.SetGroup(p.dirs.Upper, root.GID, root.Mode)
}

// checkNotLost returns ErrDataLoss if the upper was made and does not exist.
func checkNotLost(u upper.Upper, r *record.Record, dir string) error {
	if !r.Made {
		return nil
	}
	there, err := u.Exists()
	if err != nil {
		return fmt.Errorf("find the upper: %w", err)
	}
	if !there {
		return fmt.Errorf("%w: the upper in %s is gone, with what was written to it, and an empty one does not replace it; "+
			"restore it, or delete the claim",
			errdefs.ErrDataLoss, dir)
	}
	return nil
}

func (p *publishing) releaseUpper(ctx context.Context) error {
	if !p.prepared {
		return nil
	}
	p.closeDirs()
	return p.upper.Release(ctx)
}

// saveMade records that a persistent upper exists: from then on it can be lost. It may lie on another disk than the record.
func (p *publishing) saveMade(context.Context) error {
	if !p.prepared || !p.after.Spec.Persistent() || p.after.Made {
		return nil
	}
	if err := p.dirs.Sync(); err != nil {
		return err
	}
	p.after.Made = true
	if group := p.publication.Group; group != nil && !p.dirs.Existed {
		p.after.Group = newGroup(*group)
	}
	return p.m.ledger.saveDurably(p.after)
}

// checkUpperFree checks that no other overlay is mounted on an upper that existed.
func (p *publishing) checkUpperFree(context.Context) error {
	if !p.dirs.Existed {
		return nil
	}
	inUse, err := p.m.views.UpperInUse(p.dirs.Upper)
	if err != nil {
		return err
	}
	if inUse {
		return fmt.Errorf("%w: %w: %s; a container that had the volume may still be running, kubelet will retry",
			errdefs.ErrUnavailable, overlay.ErrUpperInUse, p.dirs.Upper.Name())
	}
	if !p.after.Spec.Ephemeral() {
		return nil
	}
	// The upper is of this boot: its view was unmounted by hand or never mounted. The kernel marks the work directory of a
	// volatile view so that it cannot be mounted after a crash. The node has not crashed since, so the mark can be removed.
	return p.upper.ClearWork()
}

// overlay describes the view.
func (p *publishing) overlay() (overlay.Spec, error) {
	frozen, err := frozenLowers(p.after, p.publication, p.placed(), p.frozen)
	return overlay.Spec{
		Frozen:      frozen,
		Lowers:      p.layers.Dirs,
		Upper:       p.dirs.Upper,
		Work:        p.dirs.Work,
		Volatile:    p.prepared && p.after.Spec.Ephemeral(),
		LayerOwner:  mappedOwner(p.after, p.publication),
		UpperGroups: p.after.Group.Swaps(),
		Metacopy:    p.after.HasMetacopy(),
		Attributes:  p.publication.Attributes,
	}, err
}

func (p *publishing) mount(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var err error
	switch {
	case p.shared != nil:
		err = p.m.views.Bind(p.shared, p.target, p.publication.Attributes)
	case p.view != nil:
		err = p.m.views.Attach(p.view, p.target, p.publication.Attributes)
		p.view = nil
	default:
		err = p.mountOverlay()
	}
	p.mounted = err == nil
	return err
}

func (p *publishing) mountOverlay() error {
	view, err := p.overlay()
	if err != nil {
		return err
	}
	return p.m.views.Overlay(view, p.target)
}

func (p *publishing) unmount(context.Context) error {
	if !p.mounted {
		return nil
	}
	return p.m.views.unmount(p.req.Target)
}
