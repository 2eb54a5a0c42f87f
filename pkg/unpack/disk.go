package unpack

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// diskTree is a tree in a directory.
type diskTree struct {
	top *os.File
	// topPath is the path of the directory, without links.
	topPath string
	scratch string
	// replaced counts the directories that were moved to scratch.
	replaced int
}

// makeDiskTree makes the directory of a tree.
func makeDiskTree(path, scratch string) (*diskTree, error) {
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	top, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	topPath, err := linux.CurrentPath(top)
	if err != nil {
		top.Close()
		return nil, err
	}
	return &diskTree{top: top, topPath: topPath, scratch: scratch}, nil
}

func (t *diskTree) root() dir { return &diskDir{diskNode{t.top, ""}, t} }

func (t *diskTree) close() { t.top.Close() }

func (t *diskTree) open(path string, how openHow) (dir, error) {
	flags, resolve := linux.O_PATH, uint64(linux.ResolveInRoot|linux.ResolveNoMagicLinks)
	switch how {
	case openPath:
	case openToSetTimes:
		flags = os.O_RDONLY
	case openNoLinks:
		flags, resolve = linux.O_PATH|linux.O_NOFOLLOW, linux.ResolveBeneath|linux.ResolveNoSymlinks
	}
	opened, err := linux.Open(t.top, "./"+path, flags|linux.O_DIRECTORY, resolve)
	if err != nil {
		return nil, err
	}
	return &diskDir{diskNode{opened, ""}, t}, nil
}

// diskNode is the file base in a directory, or an open file with an empty base.
type diskNode struct {
	file *os.File
	base string
}

func (n diskNode) chown(uid, gid uint32) error { return linux.Fchownat(n.file, n.base, uid, gid) }

func (n diskNode) chmod(mode uint32) error { return linux.Fchmodat(n.file, n.base, mode) }

func (n diskNode) setXattr(name string, value []byte) error {
	if n.base == "" {
		return linux.SetXattr(n.file, name, value)
	}
	return linux.SetXattrAt(n.file, n.base, name, value)
}

func (n diskNode) setTimes(accessed, modified time.Time) error {
	if n.base == "" {
		return linux.Futimens(n.file, accessed, modified)
	}
	return linux.Utimensat(n.file, n.base, accessed, modified)
}

// diskDir is an open directory.
type diskDir struct {
	diskNode
	tree *diskTree
}

func (d *diskDir) close() { d.file.Close() }

func (d *diskDir) path() (string, error) {
	path, err := linux.CurrentPath(d.file)
	if err != nil {
		return "", err
	}
	name, ok := strings.CutPrefix(path, d.tree.topPath+"/")
	if !ok {
		return "", fmt.Errorf("find the path of a directory: %s is not in %s", path, d.tree.topPath)
	}
	return name, nil
}

func (d *diskDir) getXattr(name string) ([]byte, error) { return linux.GetXattr(d.file, name) }

func (d *diskDir) removeXattr(name string) error { return linux.RemoveXattr(d.file, name) }

func (d *diskDir) stat(name string) (kind, error) {
	stat, err := linux.Fstatat(d.file, name)
	switch {
	case err != nil:
		return isOther, err
	case stat.IsDir():
		return isDirectory, nil
	case stat.IsSymlink():
		return isSymlink, nil
	case stat.IsWhiteout():
		return isWhiteout, nil
	}
	return isOther, nil
}

func (d *diskDir) open(name string) (dir, error) {
	opened, err := linux.Open(d.file, name, os.O_RDONLY|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	return &diskDir{diskNode{opened, ""}, d.tree}, nil
}

func (d *diskDir) entry(name string) (node, error) { return diskNode{d.file, name}, nil }

func (d *diskDir) mkdir(name string, mode uint32) error { return linux.Mkdirat(d.file, name, mode) }

func (d *diskDir) create(name string, size int64) (file, error) {
	opened, err := linux.OpenFile(d.file, name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|linux.O_NOFOLLOW, 0o600, 0)
	if err != nil {
		return nil, err
	}
	return &diskFile{diskNode{opened, ""}, size, 0}, nil
}

func (d *diskDir) symlink(target, name string) error { return linux.Symlinkat(target, d.file, name) }

func (d *diskDir) mknod(name string, mode uint32, device uint64) error {
	return linux.Mknodat(d.file, name, mode, device)
}

func (d *diskDir) link(from dir, target, name string) error {
	return linux.Linkat(from.(*diskDir).file, target, d.file, name)
}

// remove moves a directory to scratch, which the caller removes.
func (d *diskDir) remove(name string, of kind) error {
	if of != isDirectory {
		return linux.Unlinkat(d.file, name)
	}
	d.tree.replaced++
	old := filepath.Join(d.tree.scratch, "replaced-"+strconv.Itoa(d.tree.replaced))
	return linux.Renameat(d.file, name, nil, old, 0)
}

// diskFile is an open regular file.
type diskFile struct {
	diskNode
	// size is the size that it is to have, end the end of what was written.
	size, end int64
}

// WriteAt implements file. What is between two parts becomes a hole.
func (f *diskFile) WriteAt(data []byte, offset int64) (int, error) {
	f.end = offset + int64(len(data))
	return f.file.WriteAt(data, offset)
}

func (f *diskFile) finish() error {
	if f.end < f.size {
		return f.file.Truncate(f.size)
	}
	return nil
}

func (f *diskFile) close() { f.file.Close() }
