package volume

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// lockWait is how long an operation waits for another one on the same volume: a twin that only takes its time is so
// answered as if it came later, and one behind an unmount that hangs is told that before kubelet gives up (2 minutes).
const lockWait = 30 * time.Second

// locks let one operation at a time work on a volume. Volumes do not wait for each other.
type locks struct {
	mu   sync.Mutex
	held map[string]*volumeLock
}

type volumeLock struct {
	token chan struct{}
	users int
}

func newLocks() *locks { return &locks{held: map[string]*volumeLock{}} }

// acquire waits for the volume, at most lockWait and as long as ctx lets it. The error is of the kind Aborted, which
// is the CSI specification's for an operation that is pending on the volume. The caller calls unlock.
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
		return nil, fmt.Errorf("%w: another operation on volume %s is under way: try again", errdefs.ErrAborted, id)
	}
}

// tryAcquire takes the volume if nobody has it.
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

func (l *locks) leave(id string, lock *volumeLock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lock.users--
	if lock.users == 0 {
		delete(l.held, id)
	}
}
