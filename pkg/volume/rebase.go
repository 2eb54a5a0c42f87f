package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/rebase"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// newLayers are layers that a volume is to have in place of those of its source, open until close.
type newLayers struct {
	// requested are the layers as requested, and resolved have digests for tags.
	requested, resolved []reference.Reference
	layers              *layer.ResolvedLayers
}

func (n newLayers) close() {
	if n.layers != nil {
		n.layers.Close()
	}
}

// hasLayers reports whether a request that names these layers asks for those of its source.
func hasLayers(made *record.Snapshot, requested []reference.Reference) bool {
	asRequested := made.RequestedLayers
	if asRequested == nil {
		asRequested = made.Spec.Layers
	}
	// A central controller resolved the tags of the source, and the node never had them.
	return len(requested) == 0 || slices.Equal(requested, asRequested) || reference.AreResolved(requested, made.Spec.Layers)
}

// openNewLayers resolves the layers of a request, and opens them, if its source has other ones, which differs reports. Images are
// pulled that are not on the node.
func (m *Manager) openNewLayers(
	ctx context.Context, req CreateRequest, requested []reference.Reference,
) (onto newLayers, differs bool, err error) {
	made, err := m.describeSource(req.Source)
	if err != nil || hasLayers(made, requested) {
		return newLayers{}, false, err
	}
	resolved := req.Resolved
	if resolved == nil {
		if resolved, err = m.config.Layers.ResolveTags(ctx, requested, req.Secrets, req.Namespace); err != nil {
			return newLayers{}, false, err
		}
	}
	if reference.AreResolved(resolved, made.Spec.Layers) {
		return newLayers{}, false, nil // The tags mean now what the source has.
	}
	onto = newLayers{requested: requested, resolved: resolved}
	onto.layers, err = m.resolveNew(ctx, slices.Concat(made.Spec.Layers, resolved), resolved, req.Namespace, req.Secrets)
	return onto, err == nil, err
}

// resolveNew opens layers to rebase onto. all are these and the old ones.
func (m *Manager) resolveNew(
	ctx context.Context, all, layers []reference.Reference, namespace string, secrets map[string]string,
) (*layer.ResolvedLayers, error) {
	for _, ref := range all {
		if ref.Scheme() == reference.Volume || ref.Scheme() == reference.Cache {
			return nil, fmt.Errorf("%w: layer %s belongs to a pod: what was written stays on the layers that it was written on",
				errdefs.ErrInvalidArgument, ref)
		}
	}
	return m.config.Layers.Resolve(ctx, layers, layer.Request{Pod: kubelet.Pod{Namespace: namespace}, Secrets: secrets})
}

// describeSource returns the spec of a source and its layers as requested.
func (s *snapshots) describeSource(source Source) (*record.Snapshot, error) {
	if source.Snapshot != "" {
		return s.records.Load(source.Snapshot)
	}
	r, err := s.volumes.Load(source.Volume)
	if err != nil {
		return nil, err
	}
	made := &record.Snapshot{Spec: r.Spec}
	if r.Provisioned != nil {
		made.RequestedLayers = r.Provisioned.RequestedLayers
	}
	return made, nil
}

// rebase moves what a source consists of onto other layers. The frozen uppers in it are then those of the new volume. The caller holds
// s.listing for reading until a record has them.
func (m *Manager) rebase(ctx context.Context, original *record.Snapshot, onto newLayers, policy rebase.Policy) (*rebase.Report, error) {
	report := &rebase.Report{Policy: policy}
	if len(original.Frozen) > 0 {
		c := &Changes{ctx: ctx}
		defer c.Close()
		r := &record.Record{
			ID: original.Volume, Spec: original.Spec, Group: original.Group, Frozen: original.Frozen, Resolved: original.Resolved,
		}
		if err := m.openFrozenChanges(c, r, nil); err != nil {
			return nil, err
		}
		if err := m.reopenFrozen(c, r); err != nil {
			return nil, err
		}
		tree, err := m.openRebase(c, r, publicationOf(r), onto.layers)
		if err != nil {
			return nil, err
		}
		if original.Frozen, err = m.rebaseTree(ctx, r, tree, report); err != nil {
			return nil, err
		}
	}
	original.Spec.Layers, original.RequestedLayers = onto.resolved, nil
	if !slices.Equal(onto.requested, onto.resolved) {
		original.RequestedLayers = onto.requested
	}
	original.Resolved, original.Layers = onto.layers.Digests, onto.layers.Stored
	return report, nil
}

// reopenFrozen opens the frozen uppers of a volume once more, with the groups that they are stored with. The view of one in a disk image
// maps the groups of the mount that it was opened by.
func (m *Manager) reopenFrozen(c *Changes, r *record.Record) error {
	dirs, err := m.openFrozen(c.ctx, placedOf(r))
	if err != nil {
		return err
	}
	c.own(dirs...)
	c.Tree.Uppers = nil
	return c.setUppers(dirs)
}

// publicationOf returns a publication with the group of a volume's files, as nobody has it.
func publicationOf(r *record.Record) *record.Publication {
	p := &record.Publication{}
	if r.Group != nil {
		p.Group = &r.Group.ID
	}
	return p
}

// rebaseTree returns the frozen uppers of a volume over the new layers: its own, or one that is made of them.
func (m *Manager) rebaseTree(
	ctx context.Context, r *record.Record, tree rebase.Tree, report *rebase.Report,
) ([]record.Frozen, error) {
	edits, err := rebase.Find(ctx, tree, report.Policy, func(c rebase.Conflict) error { report.Add(c); return nil })
	if err != nil {
		return nil, fmt.Errorf("compare what was written with the new layers: %w", err)
	}
	logger := klog.FromContext(ctx)
	switch {
	case report.Policy == rebase.Fail && report.Conflicts > 0:
		return nil, fmt.Errorf("%w: what was written and the new layers have %s; set onConflict to %s or %s, or list them all with "+
			"overlayctl rebase --dry-run", errdefs.ErrFailedPrecondition, report, rebase.KeepUpper, rebase.TakeLayers)
	case edits == 0:
		logger.Info("Frozen uppers rebased as they are", keyCount, report.Conflicts)
		return r.Frozen, nil
	}
	frozen, err := m.writeRebased(ctx, r, tree, report.Policy)
	if err != nil {
		return nil, fmt.Errorf("write what is rebased: %w", err)
	}
	logger.Info("Frozen uppers rebased", keyFrozen, frozen.ID, keyCount, report.Conflicts)
	return []record.Frozen{frozen}, nil
}

// writeRebased makes one frozen upper of those of a volume.
func (m *Manager) writeRebased(ctx context.Context, r *record.Record, tree rebase.Tree, policy rebase.Policy) (record.Frozen, error) {
	rebased := record.Frozen{ID: upper.NewFrozenID(), Backend: upper.Directory, Group: r.Frozen[0].Group}
	var bytes, inodes int64
	first, err := upper.RootAttrOf(tree.Uppers[0])
	if err != nil {
		return rebased, err
	}
	for i, frozen := range r.Frozen {
		root, err := upper.RootAttrOf(tree.Uppers[i])
		if err != nil {
			return rebased, err
		}
		if root.GID != first.GID || !reflect.DeepEqual(frozen.Group, rebased.Group) {
			return rebased, fmt.Errorf("%w: its frozen uppers are stored with different groups, and cannot be merged; "+
				"copy the files to a new volume", errdefs.ErrFailedPrecondition)
		}
		rebased.Metacopy = rebased.Metacopy || frozen.Metacopy
		taken, count, err := m.uppers.backends.MeasureFrozen(ctx, frozen.Backend, []string{frozen.ID})
		if err != nil {
			return rebased, err
		}
		bytes, inodes = bytes+taken, inodes+count
	}
	release, err := m.reserveMerged(ctx, bytes, inodes)
	if err != nil {
		return rebased, err
	}
	defer release()
	isApart, err := m.mustCopy(r.Frozen)
	if err != nil {
		return rebased, err
	}
	scratch := upper.NewFrozenID()
	err = m.uppers.backends.MakeFrozen(rebased.ID, scratch, func(into, scratch *os.File) error {
		return rebase.Write(ctx, tree, policy, into, scratch, isApart)
	})
	err = errors.Join(err, m.uppers.backends.DiscardFrozen(scratch))
	if err != nil {
		err = errors.Join(err, m.uppers.backends.DiscardFrozen(rebased.ID))
	}
	return rebased, err
}

// mustCopy reports whether files of frozen uppers must not get another name: a view may show them, or a project's quota counts them.
func (s *snapshots) mustCopy(list []record.Frozen) (bool, error) {
	if slices.ContainsFunc(list, func(f record.Frozen) bool { return f.Backend == upper.ProjectQuota }) {
		return true, nil
	}
	lists, err := s.lists()
	if err != nil {
		return true, err
	}
	return isMounted(lists, list), nil
}

// openRebase opens an overlay of other layers beside what was written to a volume.
func (m *Manager) openRebase(
	c *Changes, r *record.Record, p *record.Publication, onto *layer.ResolvedLayers,
) (rebase.Tree, error) {
	tree := rebase.Tree{Uppers: c.Tree.Uppers, View: c.Tree.View, Old: c.Tree.Base}
	var err error
	if tree.New, err = m.views.OpenDetached(overlay.Spec{Lowers: onto.Dirs, LayerOwner: c.owner}); err != nil {
		return tree, fmt.Errorf("mount the new layers: %w", err)
	}
	c.own(tree.New)
	if tree.OneFileSystem, err = areOnOneFileSystem(slices.Concat(c.layers.Dirs, onto.Dirs)); err != nil || len(tree.Uppers) == 0 {
		return tree, err
	}
	tree.StoredGroup, err = m.storedGroup(r, p, tree.Uppers[0])
	return tree, err
}

// storedGroup returns the inverse of what a view does with the groups of the topmost upper.
func (m *Manager) storedGroup(r *record.Record, p *record.Publication, top *os.File) (func(uint32) uint32, error) {
	if len(r.Frozen) == 0 || r.Spec.Ownership == spec.OwnershipChown {
		return func(gid uint32) uint32 { return gid }, nil
	}
	root, err := upper.RootAttrOf(top)
	if err != nil {
		return nil, err
	}
	swaps := r.Frozen[0].Swaps(p.Group, root.GID)
	return func(gid uint32) uint32 {
		for _, swap := range slices.Backward(swaps) {
			gid = swap.Of(gid)
		}
		return gid
	}, nil
}

func areOnOneFileSystem(dirs []*os.File) (bool, error) {
	var first linux.Stat
	for i, dir := range dirs {
		stat, err := linux.StatFile(dir)
		if err != nil {
			return false, err
		}
		if i == 0 {
			first = stat
		}
		if stat.Dev != first.Dev {
			return false, nil
		}
	}
	return true, nil
}

// Rebase is what was written to a volume, and other layers beside it, open for reading until Close.
type Rebase struct {
	*Changes
	Tree rebase.Tree
}

// ReadRebase opens what was written to a volume as it is now, and the layers onto which it is to be rebased, to compare them. It is as
// ReadChanges. Images are pulled that are not on the node, with the node's credentials.
func (m *Manager) ReadRebase(ctx context.Context, id string, layers []reference.Reference) (_ *Rebase, err error) {
	if err := m.config.Layers.Check(layers); err != nil {
		return nil, err
	}
	resolved, err := m.config.Layers.ResolveTags(ctx, layers, nil, "")
	if err != nil {
		return nil, err
	}
	r, err := m.records.Load(id)
	if err != nil {
		return nil, err
	}
	// Before whoever wants the volume has to wait for it.
	onto, err := m.resolveNew(ctx, slices.Concat(r.Spec.Layers, resolved), resolved, "", nil)
	if err != nil {
		return nil, err
	}
	c, err := m.ReadChanges(ctx, id, "")
	if err != nil {
		onto.Close()
		return nil, err
	}
	c.onClose(onto.Close)
	if r, err = m.records.Load(id); err == nil {
		opened := &Rebase{Changes: c}
		if opened.Tree, err = m.openRebase(c, r, publicationOf(r), onto); err == nil {
			opened.Tree.MayChange = true
			return opened, nil
		}
	}
	c.Close()
	return nil, fmt.Errorf("compare volume %s with other layers: %w", id, err)
}
