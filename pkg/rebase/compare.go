package rebase

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/diff"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	// maxXattrs is how many bytes of extended attributes of a file are compared, and compared how many bytes of content at once.
	maxXattrs = 1 << 20
	compared  = 256 << 10
)

// file is an entry of a tree, open by O_PATH. Its handle is nil if there is none.
type file struct {
	handle *os.File
	stat   linux.Stat
}

func (f file) there() bool     { return f.handle != nil }
func (f file) isDir() bool     { return f.there() && f.stat.IsDir() }
func (f file) isRegular() bool { return f.there() && f.stat.IsRegular() }

func (f file) close() {
	if f.handle != nil {
		f.handle.Close()
	}
}

// look opens an entry by a path on which no link leads elsewhere. dir may be nil: then there is none.
func look(dir *os.File, path string) (file, error) {
	if dir == nil {
		return file{}, nil
	}
	handle, err := linux.OpenAs(dir, path, "an entry of a view", linux.O_PATH|linux.O_NOFOLLOW, linux.ResolveBeneath|linux.ResolveNoSymlinks)
	if isGone(err) && !errors.Is(err, syscall.ESTALE) || errors.Is(err, syscall.ENAMETOOLONG) {
		return file{}, nil
	}
	if err != nil {
		return file{}, err
	}
	stat, err := linux.StatFile(handle)
	if err != nil {
		handle.Close()
		return file{}, err
	}
	return file{handle, stat}, nil
}

// isGone reports whether an error says that a file does not exist, or was replaced by one of another type.
func isGone(err error) bool {
	for _, gone := range []error{fs.ErrNotExist, syscall.ENOTDIR, syscall.ELOOP, syscall.ESTALE} {
		if errors.Is(err, gone) {
			return true
		}
	}
	return false
}

// kindOf returns what became of an entry.
func kindOf(before, after file) diff.Kind {
	switch {
	case !before.there():
		return diff.Added
	case !after.there():
		return diff.Deleted
	}
	return diff.Changed
}

// comparison compares entries of the old layers, the uppers and the new layers.
type comparison struct {
	ctx context.Context
	// oneFileSystem is set if all layers are on one file system: there, entries with one inode number are one file.
	oneFileSystem bool
}

// sameLayers reports whether an entry is in the new layers what it is in the old ones.
func (c comparison) sameLayers(before, after file) (bool, error) {
	if c.isOneFile(before, after) {
		return true, nil
	}
	return c.same(before, after)
}

// isOneFile reports whether both are certainly one file, that of a layer which the old and the new ones share: its content need not be
// read.
func (c comparison) isOneFile(a, b file) bool {
	return c.oneFileSystem && a.isRegular() && b.isRegular() && a.stat.Ino == b.stat.Ino && a.stat.Size == b.stat.Size &&
		a.stat.Ctim == b.stat.Ctim && a.stat.Mtim == b.stat.Mtim && a.stat.Uid == b.stat.Uid && a.stat.Gid == b.stat.Gid
}

// same reports whether two entries are the same in all but their times. Of directories, it does not compare what is in them.
func (c comparison) same(a, b file) (bool, error) {
	same, err := sameMetadata(a, b)
	if err != nil || !same || !a.there() {
		return same, err
	}
	switch {
	case a.stat.IsRegular():
		return c.sameContent(a, b)
	case a.stat.IsSymlink():
		first, err := linux.Readlinkat(a.handle, "")
		if err != nil {
			return false, err
		}
		second, err := linux.Readlinkat(b.handle, "")
		return first == second, err
	}
	return true, nil
}

// sameMetadata reports whether two entries have the same type, mode, owner, extended attributes and size.
func sameMetadata(a, b file) (bool, error) {
	if !a.there() || !b.there() {
		return a.there() == b.there(), nil
	}
	switch {
	case a.stat.Mode != b.stat.Mode, a.stat.Uid != b.stat.Uid, a.stat.Gid != b.stat.Gid, a.stat.Rdev != b.stat.Rdev,
		!a.stat.IsDir() && a.stat.Size != b.stat.Size:
		return false, nil
	}
	first, err := xattrsOf(a.handle)
	if err != nil {
		return false, err
	}
	second, err := xattrsOf(b.handle)
	return maps.Equal(first, second), err
}

// xattrsOf returns the extended attributes of a file. It returns ErrFailedPrecondition if they are too large to compare.
func xattrsOf(handle *os.File) (map[string]string, error) {
	names, err := linux.ListXattr(handle)
	found, size := map[string]string{}, 0
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return found, nil
	}
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		value, err := linux.GetXattr(handle, name)
		if errors.Is(err, syscall.ENODATA) || errors.Is(err, syscall.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if size += len(name) + len(value); size > maxXattrs {
			return nil, fmt.Errorf("%w: it has extended attributes of more than %d bytes", errdefs.ErrFailedPrecondition, maxXattrs)
		}
		found[name] = string(value)
	}
	return found, nil
}

// sameContent reports whether two regular files have the same content. It reads up to the first difference.
func (c comparison) sameContent(a, b file) (bool, error) {
	if a.stat.Size != b.stat.Size {
		return false, nil
	}
	if c.isOneFile(a, b) || a.stat.Size == 0 {
		return true, nil
	}
	first, err := linux.Reopen(a.handle, os.O_RDONLY)
	if err != nil {
		return false, err
	}
	defer first.Close()
	second, err := linux.Reopen(b.handle, os.O_RDONLY)
	if err != nil {
		return false, err
	}
	defer second.Close()
	buffers := [2][]byte{make([]byte, min(compared, a.stat.Size+1)), make([]byte, min(compared, a.stat.Size+1))}
	for {
		if c.ctx.Err() != nil {
			return false, context.Cause(c.ctx)
		}
		n, errFirst := io.ReadFull(first, buffers[0])
		m, errSecond := io.ReadFull(second, buffers[1])
		if !bytes.Equal(buffers[0][:n], buffers[1][:m]) {
			return false, nil
		}
		for _, err := range []error{errFirst, errSecond} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return false, err
			}
		}
		if errFirst != nil {
			return errSecond != nil, nil
		}
	}
}
