package layer

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// ProtectedDir is the driver's data root. No layer may be in it or contain it, since the upper of one volume would be a layer of
// another one. Directories are compared by device and inode, so that a bind mount of the data root is recognized.
type ProtectedDir struct {
	path string
	self linux.FileID
	// above are the directories that contain self.
	above map[linux.FileID]bool
}

// NewProtectedDir protects a directory. It must exist.
func NewProtectedDir(path string) (ProtectedDir, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return ProtectedDir{}, fmt.Errorf("resolve the data root: %w", err)
	}
	stat, err := linux.StatPath(path)
	if err != nil {
		return ProtectedDir{}, fmt.Errorf("data root: %w", err)
	}
	protected := ProtectedDir{path: path, self: stat.ID(), above: map[linux.FileID]bool{}}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		stat, err := linux.StatPath(dir)
		if err != nil {
			return ProtectedDir{}, fmt.Errorf("directory above the data root: %w", err)
		}
		protected.above[stat.ID()] = true
		if dir == "/" {
			return protected, nil
		}
	}
}

// check returns ErrInvalidArgument if a directory, whose ID is id, and which was opened beneath root, is in the protected directory or
// contains it. It walks up by "..", which the kernel resolves from where the directory is, whatever links led to it.
func (p ProtectedDir) check(root linux.FileID, dir *os.File, id linux.FileID) error {
	if p.above[id] {
		return fmt.Errorf("%w: the directory contains the driver's data root %s", errdefs.ErrInvalidArgument, p.path)
	}
	up := ""
	for at, below := id, (linux.FileID{}); at != below; {
		if at == p.self {
			return fmt.Errorf("%w: the directory is in the driver's data root %s", errdefs.ErrInvalidArgument, p.path)
		}
		if at == root {
			return nil
		}
		below = at
		up += "../"
		parent, err := linux.Fstatat(dir, up)
		if err != nil {
			return err
		}
		at = parent.ID()
	}
	// The root of the file system: the directory was moved out of its layer root after it was opened.
	return nil
}

// isBeneath reports whether a path is dir or in dir.
func isBeneath(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}
