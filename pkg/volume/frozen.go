package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// maxFrozen is how many frozen uppers a volume or snapshot may have. Each of them is one more directory to look for a name in.
const maxFrozen = 64

// capture returns the frozen uppers that have what was written to a volume until now. It freezes the volume's upper, and takes that over
// into r, or copies the upper while pods write to it. The caller holds the volume's lock, and s.listing for reading until a record has
// the list.
func (s *snapshots) capture(ctx context.Context, r *record.Record) ([]record.Frozen, error) {
	if err := s.finishFreezing(r); err != nil {
		return nil, err
	}
	_, err := s.views.firstLive(r, "")
	if err == nil {
		return s.copyInUse(ctx, r)
	}
	if !errdefs.IsNotFound(err) {
		return nil, err
	}
	if err := s.freeze(ctx, r); err != nil {
		return nil, err
	}
	return r.Frozen, nil
}

// freeze freezes the upper of a volume that is not mounted, if it has one. The record says so before it is done, so that a crash between
// two steps leaves a volume that has all that was written to it.
func (s *snapshots) freeze(ctx context.Context, r *record.Record) error {
	if r.Backend == "" {
		return nil // It was never published.
	}
	u := s.uppers.open(r, nil)
	if err := checkNotLost(u, r, s.volumes.Dir(r.ID)); err != nil {
		return err
	}
	there, err := u.Exists()
	if err != nil || !there {
		return err
	}
	if err := checkRoom(r); err != nil {
		return err
	}
	if err := s.checkFree(u); err != nil {
		return err
	}
	release, err := s.keepWritten(ctx, r)
	if err != nil {
		return err
	}
	defer release()
	frozen := frozenOf(r)
	if err := s.uppers.backends.PrepareFreeze(ctx, s.uppers.location(r, nil), frozen.ID); err != nil {
		return errors.Join(err, s.uppers.backends.DiscardFrozen(frozen.ID))
	}
	changed := *r
	changed.Frozen = slices.Concat([]record.Frozen{frozen}, r.Frozen)
	changed.Freezing, changed.Made = true, false
	if r.Group != nil {
		// The next upper is stored with the group that pods see.
		changed.Group = newGroup(r.Group.ID)
	}
	if err := s.ledger.saveDurably(&changed); err != nil {
		return err
	}
	*r = changed
	return s.finishFreezing(r)
}

// keepWritten finds out whether there is room for what was written to a volume beside what may be written to it from now on, which is as
// much as its size. The room counts as taken until release is called.
func (s *snapshots) keepWritten(ctx context.Context, r *record.Record) (release func(), err error) {
	if r.Size == 0 || !reserves(r) {
		return func() {}, nil
	}
	bytes, err := s.uppers.backends.WrittenBytes(ctx, s.uppers.location(r, nil))
	if err != nil {
		return nil, err
	}
	if release, err = s.ledger.reserveFrozen(ctx, bytes); err != nil {
		return nil, fmt.Errorf("keep what was written to volume %s: %w", r.ID, err)
	}
	return release, nil
}

// frozenOf returns the frozen upper that a volume's upper becomes.
func frozenOf(r *record.Record) record.Frozen {
	return record.Frozen{ID: upper.NewFrozenID(), Backend: r.Backend, Group: r.Group, Metacopy: r.HasMetacopy()}
}

// checkRoom returns ErrFailedPrecondition if a volume can have no other frozen upper.
func checkRoom(r *record.Record) error {
	switch count := len(r.Frozen) + 1; {
	case count > maxFrozen:
		return fmt.Errorf("%w: volume %s has %d frozen uppers, one for each snapshot and clone that was made of it, and %d are the most; "+
			"copy its files to a new volume", errdefs.ErrFailedPrecondition, r.ID, len(r.Frozen), maxFrozen)
	// Each reference is one directory, or an image whose layers are in Layers.
	case count+len(r.Layers)+len(r.Spec.Layers) > overlay.MaxLowers:
		return fmt.Errorf("%w: volume %s has %d layers and %d frozen uppers; overlayfs takes at most %d together",
			errdefs.ErrFailedPrecondition, r.ID, len(r.Layers), len(r.Frozen), overlay.MaxLowers)
	}
	return nil
}

// checkFree returns ErrUnavailable if an overlay is mounted on an upper that no view is known of: a container that has not ended keeps
// one that was unmounted.
func (s *snapshots) checkFree(u upper.Upper) error {
	path, _ := u.Paths()
	dir, err := linux.Open(nil, path, linux.O_PATH|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // It is in a disk image that is not mounted.
	}
	if err != nil {
		return fmt.Errorf("open the upper: %w", err)
	}
	defer dir.Close()
	inUse, err := s.views.UpperInUse(dir)
	if err != nil {
		return err
	}
	if inUse {
		return fmt.Errorf("%w: %w: %s; a container that had the volume may still be running, try again later",
			errdefs.ErrUnavailable, overlay.ErrUpperInUse, path)
	}
	return nil
}

// finishFreezing renames the upper of a volume whose record says that it is frozen, unless that was done, and then clears Freezing in the
// record. The caller holds the volume's lock.
func (s *snapshots) finishFreezing(r *record.Record) error {
	if !r.Freezing {
		return nil
	}
	if len(r.Frozen) == 0 {
		return fmt.Errorf("%w: the record of volume %s has no frozen upper, and says that one is made", errdefs.ErrDataLoss, r.ID)
	}
	if err := s.uppers.backends.Freeze(s.uppers.location(r, nil), r.Frozen[0].ID); err != nil {
		return err
	}
	changed := *r
	changed.Freezing = false
	if err := s.ledger.saveDurably(&changed); err != nil {
		return err
	}
	*r = changed
	return nil
}

// copyInUse copies the upper of a volume that is mounted. The volume does not change.
func (s *snapshots) copyInUse(ctx context.Context, r *record.Record) ([]record.Frozen, error) {
	if err := checkRoom(r); err != nil {
		return nil, err
	}
	release, err := s.keepWritten(ctx, r)
	if err != nil {
		return nil, err
	}
	defer release()
	frozen := frozenOf(r)
	if err := s.uppers.backends.CopyInUse(ctx, s.uppers.location(r, nil), frozen.ID); err != nil {
		return nil, errors.Join(err, s.uppers.backends.DiscardFrozen(frozen.ID))
	}
	return slices.Concat([]record.Frozen{frozen}, r.Frozen), nil
}

// openFrozen opens frozen uppers. The caller closes them.
func (s *snapshots) openFrozen(ctx context.Context, list []placedFrozen) ([]*os.File, error) {
	var dirs []*os.File
	for _, frozen := range list {
		dir, err := s.uppers.backends.OpenFrozen(ctx, frozen.Backend, frozen.ID)
		if err != nil {
			closeAll(dirs)
			return nil, err
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

func idsOf(list []record.Frozen) (ids []string) {
	for _, frozen := range list {
		ids = append(ids, frozen.ID)
	}
	return ids
}

func closeAll(files []*os.File) {
	for _, file := range files {
		file.Close()
	}
}

// placedFrozen is a frozen upper with the number of directories of layers that lie above it.
type placedFrozen struct {
	record.Frozen
	under int
}

// placed returns the frozen uppers of the volume, and of the caches among its layers, the topmost first.
func (p *publishing) placed() []placedFrozen {
	return append(placedOf(p.after), placedCaches(p.after, p.layers)...)
}

// placedOf returns the frozen uppers of a volume.
func placedOf(r *record.Record) (list []placedFrozen) {
	for _, frozen := range r.Frozen {
		list = append(list, placedFrozen{frozen, 0})
	}
	return list
}

// placedCaches returns the frozen uppers of the caches among the layers of a volume.
func placedCaches(r *record.Record, layers *layer.ResolvedLayers) (list []placedFrozen) {
	for _, cache := range layers.Caches {
		for _, version := range r.Caches[cache.Name] {
			list = append(list, placedFrozen{version.Frozen, cache.Under})
		}
	}
	return list
}

// findCaches enters the newest versions of the caches among the layers into the record. A volume that was published before, in this boot of
// the node, keeps those that its upper was written on. Until the record is saved, they are kept from being swept.
func (p *publishing) findCaches(ctx context.Context) error {
	if !p.req.Spec.UsesCaches() {
		return nil
	}
	if err := (record.CacheKey{Namespace: p.req.Pod.Namespace, Name: "cache"}).Check(); err != nil {
		return fmt.Errorf("the namespace of the pod, which the caches belong to: %w", err)
	}
	if p.before != nil && p.before.Publication(p.req.Target) != nil &&
		p.before.Publication(p.req.Target).BootID == p.publication.BootID && p.before.Caches != nil {
		return nil
	}
	p.m.listing.RLock()
	p.listing = true
	p.after.Caches = map[string][]record.CacheVersion{}
	count := len(p.layers.Dirs)
	for _, cache := range p.layers.Caches {
		versions, err := p.m.caches.Newest(ctx, record.CacheKey{Namespace: p.req.Pod.Namespace, Name: cache.Name})
		if err != nil {
			return err
		}
		p.after.Caches[cache.Name] = versions
		count += len(versions)
	}
	if count > overlay.MaxLowers {
		return fmt.Errorf("%w: the images have %d layers together, and with the caches there are %d; overlayfs takes at most %d",
			errdefs.ErrInvalidArgument, len(p.layers.Dirs), count, overlay.MaxLowers)
	}
	return nil
}

// unlist ends what findCaches began.
func (p *publishing) unlist() {
	if p.listing {
		p.m.listing.RUnlock()
		p.listing = false
	}
}

// rootAttr returns the attributes of the root of a new upper: those of the topmost directory below it.
func (p *publishing) rootAttr() (upper.RootAttr, error) {
	list := p.placed()
	switch {
	case len(list) > 0 && list[0].under == 0:
		return frozenRootAttr(p.after, p.publication, list[0].Frozen, p.frozen[0])
	case len(p.layers.Dirs) == 0:
		return emptyRootAttr(p.after, p.publication), nil
	}
	return rootAttr(p.after, p.publication, p.layers.Dirs[0])
}

// emptyMode is the mode of a volume that has nothing below its upper, as kubelet's of an emptyDir.
const emptyMode = 0o777

// emptyRootAttr returns the attributes of the root of a volume that has nothing below its upper.
func emptyRootAttr(r *record.Record, p *record.Publication) upper.RootAttr {
	owner := layerOwner(r, p)
	root := upper.RootAttr{UID: owner.UID, GID: owner.GID, Mode: emptyMode}
	if p.Group != nil {
		root.GID = *p.Group
		root.Mode |= groupDirMode
	}
	return root
}

// frozenRootAttr returns the attributes of the root of a frozen upper as the view shows them, and open to the pod's group.
func frozenRootAttr(r *record.Record, p *record.Publication, frozen record.Frozen, dir *os.File) (upper.RootAttr, error) {
	root, err := upper.RootAttrOf(dir)
	if err != nil {
		return upper.RootAttr{}, err
	}
	if r.Spec.Ownership != spec.OwnershipChown {
		for _, swap := range frozen.Swaps(p.Group, root.GID) {
			root.GID = swap.Of(root.GID)
		}
	}
	if p.Group != nil {
		root.GID = *p.Group
		root.Mode |= groupDirMode
	}
	return root, nil
}

// frozenLowers returns the frozen uppers as a view takes them.
func frozenLowers(
	r *record.Record, p *record.Publication, list []placedFrozen, dirs []*os.File,
) ([]overlay.FrozenUpper, error) {
	var lowers []overlay.FrozenUpper
	for i, dir := range dirs {
		lower := overlay.FrozenUpper{Dir: dir, Under: list[i].under, Detached: list[i].Backend == upper.DiskImage}
		if r.Spec.Ownership != spec.OwnershipChown {
			root, err := upper.RootAttrOf(dir)
			if err != nil {
				return nil, err
			}
			lower.Groups = list[i].Swaps(p.Group, root.GID)
		}
		lowers = append(lowers, lower)
	}
	return lowers, nil
}

// sweep discards the frozen uppers that no record lists, and what a crash left of a snapshot before it had a record. While a record
// cannot be read, it discards nothing: a person may restore it. It does nothing while a list is being made: the next reconciliation does
// it.
func (s *snapshots) sweep(ctx context.Context) error {
	if !s.listing.TryLock() {
		return nil
	}
	defer s.listing.Unlock()
	unfinished, err := s.records.Unfinished()
	if err != nil {
		return err
	}
	for _, id := range unfinished {
		if err := s.records.Remove(id, s.root.Discard); err != nil {
			return err
		}
	}
	ids, err := s.uppers.backends.ListFrozen()
	if err != nil || len(ids) == 0 {
		return err
	}
	// Before the records are read: one that is pinned no more is in a record by now, or nobody needs it.
	pinned := s.pins.All()
	listed, err := s.volumes.FrozenInUse()
	if err != nil {
		return fmt.Errorf("find the frozen uppers that nothing uses: %w", err)
	}
	var failed error
	for _, id := range ids {
		if len(listed[id]) > 0 || pinned[id] > 0 {
			continue
		}
		if err := s.uppers.backends.DiscardFrozen(id); err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		klog.FromContext(ctx).Info("Frozen upper discarded", keyFrozen, id)
	}
	return failed
}
