// Package chown changes the owners, groups and modes of all files of a tree, as kubelet does for other volumes
// (SetVolumeOwnership).
package chown

import (
	"context"
	"errors"
	"io/fs"
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

// change changes one file, as linux.Visit. A pod may put another file or a link in place of an entry at any moment, so that the file is
// met by a handle.
func (c *changer) change(dir *os.File, name string, stat linux.Stat) error {
	c.done++
	if c.want(stat) == stateOf(stat) {
		return nil
	}
	c.changed = true
	if name == "" {
		return c.apply(dir, stat)
	}
	file, err := linux.Open(dir, name, linux.O_PATH|linux.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	if stat, err = linux.StatFile(file); err != nil {
		return err
	}
	return c.apply(file, stat)
}

// state is what is changed of a file.
type state struct{ uid, gid, mode uint32 }

func stateOf(stat linux.Stat) state { return state{stat.Uid, stat.Gid, stat.Perm()} }

// want returns the state that a file is to have.
func (c *changer) want(stat linux.Stat) state {
	want := stateOf(stat)
	if want.uid == 0 {
		want.uid = c.owners.UID
	}
	switch {
	case c.owners.Group != nil:
		want.gid = *c.owners.Group
		want.mode |= groupMode(stat)
	case want.gid == 0:
		want.gid = c.owners.GID
	}
	return want
}

// apply changes an open file.
func (c *changer) apply(file *os.File, stat linux.Stat) error {
	has, want := stateOf(stat), c.want(stat)
	if has.uid != want.uid || has.gid != want.gid {
		if err := linux.Fchownat(file, "", want.uid, want.gid); err != nil {
			return err
		}
		// chown(2) clears these.
		has.mode &^= syscall.S_ISUID | syscall.S_ISGID
	}
	if want.mode == has.mode || stat.IsSymlink() {
		return nil
	}
	return linux.Fchmodat(file, "", want.mode)
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
