package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

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

// changeOwners changes the owners and groups of the files of a mounted view, once for each owner. overlayfs copies up their
// metadata alone (overlayfs documentation, "Metadata only copy up"). A run that was interrupted is repeated, and leaves alone what is
// as requested.
func changeOwners(ctx context.Context, r *record.Record, p *record.Publication) error {
	mark := ownersMark(r, p)
	if mark == "" {
		return nil
	}
	if done, err := ownersChanged(r, p); err != nil || done {
		return err
	}
	root, err := linux.Open(nil, p.Target, os.O_RDONLY|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("change owners: %w", err)
	}
	defer root.Close()
	owner := layerOwner(r, p)
	if done, err := chown.Tree(ctx, root, chown.Owners{UID: owner.UID, GID: owner.GID, Group: p.Group}); err != nil {
		return fmt.Errorf("change owners, %d files done: %w", done, err)
	}
	return linux.SetXattr(root, ownersXattr, []byte(mark))
}
