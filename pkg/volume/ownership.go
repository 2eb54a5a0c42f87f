package volume

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// groupDirMode and groupFileMode are what a pod's fsGroup may do, as kubelet gives it in other volumes
// (SetVolumeOwnership): new files in a directory belong to the group.
const (
	groupDirMode  = 0o2770
	groupFileMode = 0o660
)

func sameGroup(a, b *uint32) bool {
	return (a == nil) == (b == nil) && (a == nil || *a == *b)
}

// owner is whom root's files of the layers are to belong to. A pod's group comes before the volume's.
func (r *record) owner(p *publication) overlay.IDs {
	var owner overlay.IDs
	if r.Spec.LayerOwner != nil {
		owner = overlay.IDs{UID: r.Spec.LayerOwner.UID, GID: r.Spec.LayerOwner.GID}
	}
	if p.Group != nil && r.Spec.Ownership != spec.OwnershipNone {
		owner.GID = *p.Group
	}
	return owner
}

// shownOwner is the owner where the kernel only shows it.
func (r *record) shownOwner(p *publication) overlay.IDs {
	if r.Spec.Ownership == spec.OwnershipChown {
		return overlay.IDs{}
	}
	return r.owner(p)
}

// root is what the root of a new upper looks like: as the topmost layer's, with the owner that the view shows it with, and
// open to the pod's group.
func (r *record) root(p *publication, top *os.File) (upper.RootAttr, error) {
	root, err := upper.RootAttrOf(top)
	if err != nil {
		return upper.RootAttr{}, err
	}
	root.UID, root.GID = r.owner(p).Map(root.UID, root.GID)
	if p.Group != nil {
		root.GID = *p.Group
		root.Mode |= groupDirMode
	}
	return root, nil
}

// walkedName is the attribute on the root of an upper that says for whom the files have been gone over. It is written when
// that is done, and pods cannot.
const walkedName = "trusted.overlay-csi.walked"

// walkMark is what the attribute says, "" where there is nothing to be done.
func (r *record) walkMark(p *publication) string {
	if r.Spec.Ownership != spec.OwnershipChown || p.Attributes.ReadOnly || (p.Group == nil && r.Spec.LayerOwner == nil) {
		return ""
	}
	owner := r.owner(p)
	return fmt.Sprintf("%d:%d:%t", owner.UID, owner.GID, p.Group != nil)
}

// isWalked reports whether the files of a view have been gone over, or need not be.
func (r *record) isWalked(p *publication) (bool, error) {
	want := r.walkMark(p)
	if want == "" {
		return true, nil
	}
	value := make([]byte, 64)
	n, err := unix.Lgetxattr(p.Target, walkedName, value)
	if errors.Is(err, unix.ENODATA) {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "getxattr " + walkedName, Path: p.Target, Err: err}
	}
	return string(value[:n]) == want, nil
}

// unmountUnfinished takes a view away whose publish ended while its files were gone over. No container has it yet.
func (m *Manager) unmountUnfinished(before *record, req PublishRequest) error {
	if before == nil || req.Spec.Ownership != spec.OwnershipChown || before.publication(req.Target) == nil {
		return nil
	}
	if err := m.unmount(req.Target); err != nil {
		return fmt.Errorf("publish volume %s again: %w", req.VolumeID, err)
	}
	return nil
}

// walk goes over the files of a view that is mounted, once for each owner, and gives them to their owner and group. Only
// metadata is copied up (overlayfs documentation, "Metadata only copy up"). One that was cut off goes on: what is as it
// should be is left alone.
func (r *record) walk(ctx context.Context, p *publication) error {
	mark := r.walkMark(p)
	if mark == "" {
		return nil
	}
	if done, err := r.isWalked(p); err != nil || done {
		return err
	}
	root, err := os.OpenFile(p.Target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("go over the files for their owner: %w", err)
	}
	defer root.Close()
	w := walker{owner: r.owner(p), group: p.Group}
	if err := w.directory(ctx, root); err != nil {
		return fmt.Errorf("go over the files for their owner, %d done: %w", w.done, err)
	}
	if err := unix.Fsetxattr(int(root.Fd()), walkedName, []byte(mark), 0); err != nil {
		return &os.PathError{Op: "setxattr " + walkedName, Path: p.Target, Err: err}
	}
	return nil
}

// walker changes owners, groups and modes. It follows no link, and looks up each name in a directory that it has open.
type walker struct {
	owner overlay.IDs
	group *uint32
	done  int
}

// walkBatch is how many names of a directory are read at once.
const walkBatch = 1024

// directory goes over an open directory, what is in it first.
func (w *walker) directory(ctx context.Context, dir *os.File) error {
	for {
		names, err := dir.Readdirnames(walkBatch)
		for _, name := range names {
			if err := w.entry(ctx, dir, name); err != nil {
				return err
			}
		}
		if len(names) == 0 {
			break
		}
		if err != nil {
			return err
		}
	}
	return w.change(dir, "", dir.Name())
}

func (w *walker) entry(ctx context.Context, dir *os.File, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	path := dir.Name() + "/" + name
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return w.change(dir, name, path)
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	child := os.NewFile(uintptr(fd), path)
	defer child.Close()
	return w.directory(ctx, child)
}

// change changes one file, a directory's entry or, without a name, the directory itself.
func (w *walker) change(dir *os.File, name, path string) error {
	var stat unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &stat, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	w.done++
	uid, gid, mode := stat.Uid, stat.Gid, stat.Mode&0o7777
	if uid == 0 {
		uid = w.owner.UID
	}
	switch {
	case w.group != nil:
		gid = *w.group
		mode |= groupMode(stat.Mode)
	case gid == 0:
		gid = w.owner.GID
	}
	if uid != stat.Uid || gid != stat.Gid {
		if err := unix.Fchownat(int(dir.Fd()), name, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH); err != nil {
			return &os.PathError{Op: "chown", Path: path, Err: err}
		}
		// chown(2) takes these away.
		stat.Mode &^= unix.S_ISUID | unix.S_ISGID
	}
	if stat.Mode&unix.S_IFMT == unix.S_IFLNK || mode == stat.Mode&0o7777 {
		return nil
	}
	if name == "" {
		name = "."
	}
	if err := unix.Fchmodat(int(dir.Fd()), name, mode, 0); err != nil {
		return &os.PathError{Op: "chmod", Path: path, Err: err}
	}
	return nil
}

// groupMode is what the group may do with a file of that kind.
func groupMode(mode uint32) uint32 {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return groupDirMode
	case unix.S_IFREG:
		return groupFileMode
	}
	return 0
}
