package unpack

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"syscall"
)

// maxParents is the maximum number of open directories in the cache.
const maxParents = 64

// parent returns the open directory at name, a clean absolute path in the tree. It creates missing directories, and
// resolves links on the way within the tree. The unpacker owns the result.
func (u *unpacker) parent(name string) (dir, error) {
	if name == "/" {
		return u.root, nil
	}
	if dir, ok := u.parents[name]; ok {
		return dir, nil
	}
	opened, err := u.tree.open(strings.TrimPrefix(name, "/"), openPath)
	if errors.Is(err, syscall.ENOENT) {
		var above dir
		if above, err = u.parent(path.Dir(name)); err != nil {
			return nil, err
		}
		opened, err = u.makeImplied(above, path.Base(name))
	}
	if err != nil {
		return nil, fmt.Errorf("open directory %s: %w", shorten(name), err)
	}
	if len(u.parents) >= maxParents {
		u.closeParents()
	}
	u.parents[name] = opened
	return opened, nil
}

// closeParents empties the cache of open directories.
func (u *unpacker) closeParents() {
	for _, dir := range u.parents {
		dir.close()
	}
	clear(u.parents)
	u.stale = false
}

// isAbsent reports whether an error says that there is nothing at a path.
func isAbsent(err error) bool {
	return errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP)
}

// removeExisting removes what an earlier entry created at base, if anything.
func (u *unpacker) removeExisting(in dir, base string) error {
	was, err := in.stat(base)
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	u.stale = was == isDirectory || was == isSymlink
	return in.remove(base, was)
}
