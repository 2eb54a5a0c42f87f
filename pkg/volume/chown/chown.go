// Package chown changes the owners, groups and modes of all files of a tree, as kubelet does for other volumes
// (SetVolumeOwnership).
package chown

import (
	"context"
	"os"
	"syscall"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// GroupDirMode and groupFileMode are the permissions of the group: new files in a directory belong to the group too.
const (
	GroupDirMode  = 0o2770
	groupFileMode = 0o660
)

// Owners are the owners of the files of a tree.
type Owners struct {
	// UID and GID replace user and group 0.
	UID, GID uint32
	// Group, if not nil, is the group of all files, which may read and write them.
	Group *uint32
}

// Tree changes a directory, which is open for reading, and all beneath it. It follows no symbolic link, and leaves alone what is as
// requested. It returns the number of files that it has looked at.
//
// A change can move an entry of a merged directory of overlayfs to another position. Where a deep tree was read in parts, files may
// then have been left out, and Tree goes over it again until nothing was left to change.
func Tree(ctx context.Context, root *os.File, owners Owners) (done int, err error) {
	c := changer{owners: owners}
	for {
		c.changed = false
		reread, err := linux.Walk(ctx, root, c.change)
		if err != nil || !reread || !c.changed {
			return c.done, err
		}
	}
}

type changer struct {
	owners  Owners
	done    int
	changed bool
}

// change changes one file, as linux.Visit.
func (c *changer) change(dir *os.File, name string, stat linux.Stat) error {
	c.done++
	uid, gid, mode := stat.Uid, stat.Gid, stat.Perm()
	if uid == 0 {
		uid = c.owners.UID
	}
	switch {
	case c.owners.Group != nil:
		gid = *c.owners.Group
		mode |= groupMode(stat)
	case gid == 0:
		gid = c.owners.GID
	}
	has := stat.Perm()
	if stat.IsSymlink() {
		mode = has
	}
	if uid == stat.Uid && gid == stat.Gid && mode == has {
		return nil
	}
	c.changed = true
	if uid != stat.Uid || gid != stat.Gid {
		if err := linux.Fchownat(dir, name, uid, gid); err != nil {
			return err
		}
		// chown(2) clears these.
		has &^= syscall.S_ISUID | syscall.S_ISGID
	}
	if mode == has {
		return nil
	}
	return linux.Fchmodat(dir, name, mode)
}

// groupMode returns the permissions of the group for a file.
func groupMode(stat linux.Stat) uint32 {
	switch {
	case stat.IsDir():
		return GroupDirMode
	case stat.IsRegular():
		return groupFileMode
	}
	return 0
}
