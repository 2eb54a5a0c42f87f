package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	trashName = "trash"
	// trashDelay is how long the trash waits after something came, so that a burst of unpublishes is over before its
	// deletions begin.
	trashDelay = time.Second
	// trashNice is the niceness of the thread that deletes: pods and RPCs come first.
	trashNice = 19
	// trashBatch is how many entries are removed between two pauses, each as long as the batch took: deleting a large
	// upper takes half of one core and half of the disk's time at most.
	trashBatch = 256
	// trashDepth is how deep a tree is followed before what is deeper is moved to the top: a pod may have made
	// directories deeper than there are file descriptors.
	trashDepth = 64
)

// trash is where uppers go that are no longer wanted. Moving one there takes a rename, whatever its size; one goroutine
// deletes, and starts again where it was cut off. It is a directory of the data root, so that the rename is possible.
type trash struct {
	dir  string
	next atomic.Uint64
	wake chan struct{}
}

func newTrash(dir string) *trash { return &trash{dir: dir, wake: make(chan struct{}, 1)} }

// put moves a file or directory to the trash. What does not exist is already gone.
func (t *trash) put(path string) error {
	err := unix.Rename(path, filepath.Join(t.dir, t.name()))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("move %s to the trash: %w", path, err)
	}
	select {
	case t.wake <- struct{}{}:
	default:
	}
	return nil
}

// name is new in this process, and not one of an earlier process, which began at another time.
func (t *trash) name() string {
	return strconv.FormatInt(time.Now().UnixNano(), 36) + "-" + strconv.FormatUint(t.next.Add(1), 36)
}

// run deletes what is in the trash and what comes, until ctx is done.
func (t *trash) run(ctx context.Context) {
	// Not unlocked: the thread, whose niceness stays, ends with this goroutine.
	runtime.LockOSThread()
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, trashNice); err != nil {
		klog.FromContext(ctx).Info("The trash is deleted at normal priority", "reason", err.Error())
	}
	for {
		if err := t.empty(ctx); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Some of the trash cannot be deleted; it is tried again with the next")
		}
		select {
		case <-ctx.Done():
			return
		case <-t.wake:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(trashDelay):
		}
	}
}

// empty deletes what is in the trash at the moment.
func (t *trash) empty(ctx context.Context) error {
	root, err := os.OpenRoot(t.dir)
	if err != nil {
		return fmt.Errorf("open the trash: %w", err)
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return fmt.Errorf("list the trash: %w", err)
	}
	var failed error
	pace := pace{began: time.Now()}
	for _, entry := range entries {
		if err := t.remove(ctx, root, entry.Name(), 0, &pace); err != nil {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}

// remove deletes a tree without following any link in it.
func (t *trash) remove(ctx context.Context, parent *os.Root, name string, depth int, pace *pace) error {
	err := parent.Remove(name)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return pace.step(ctx)
	}
	if !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("delete from the trash: %w", err)
	}
	if depth >= trashDepth {
		moved := filepath.Join(t.dir, t.name())
		if err := os.Rename(filepath.Join(parent.Name(), name), moved); err != nil {
			return fmt.Errorf("move a deep directory up in the trash: %w", err)
		}
		select {
		case t.wake <- struct{}{}:
		default:
		}
		return nil
	}
	dir, err := parent.OpenRoot(name)
	if err != nil {
		return fmt.Errorf("delete from the trash: %w", err)
	}
	defer dir.Close()
	if err := t.removeEntries(ctx, dir, depth, pace); err != nil {
		return err
	}
	if err := parent.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete from the trash: %w", err)
	}
	return pace.step(ctx)
}

func (t *trash) removeEntries(ctx context.Context, dir *os.Root, depth int, pace *pace) error {
	for {
		// A directory is read from its beginning for each batch: its order changes while entries go.
		handle, err := dir.Open(".")
		if err != nil {
			return fmt.Errorf("read a directory in the trash: %w", err)
		}
		entries, err := handle.ReadDir(trashBatch)
		handle.Close()
		if len(entries) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read a directory in the trash: %w", err)
		}
		for _, entry := range entries {
			if err := t.remove(ctx, dir, entry.Name(), depth+1, pace); err != nil {
				return err
			}
		}
	}
}

// pace spreads deletions over time.
type pace struct {
	began time.Time
	done  int
}

func (p *pace) step(ctx context.Context) error {
	p.done++
	if p.done < trashBatch {
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
