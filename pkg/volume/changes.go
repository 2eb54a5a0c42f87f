package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/diff"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Changes is what was written to a volume, open for reading until Close.
type Changes struct {
	Tree   diff.Tree
	ctx    context.Context
	layers *layer.ResolvedLayers
	// owner is that which the layers' files of root have.
	owner overlay.IDs
	// closers are called by Close, the last one first.
	closers []func()
}

// Context is done when the changes must be closed: another operation wants the volume.
func (c *Changes) Context() context.Context { return c.ctx }

// Close closes all files.
func (c *Changes) Close() {
	for _, close := range slices.Backward(c.closers) {
		close()
	}
	c.closers = nil
}

func (c *Changes) onClose(do func()) { c.closers = append(c.closers, do) }

// own closes files with the changes.
func (c *Changes) own(files ...*os.File) { c.onClose(func() { closeAll(files) }) }

// ReadChanges opens what was written to a volume as it is now, to look at it. Pods may go on to write. Nothing on the disk changes, and
// nobody waits: whoever wants the volume, as a publish does, has the context of the changes end, and goes on once they are
// closed. pod is the UID of the pod whose view is read, "" for the one that there is. It returns ErrNotFound if there is no such volume
// or view.
func (m *Manager) ReadChanges(ctx context.Context, id, pod string) (*Changes, error) {
	return m.openChanges(ctx, id, func(c *Changes, r *record.Record) error {
		if err := m.finishFreezing(r); err != nil {
			return err
		}
		var end func()
		c.ctx, end = m.locks.AddReader(ctx, r.ID)
		c.onClose(end)
		p, err := m.publicationToRead(r, pod)
		if errdefs.IsNotFound(err) && pod == "" && r.Spec.Persistent() {
			return m.openAtRest(c, r)
		}
		if err != nil {
			return err
		}
		return m.openInUse(c, r, p)
	})
}

// CaptureChanges opens what was written to a volume until now, as it was at one moment, to keep it. It freezes the upper of a volume that
// is not mounted, as a snapshot does, and copies one that pods write to; see snapshots.capture. The volume may be published and deleted
// while the changes are open. Frozen uppers that no record lists any more are discarded by a later reconciliation.
func (m *Manager) CaptureChanges(ctx context.Context, id string) (*Changes, error) {
	return m.openChanges(ctx, id, func(c *Changes, r *record.Record) error {
		if !r.Spec.Persistent() {
			return fmt.Errorf("%w: the volume has upper %q: only what was written to one with upper claim can be kept",
				errdefs.ErrFailedPrecondition, r.Spec.Upper)
		}
		m.listing.RLock()
		defer m.listing.RUnlock()
		frozen, err := m.capture(ctx, r)
		if err != nil {
			return err
		}
		// Until the files are closed: a copy is in no record, and the volume may be deleted.
		c.onClose(m.pins.Pin(idsOf(frozen)...))
		captured := *r
		if len(frozen) > len(r.Frozen) {
			c.onClose(func() { m.discardCopy(ctx, frozen[0].ID) })
		}
		captured.Frozen = frozen
		c.ctx = ctx
		return m.openFrozenChanges(c, &captured, nil)
	})
}

func (m *Manager) discardCopy(ctx context.Context, id string) {
	if err := m.uppers.backends.DiscardFrozen(id); err != nil {
		klog.FromContext(ctx).Error(err, "Could not discard a frozen upper, reconcile will", keyFrozen, id)
	}
}

// openChanges calls open with the lock of a volume and its record.
func (m *Manager) openChanges(ctx context.Context, id string, open func(*Changes, *record.Record) error) (*Changes, error) {
	if err := record.CheckID(id); err != nil {
		return nil, err
	}
	unlock, err := m.locks.Acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	unlock = sync.OnceFunc(unlock)
	defer unlock()
	r, err := m.records.Load(id)
	if err != nil {
		return nil, err
	}
	c := &Changes{}
	if !hasUpper(r) {
		err = fmt.Errorf("%w: the volume is read-only (upper: none)", errdefs.ErrFailedPrecondition)
	} else {
		err = open(c, r)
	}
	if err != nil {
		unlock()
		c.Close()
		return nil, fmt.Errorf("open the changes of volume %s: %w", id, err)
	}
	return c, nil
}

// publicationToRead returns the publication of a pod, or of any pod if all share one upper or there is only one. It returns ErrNotFound if
// no view is mounted.
func (m *Manager) publicationToRead(r *record.Record, pod string) (*record.Publication, error) {
	var found []*record.Publication
	for i := range r.Publications {
		p := &r.Publications[i]
		if pod != "" && p.Pod.UID != pod {
			continue
		}
		live, err := m.views.isLive(p)
		if err != nil {
			return nil, err
		}
		if live {
			found = append(found, p)
		}
	}
	switch {
	case len(found) == 0 && pod != "":
		return nil, fmt.Errorf("%w: pod %s has no view of the volume on this node", errdefs.ErrNotFound, pod)
	case len(found) == 0:
		return nil, fmt.Errorf("%w: no pod has the volume mounted, and what is written to it goes with the pod", errdefs.ErrNotFound)
	case len(found) > 1 && pod == "" && !sharesUpper(r):
		return nil, fmt.Errorf("%w: %d pods have uppers of their own, among them %s; say which pod", errdefs.ErrInvalidArgument, len(found),
			found[0].Pod)
	}
	return found[0], nil
}

// openInUse opens the view of a pod, and the upper that it writes to.
func (m *Manager) openInUse(c *Changes, r *record.Record, p *record.Publication) error {
	if err := m.openLayers(c, r, p); err != nil {
		return err
	}
	frozen, err := m.openFrozen(c.ctx, placedOf(r))
	if err != nil {
		return err
	}
	c.own(frozen...)
	target, err := linux.Open(nil, p.Target, linux.O_PATH|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer target.Close()
	// A file that is open on the mount itself would keep kubelet from unmounting it.
	clone, err := linux.OpenTree(target, "")
	if err != nil {
		return err
	}
	c.own(clone)
	if c.Tree.View, err = c.reopen(clone); err != nil {
		return err
	}
	path, _ := m.uppers.open(r, p).Paths()
	upperDir, err := linux.Open(nil, path, linux.O_PATH|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	c.own(upperDir)
	return c.setUppers(slices.Concat([]*os.File{upperDir}, frozen))
}

// openAtRest opens the upper of a volume that is not mounted.
func (m *Manager) openAtRest(c *Changes, r *record.Record) error {
	if r.Backend == "" {
		return m.openFrozenChanges(c, r, nil) // It was never published.
	}
	u := m.uppers.open(r, nil)
	if err := checkNotLost(u, r, m.records.Dir(r.ID)); err != nil {
		return err
	}
	there, err := u.Exists()
	if err != nil || !there {
		return errors.Join(err, m.openFrozenChanges(c, r, nil))
	}
	if err := m.checkFree(u); err != nil {
		return err
	}
	dirs, err := u.Prepare(c.ctx, upper.RootAttr{Mode: 0o755})
	if err != nil {
		return err
	}
	c.onClose(func() {
		dirs.Close()
		m.releaseRead(c.ctx, r.ID, u)
	})
	return m.openFrozenChanges(c, r, dirs.Upper)
}

// releaseRead releases an upper at rest that was read. Another operation that has the volume finds it in use, and releases it itself.
func (m *Manager) releaseRead(ctx context.Context, id string, u upper.Upper) {
	unlock, ok := m.locks.TryAcquire(id)
	if !ok {
		return
	}
	defer unlock()
	if err := u.Release(context.WithoutCancel(ctx)); err != nil {
		klog.FromContext(ctx).Error(err, "Could not release an upper that was read", keyVolume, id)
	}
}

// openFrozenChanges opens overlays of the frozen uppers of a volume, below an upper at rest if there is one, and of its layers.
func (m *Manager) openFrozenChanges(c *Changes, r *record.Record, resting *os.File) error {
	p := &record.Publication{}
	if r.Group != nil {
		p.Group = &r.Group.ID
	}
	if err := m.openLayers(c, r, p); err != nil {
		return err
	}
	dirs, err := m.openFrozen(c.ctx, placedOf(r))
	if err != nil {
		return err
	}
	c.own(dirs...)
	// For the names, before the kernel takes the directories.
	if err := c.setUppers(dirs); err != nil {
		return err
	}
	frozen, err := frozenLowers(r, p, placedOf(r), dirs)
	if err != nil {
		return err
	}
	if resting != nil {
		lower := overlay.FrozenUpper{Dir: resting}
		if r.Spec.Ownership != spec.OwnershipChown {
			lower.Groups = r.Group.Swaps()
		}
		frozen = slices.Concat([]overlay.FrozenUpper{lower}, frozen)
		top, err := c.reopen(resting)
		if err != nil {
			return err
		}
		c.Tree.Uppers = slices.Concat([]*os.File{top}, c.Tree.Uppers)
	}
	if len(frozen) == 0 {
		c.Tree.View = c.Tree.Base
		return nil
	}
	c.Tree.View, err = m.views.OpenDetached(overlay.Spec{
		Frozen: frozen, Lowers: c.layers.Dirs, LayerOwner: mappedOwner(r, p),
	})
	if err != nil {
		return fmt.Errorf("mount what was written: %w", err)
	}
	c.own(c.Tree.View)
	return nil
}

// openLayers opens the layers of a volume, and an overlay of them alone.
func (m *Manager) openLayers(c *Changes, r *record.Record, p *record.Publication) error {
	layers, err := m.config.Layers.Resolve(c.ctx, r.Spec.Layers, layer.Request{Pod: p.Pod, Digests: r.Resolved})
	if err != nil {
		return err
	}
	c.layers = layers
	c.onClose(layers.Close)
	owner := mappedOwner(r, p)
	c.owner = owner
	if owner != (overlay.IDs{}) {
		// A layer has the owners that the kernel maps: the mapping exchanges IDs, so that it is its own inverse.
		c.Tree.Owner = owner.Map
	}
	caches := placedCaches(r, layers)
	dirs, err := m.openFrozen(c.ctx, caches)
	if err != nil {
		return err
	}
	defer closeAll(dirs)
	frozen, err := frozenLowers(r, p, caches, dirs)
	if err != nil {
		return err
	}
	c.Tree.Base, err = m.views.OpenDetached(overlay.Spec{Frozen: frozen, Lowers: layers.Dirs, LayerOwner: owner})
	if err != nil {
		return fmt.Errorf("mount the layers: %w", err)
	}
	c.own(c.Tree.Base)
	return nil
}

// setUppers opens the directories of uppers for reading.
func (c *Changes) setUppers(dirs []*os.File) error {
	for _, dir := range dirs {
		readable, err := c.reopen(dir)
		if err != nil {
			return err
		}
		c.Tree.Uppers = append(c.Tree.Uppers, readable)
	}
	return nil
}

// reopen opens a directory once more, for reading.
func (c *Changes) reopen(dir *os.File) (*os.File, error) {
	readable, err := linux.Open(dir, ".", os.O_RDONLY|linux.O_DIRECTORY, 0)
	if err == nil {
		c.own(readable)
	}
	return readable, err
}
