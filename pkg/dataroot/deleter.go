package dataroot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	// deleteDelay is the time between the first discard and the deletion: a burst of unpublishes ends before it begins.
	deleteDelay = time.Second
	// deleteNice is the niceness of the thread that deletes: pods and RPCs come first.
	deleteNice = 19
	// deleteBatch is the number of entries that are deleted between two pauses. A pause is as long as the batch before it, so
	// that deletion takes at most half of one core and of the disk's time.
	deleteBatch = 256
)

// Deleter deletes directory trees in the background. Discard moves a tree to the trash, which is a rename and takes the same
// time for each size; Run deletes what is in the trash, also what an earlier process left. Trees are followed by handles,
// because a pod may have made paths of any length.
type Deleter struct {
	trash *os.File
	next  atomic.Uint64
	wake  chan struct{}
	// levels is treeLevels.
	levels int

	// discarded counts what was discarded. What an earlier process left counts as the first.
	discarded atomic.Uint64
	mu        sync.Mutex
	// deleted is how much of it Run has dealt with. changed is closed when it changes.
	deleted uint64
	changed chan struct{}
}

// NewDeleter returns a deleter with the trash in dir. What it discards must be on the file system of dir.
func NewDeleter(dir string) (*Deleter, error) {
	trash, err := linux.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	d := &Deleter{trash: trash, wake: make(chan struct{}, 1), levels: treeLevels, changed: make(chan struct{})}
	d.discarded.Store(1)
	return d, nil
}

// Close closes the trash. It must not be called before Run has returned.
func (d *Deleter) Close() error { return d.trash.Close() }

// Discard moves a file or directory to the trash. It returns nil if path does not exist.
func (d *Deleter) Discard(path string) error {
	err := d.moveToTrash(path)
	if errors.Is(err, syscall.EROFS) {
		// The kernel looks at that first.
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("move %s to the trash: %w", path, err)
	}
	return nil
}

func (d *Deleter) moveToTrash(path string) error {
	if err := linux.Renameat(nil, path, d.trash, d.newName(), linux.RenameNoReplace); err != nil {
		return err
	}
	d.discarded.Add(1)
	select {
	case d.wake <- struct{}{}:
	default:
	}
	return nil
}

// newName returns a name that neither this process nor an earlier one, which started at another time, has used.
func (d *Deleter) newName() string {
	return strconv.FormatInt(time.Now().UnixNano(), 36) + "-" + strconv.FormatUint(d.next.Add(1), 36)
}

// Run deletes what is in the trash, and what is discarded later, until ctx is done.
func (d *Deleter) Run(ctx context.Context) {
	// There is no unlock: the thread, whose niceness stays, ends with this goroutine.
	runtime.LockOSThread()
	if err := linux.Setpriority(deleteNice); err != nil {
		klog.FromContext(ctx).Info("Deleting at normal priority", "reason", err.Error())
	}
	for {
		discarded := d.discarded.Load()
		if err := d.empty(ctx); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Could not delete all of the trash")
		}
		d.setDeleted(discarded)
		select {
		case <-ctx.Done():
			return
		case <-d.wake:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(deleteDelay):
		}
	}
}

func (d *Deleter) setDeleted(count uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.deleted = count
	close(d.changed)
	d.changed = make(chan struct{})
}

// Left returns how many trees and files were discarded, and have not been dealt with by Run. What an earlier process left counts as one.
func (d *Deleter) Left() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.discarded.Load() - d.deleted
}

// Wait waits until Run has deleted what was discarded before, as far as it can be deleted. It returns the cause if ctx is done first.
func (d *Deleter) Wait(ctx context.Context) error {
	discarded := d.discarded.Load()
	for {
		d.mu.Lock()
		deleted, changed := d.deleted, d.changed
		d.mu.Unlock()
		if deleted >= discarded {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-changed:
		}
	}
}

// empty deletes what is in the trash now.
func (d *Deleter) empty(ctx context.Context) error {
	trash, err := openToList(d.trash, ".")
	if err != nil {
		return err
	}
	defer trash.Close()
	names, err := trash.Readdirnames(-1)
	if err != nil {
		return err
	}
	var failed error
	pace := pace{began: time.Now()}
	for _, name := range names {
		failed = errors.Join(failed, d.remove(ctx, trash, name, &pace))
		if ctx.Err() != nil {
			break
		}
	}
	return failed
}

// remove deletes the tree that the trash has under a name. It follows no symbolic link.
func (d *Deleter) remove(ctx context.Context, trash *os.File, name string, pace *pace) error {
	err := removeOne(trash, name)
	if isNotEmpty(err) {
		t := tree{name: trash.Name() + "/" + name + "/…", levels: d.levels, pace: pace}
		if err := t.remove(ctx, trash, name); err != nil {
			return err
		}
		err = removeOne(trash, name)
	}
	return errors.Join(err, pace.step(ctx))
}

func openToList(dir *os.File, name string) (*os.File, error) {
	return linux.Open(dir, name, os.O_RDONLY|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
}

// pace spreads deletions over time.
type pace struct {
	began time.Time
	done  int
}

func (p *pace) step(ctx context.Context) error {
	p.done++
	if p.done < deleteBatch {
		return ctx.Err()
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(time.Since(p.began)):
	}
	*p = pace{began: time.Now()}
	return nil
}
