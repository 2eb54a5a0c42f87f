// Package chown changes the owners, groups and modes of all files of a tree, as kubelet does for other volumes
// (SetVolumeOwnership).
package chown

import (
	"context"
	"errors"
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
func Tree(ctx context.Context, root *os.File, owners Owners) (done int, err error) {
	w := walker{owners: owners}
	err = w.directory(ctx, root)
	return w.done, err
}

type walker struct {
	owners Owners
	done   int
}

// batch is the number of names of a directory that are read at once.
const batch = 1024

// directory changes an open directory, after what is in it.
func (w *walker) directory(ctx context.Context, dir *os.File) error {
	for {
		names, err := dir.Readdirnames(batch)
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
	return w.change(dir, "")
}

func (w *walker) entry(ctx context.Context, dir *os.File, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	child, err := linux.Open(dir, name, os.O_RDONLY|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
		return w.change(dir, name)
	}
	if err != nil {
		return err
	}
	defer child.Close()
	return w.directory(ctx, child)
}

// change changes one file: an entry of a directory, or without a name the directory itself.
func (w *walker) change(dir *os.File, name string) error {
	stat, err := linux.Fstatat(dir, name)
	if err != nil {
		return err
	}
	w.done++
	uid, gid, mode := stat.Uid, stat.Gid, stat.Perm()
	if uid == 0 {
		uid = w.owners.UID
	}
	switch {
	case w.owners.Group != nil:
		gid = *w.owners.Group
		mode |= groupMode(stat)
	case gid == 0:
		gid = w.owners.GID
	}
	has := stat.Perm()
	if uid != stat.Uid || gid != stat.Gid {
		if err := linux.Fchownat(dir, name, uid, gid); err != nil {
			return err
		}
		// chown(2) clears these.
		has &^= syscall.S_ISUID | syscall.S_ISGID
	}
	if stat.IsSymlink() || mode == has {
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
