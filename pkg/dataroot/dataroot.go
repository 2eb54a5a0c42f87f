package dataroot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// The names in a data root. The package comment has the layout.
const (
	Volumes     = "volumes"
	Frozen      = "frozen"
	Snapshots   = "snapshots"
	Caches      = "caches"
	Layers      = "layers"
	Images      = "images"
	Mounter     = "mounter"
	Trash       = "trash"
	BallastDir  = "ballast"
	AdminSocket = "overlayctl.sock"

	// Record, PersistentMark and PodUppers are names in the directory of a volume.
	Record         = "volume.json"
	PersistentMark = "persistent"
	PodUppers      = "pods"

	// SnapshotRecord is a name in the directory of a snapshot, CacheRecord one in that of a cache.
	SnapshotRecord = "snapshot.json"
	CacheRecord    = "cache.json"
)

// ErrInUse is returned while another driver process uses the data root.
var ErrInUse = errors.New("another overlay-csi process uses this data root")

// Lock is a data root that belongs to this process.
type Lock struct {
	path    string
	dir     *os.File
	ballast *Ballast
}

// Acquire locks a data root for this process, and makes it if it is missing. It returns ErrInUse while another process has the
// lock. The kernel releases the lock when the process ends.
func Acquire(path string) (*Lock, error) {
	for _, name := range []string{Volumes, Frozen, Snapshots, Caches, Trash} {
		if err := os.MkdirAll(filepath.Join(path, name), 0o700); err != nil {
			return nil, fmt.Errorf("prepare the data root: %w", err)
		}
	}
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("resolve the data root: %w", err)
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the data root: %w", err)
	}
	if err := linux.Flock(dir); err != nil {
		dir.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrInUse, path)
		}
		return nil, fmt.Errorf("lock the data root: %w", err)
	}
	ballast, err := openBallast(filepath.Join(path, BallastDir))
	if err != nil {
		dir.Close()
		return nil, err
	}
	return &Lock{path, dir, ballast}, nil
}

// Path returns the path of the data root, absolute and without symbolic links.
func (l *Lock) Path() string { return l.path }

// Dir returns the data root, open for reading. The Lock closes it.
func (l *Lock) Dir() *os.File { return l.dir }

// Ballast returns the ballast of the data root.
func (l *Lock) Ballast() *Ballast { return l.ballast }

// Close unlocks the data root. Views stay mounted.
func (l *Lock) Close() error { return errors.Join(l.ballast.Close(), l.dir.Close()) }

// Root is an open data root.
type Root struct {
	path string
	// dir is on the mount through which uppers and layers are used. owned is set if it is not the handle of the lock.
	dir     *os.File
	owned   bool
	deleter *Deleter
	ballast *Ballast
}

// Open opens a locked data root. Uppers and layers are used through the handle that reopen returns, which is the same
// directory on another mount. If reopen is nil or returns nil, they are used through the directory itself.
func (l *Lock) Open(reopen func(dir *os.File) *os.File) (*Root, error) {
	deleter, err := NewDeleter(filepath.Join(l.path, Trash))
	if err != nil {
		return nil, fmt.Errorf("open the data root: %w", err)
	}
	root := &Root{path: l.path, dir: l.dir, deleter: deleter, ballast: l.ballast}
	if reopen != nil {
		if dir := reopen(l.dir); dir != nil {
			root.dir, root.owned = dir, true
		}
	}
	return root, nil
}

// Path returns the path of the data root, absolute and without symbolic links.
func (r *Root) Path() string { return r.path }

// VolumesDir returns the path of the directory that has the volumes.
func (r *Root) VolumesDir() string { return filepath.Join(r.path, Volumes) }

// Dir returns the data root, open. The Root closes it.
func (r *Root) Dir() *os.File { return r.dir }

// Discard moves a file or directory of the data root to the trash. It returns nil if path does not exist.
func (r *Root) Discard(path string) error {
	return r.ballast.With(func() error { return r.deleter.Discard(path) })
}

// AwaitDeleted waits until RunDeleter has deleted what was discarded before, as far as it can be deleted. It returns the cause if ctx
// is done first.
func (r *Root) AwaitDeleted(ctx context.Context) error { return r.deleter.Wait(ctx) }

// Discarded returns how many trees and files are in the trash. What an earlier process left counts as one.
func (r *Root) Discarded() uint64 { return r.deleter.Left() }

// RunDeleter deletes what is in the trash, until ctx is done.
func (r *Root) RunDeleter(ctx context.Context) { r.deleter.Run(ctx) }

// Close closes the handles. The data root stays locked until the Lock is closed.
func (r *Root) Close() error {
	err := r.deleter.Close()
	if r.owned {
		err = errors.Join(err, r.dir.Close())
	}
	return err
}
