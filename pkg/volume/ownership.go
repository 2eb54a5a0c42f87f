package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume/chown"
)

// groupDirMode is what a pod's fsGroup may do with the root of a view.
const groupDirMode = chown.GroupDirMode

func sameGroup(a, b *uint32) bool {
	return (a == nil) == (b == nil) && (a == nil || *a == *b)
}

// groupFor returns the group that the files of a volume have for a pod: its fsGroup. A pod without one sees that of the last pod that
// had one, as with other volumes, whose files keep it.
func groupFor(r *record.Record, fsGroup *uint32) *uint32 {
	if fsGroup != nil || r.Group == nil {
		return fsGroup
	}
	group := r.Group.ID
	return &group
}

// newGroup returns the group of files that are stored with it.
func newGroup(id uint32) *record.Group { return &record.Group{ID: id, First: id, Stored: id} }

// groupChange gives an upper that exists to a group.
type groupChange struct {
	views  views
	record *record.Record
	group  uint32
}

// make gives the upper to the group, and returns how the group is then stored. The kernel shows the files of a persistent upper with
// the group, and none of them is changed. Where it cannot, and in another volume of the pod, which kubelet may give to the group as
// well, make goes over all files, as kubelet does: walked is true then. With ownership by walking, that is done later, for the whole
// view.
func (c groupChange) make(ctx context.Context, dir *os.File) (group *record.Group, walked bool, err error) {
	root, err := upper.RootAttrOf(dir)
	if err != nil {
		return nil, false, err
	}
	group = newGroup(c.group)
	if c.record.Spec.Ownership != spec.OwnershipChown && !c.record.Spec.Ephemeral() {
		if walked, err = c.mustWalk(dir, root, group); err != nil {
			return nil, false, err
		}
	}
	if walked {
		return newGroup(c.group), true, walkUpper(ctx, dir, c.group)
	}
	return group, false, upper.SetGroup(dir, group.Stored, groupDirMode)
}

// mustWalk reports whether the files of the upper have to be changed. If they do not, it says in group how they are stored.
func (c groupChange) mustWalk(dir *os.File, root upper.RootAttr, group *record.Group) (bool, error) {
	unfinished, err := hasXattr(dir, walkXattr)
	if err != nil || unfinished {
		return unfinished, err
	}
	if !sharesUpper(c.record) {
		return root.GID != c.group, nil
	}
	if old := c.record.Group; old != nil {
		group.First, group.Stored = old.First, old.Stored
	} else {
		group.Stored = root.GID
	}
	if group.Swaps() == nil {
		return false, nil
	}
	can, err := c.views.MapsGroups(dir, group.Swaps())
	return !can, err
}

// walkXattr is an extended attribute of the root of an upper from before its files are given to a group until the record says so. Pods
// cannot set it.
const walkXattr = "trusted.overlay-csi.group-changing"

// walkUpper gives all files of an upper that is not mounted to a group. What was interrupted is repeated by the next publish, for
// whichever group that is.
func walkUpper(ctx context.Context, dir *os.File, group uint32) error {
	root, err := linux.Open(dir, ".", os.O_RDONLY|linux.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := linux.SetXattr(root, walkXattr, []byte{'1'}); err != nil {
		return err
	}
	if done, err := chown.Tree(ctx, root, chown.Owners{Group: &group}); err != nil {
		return fmt.Errorf("%d files done: %w", done, err)
	}
	// The record may lie on another file system, and says that all files are changed.
	return linux.SyncDir(root)
}

func hasXattr(dir *os.File, name string) (bool, error) {
	_, err := linux.GetXattr(dir, name)
	if errors.Is(err, syscall.ENODATA) {
		return false, nil
	}
	return err == nil, err
}

// layerOwner returns the owner of the layers' files that belong to root. A pod's group takes precedence over the volume's.
func layerOwner(r *record.Record, p *record.Publication) overlay.IDs {
	var owner overlay.IDs
	if r.Spec.LayerOwner != nil {
		owner = overlay.IDs(*r.Spec.LayerOwner)
	}
	if p.Group != nil && r.Spec.Ownership != spec.OwnershipNone {
		owner.GID = *p.Group
	}
	return owner
}

// mappedOwner returns the owner that the kernel shows for the layers' files that belong to root.
func mappedOwner(r *record.Record, p *record.Publication) overlay.IDs {
	if r.Spec.Ownership == spec.OwnershipChown {
		return overlay.IDs{}
	}
	return layerOwner(r, p)
}

// rootAttr returns the attributes of the root of a new upper: those of the topmost layer as the view shows them, and open to the
// pod's group.
func rootAttr(r *record.Record, p *record.Publication, top *os.File) (upper.RootAttr, error) {
	root, err := upper.RootAttrOf(top)
	if err != nil {
		return upper.RootAttr{}, err
	}
	root.UID, root.GID = layerOwner(r, p).Map(root.UID, root.GID)
	if p.Group != nil {
		root.GID = *p.Group
		root.Mode |= groupDirMode
	}
	return root, nil
}

// ownersXattr is an extended attribute of the root of an upper. Its value says for whom the owners were changed. It is set after
// all files were changed, and pods cannot set it.
const ownersXattr = "trusted.overlay-csi.owners-changed"

// ownersMark returns the value of ownersXattr, "" if no owners are changed.
func ownersMark(r *record.Record, p *record.Publication) string {
	if r.Spec.Ownership != spec.OwnershipChown || p.Attributes.ReadOnly || (p.Group == nil && r.Spec.LayerOwner == nil) {
		return ""
	}
	owner := layerOwner(r, p)
	return fmt.Sprintf("%d:%d:%t", owner.UID, owner.GID, p.Group != nil)
}

// ownersChanged reports whether the owners of a mounted view's files are as requested.
func ownersChanged(r *record.Record, p *record.Publication) (bool, error) {
	want := ownersMark(r, p)
	if want == "" {
		return true, nil
	}
	value, err := linux.GetXattrAt(nil, p.Target, ownersXattr)
	if errors.Is(err, syscall.ENODATA) {
		return false, nil
	}
	return string(value) == want, err
}

// changeOwners changes the owners and groups of the files of a mounted view, once for each owner.
func changeOwners(ctx context.Context, r *record.Record, p *record.Publication) error {
	if done, err := ownersChanged(r, p); err != nil || done {
		return err
	}
	return walkView(ctx, r, p)
}

// walkView changes the owners and groups of the files of a mounted view. overlayfs copies up their metadata alone (overlayfs
// documentation, "Metadata only copy up"). A run that was interrupted is repeated, and leaves alone what is as requested.
func walkView(ctx context.Context, r *record.Record, p *record.Publication) error {
	root, err := linux.Open(nil, p.Target, os.O_RDONLY|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("change owners: %w", err)
	}
	defer root.Close()
	// The mark of other owners: from here on, not all files are theirs.
	if err := linux.RemoveXattr(root, ownersXattr); err != nil && !errors.Is(err, syscall.ENODATA) {
		return fmt.Errorf("change owners: %w", err)
	}
	owner := layerOwner(r, p)
	if done, err := chown.Tree(ctx, root, chown.Owners{UID: owner.UID, GID: owner.GID, Group: p.Group}); err != nil {
		return fmt.Errorf("change owners, %d files done: %w", done, err)
	}
	return linux.SetXattr(root, ownersXattr, []byte(ownersMark(r, p)))
}

// changeOwnersForWriters changes the owners of the files of mounted views for the pods that can write to them. The files are the same for
// all pods that share an upper, and a pod that only reads changes none.
func (v views) changeOwnersForWriters(ctx context.Context, r *record.Record) error {
	for i := range r.Publications {
		p := &r.Publications[i]
		if ownersMark(r, p) == "" {
			continue
		}
		live, err := v.isLive(p)
		if err != nil {
			return err
		}
		if live {
			return changeOwners(ctx, r, p)
		}
	}
	return nil
}

// finishOwners changes the owners of the files of a view that is mounted where a publish wants it, if a crash cut that off. If it
// fails, it unmounts the view, which no container has yet, unless another pod has it too.
func (v views) finishOwners(ctx context.Context, r *record.Record, here *record.Publication) error {
	if here.Attributes.ReadOnly && sharesUpper(r) {
		return v.changeOwnersForWriters(ctx, r)
	}
	if done, err := ownersChanged(r, here); err != nil || done {
		return err
	}
	err := walkView(ctx, r, here)
	if err == nil {
		return nil
	}
	_, otherErr := v.firstLive(r, here.Target)
	if errdefs.IsNotFound(otherErr) {
		return errors.Join(err, v.unmount(here.Target))
	}
	return err
}
