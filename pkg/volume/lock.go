package volume

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// lockWait is how long an operation waits for another one on the same volume before it gets Aborted. It is shorter than kubelet's
// timeout of 2 minutes, so that an operation behind an unmount that hangs is answered.
const lockWait = 30 * time.Second

// locks has one lock for each volume.
type locks struct {
	mu   sync.Mutex
	held map[string]*volumeLock
}

type volumeLock struct {
	token chan struct{}
	users int
}

func newLocks() *locks { return &locks{held: map[string]*volumeLock{}} }

// acquire locks a volume. It waits until ctx is done, at most lockWait, and then returns ErrAborted, as the CSI specification
// requires while an operation on the volume is pending.
func (l *locks) acquire(ctx context.Context, id string) (unlock func(), err error) {
	l.mu.Lock()
	lock, ok := l.held[id]
	if !ok {
		lock = &volumeLock{token: make(chan struct{}, 1)}
		l.held[id] = lock
	}
	lock.users++
	l.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	select {
	case lock.token <- struct{}{}:
		return func() { <-lock.token; l.leave(id, lock) }, nil
	case <-ctx.Done():
		l.leave(id, lock)
		return nil, fmt.Errorf("%w: another operation on volume %s is in progress; try again", errdefs.ErrAborted, id)
	}
}

// tryAcquire locks a volume if it is not locked.
func (l *locks) tryAcquire(id string) (unlock func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, held := l.held[id]; held {
		return nil, false
	}
	lock := &volumeLock{token: make(chan struct{}, 1), users: 1}
	lock.token <- struct{}{}
	l.held[id] = lock
	return func() { <-lock.token; l.leave(id, lock) }, true
}

// isHeld reports whether an operation on a volume is in progress.
func (l *locks) isHeld(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, held := l.held[id]
	return held
}

func (l *locks) leave(id string, lock *volumeLock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lock.users--
	if lock.users == 0 {
		delete(l.held, id)
	}
}
