package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
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

// same reports whether both are nil, or both have the same value.
func same[T comparable](a, b *T) bool {
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

// setGroup gives an upper that existed to the group of the publication.
func (p *publishing) setGroup(ctx context.Context) error {
	if !p.dirs.Existed {
		return nil
	}
	if p.publication.Group == nil {
		if err := p.takeWalkedGroup(); err != nil || p.publication.Group == nil {
			return err
		}
	}
	group, walked, err := groupChange{p.m.views, p.after, *p.publication.Group}.make(ctx, p.dirs.Upper)
	if err != nil {
		return fmt.Errorf("give the upper to group %d: %w", *p.publication.Group, err)
	}
	if sharesUpper(p.after) && (p.after.Group == nil || *p.after.Group != *group) {
		p.after.Group = group
		if walked && p.before != nil {
			// That is not undone.
			before := *p.before
			before.Group = group
			p.before = &before
		}
		// What pods write from now on is stored by this.
		if err := p.m.ledger.saveDurably(p.after); err != nil {
			return err
		}
	}
	if !walked {
		return nil
	}
	return linux.RemoveXattr(p.dirs.Upper, walkXattr)
}

// takeWalkedGroup has a publication without a group take the one to which the files of the upper were being given, for the first time,
// when that was cut off: some of them belong to it, and that of the others is not known as the volume's.
func (p *publishing) takeWalkedGroup() error {
	if !sharesUpper(p.after) {
		return nil
	}
	group, err := walkedGroup(p.dirs.Upper)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	p.publication.Group = &group
	return nil
}

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
	unfinished, err := xattr(dir, walkXattr)
	if err != nil || unfinished != "" {
		return err == nil, err
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

// walkXattr is an extended attribute of the root of an upper from before its files are given to a group until the record says so. Its
// value is walkPrefix and the group. Pods cannot set it.
const (
	walkXattr  = "trusted.overlay-csi.group-changing"
	walkPrefix = "gid="
)

// walkedGroup returns the group to which the files of an upper were being given when that was cut off. It returns ErrNotFound if it was
// not, and if the driver that did so did not store the group.
func walkedGroup(dir *os.File) (uint32, error) {
	value, err := xattr(dir, walkXattr)
	if err != nil {
		return 0, err
	}
	text, found := strings.CutPrefix(value, walkPrefix)
	group, err := strconv.ParseUint(text, 10, 32)
	if !found || err != nil {
		return 0, fmt.Errorf("%w: no change of the group of %s was cut off", errdefs.ErrNotFound, dir.Name())
	}
	return uint32(group), nil
}

// walkUpper gives all files of an upper that is not mounted to a group. What was interrupted is repeated by the next publish, for
// whichever group that is.
func walkUpper(ctx context.Context, dir *os.File, group uint32) error {
	root, err := linux.Open(dir, ".", os.O_RDONLY|linux.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := linux.SetXattr(root, walkXattr, []byte(walkPrefix+strconv.FormatUint(uint64(group), 10))); err != nil {
		return err
	}
	if done, err := chown.Tree(ctx, root, chown.Owners{Group: &group}); err != nil {
		return fmt.Errorf("%d files done: %w", done, err)
	}
	// The record may lie on another file system, and says that all files are changed.
	return linux.SyncDir(root)
}

// xattr returns an extended attribute of an open directory, "" if it does not have it.
func xattr(dir *os.File, name string) (string, error) {
	value, err := linux.GetXattr(dir, name)
	if errors.Is(err, syscall.ENODATA) {
		return "", nil
	}
	return string(value), err
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
	if r.Spec.Ownership != spec.OwnershipChown || (p.Group == nil && r.Spec.LayerOwner == nil) {
		return ""
	}
	owner := layerOwner(r, p)
	return fmt.Sprintf("%d:%d:%t", owner.UID, owner.GID, p.Group != nil)
}

// changeOwners goes over the files of the view before anybody has it, also for a pod that only reads, which gets it read-only afterwards.
// A view that is shared was gone over before it was mounted.
func (p *publishing) changeOwners(ctx context.Context) error {
	want := ownersMark(p.after, p.publication)
	if want == "" || p.shared != nil {
		return nil
	}
	has, err := xattr(p.dirs.Upper, ownersXattr)
	if err != nil || has == want {
		return err
	}
	if err := p.closeView(ctx); err != nil {
		return err
	}
	view, err := p.overlay()
	if err != nil {
		return err
	}
	if p.view, err = p.m.views.Detached(view); err != nil {
		return err
	}
	return walkView(ctx, p.view, p.after, p.publication)
}

// closeView unmounts a view that is at no target.
func (p *publishing) closeView(context.Context) error {
	if p.view == nil {
		return nil
	}
	// A copy in a process that is being started would keep the upper in use.
	defer linux.HoldStarts()()
	err := p.view.Close()
	p.view = nil
	return err
}

// walkView changes the owners and groups of the files of a view that is at no target yet. overlayfs copies up their metadata alone
// (overlayfs documentation, "Metadata only copy up"). A run that was interrupted is repeated, and leaves alone what is as requested.
func walkView(ctx context.Context, view *os.File, r *record.Record, p *record.Publication) error {
	root, err := linux.Open(view, ".", os.O_RDONLY|linux.O_DIRECTORY, 0)
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
