package unpack

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// maxParents is the maximum number of open directories in the cache.
const maxParents = 64

// parent returns the open directory at name, a clean absolute path in the tree. It creates missing directories, and
// resolves links on the way within the tree. The unpacker owns the result.
func (u *unpacker) parent(name string) (*os.File, error) {
	if name == "/" {
		return u.root, nil
	}
	if dir, ok := u.parents[name]; ok {
		return dir, nil
	}
	dir, err := linux.Open(u.root, "."+name, linux.O_PATH|linux.O_DIRECTORY, linux.ResolveInRoot|linux.ResolveNoMagicLinks)
	if errors.Is(err, syscall.ENOENT) {
		var above *os.File
		if above, err = u.parent(path.Dir(name)); err != nil {
			return nil, err
		}
		dir, err = u.makeImplied(above, path.Base(name))
	}
	if err != nil {
		return nil, fmt.Errorf("open directory %s: %w", shorten(name), err)
	}
	if len(u.parents) >= maxParents {
		u.closeParents()
	}
	u.parents[name] = dir
	return dir, nil
}

// closeParents empties the cache of open directories.
func (u *unpacker) closeParents() {
	for _, dir := range u.parents {
		dir.Close()
	}
	clear(u.parents)
	u.stale = false
}

// isAbsent reports whether an error says that there is nothing at a path.
func isAbsent(err error) bool {
	return errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP)
}

// removeExisting removes the file that an earlier entry created at base, if any. It moves a directory to scratch.
func (u *unpacker) removeExisting(dir *os.File, base string) error {
	stat, err := linux.Fstatat(dir, base)
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	if !stat.IsDir() {
		u.stale = stat.IsSymlink()
		return linux.Unlinkat(dir, base)
	}
	u.stale = true
	u.replaced++
	old := filepath.Join(u.scratch, "replaced-"+strconv.Itoa(u.replaced))
	return linux.Renameat(dir, base, nil, old, 0)
}
