// Package lock excludes operations on one volume from each other, and keeps what they read.
package lock

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// lockWait is how long an operation waits for another one on the same volume before it gets Aborted. It is shorter than kubelet's
// timeout of 2 minutes, so that an operation behind an unmount that hangs is answered.
const lockWait = 30 * time.Second

// Locks has one lock for each volume.
type Locks struct {
	mu      sync.Mutex
	held    map[string]*volumeLock
	readers map[string]*reader
}

// reader reads the files of a volume, without its lock, until somebody else wants the volume.
type reader struct {
	revoke context.CancelCauseFunc
	done   chan struct{}
}

type volumeLock struct {
	token chan struct{}
	users int
}

// NewLocks returns locks of which none is held.
func NewLocks() *Locks { return &Locks{held: map[string]*volumeLock{}, readers: map[string]*reader{}} }

// ErrRevoked is why a reader has to end.
var ErrRevoked = fmt.Errorf("%w: the volume was mounted, unmounted or changed while it was read; try again", errdefs.ErrAborted)

// AddReader lets the caller, which holds the lock of a volume, read its files also when it has released the lock. The context is done when
// another operation has the lock, which then waits until the caller has closed all files and called end.
func (l *Locks) AddReader(ctx context.Context, id string) (_ context.Context, end func()) {
	ctx, revoke := context.WithCancelCause(ctx)
	r := &reader{revoke, make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.readers[id] = r
	return ctx, sync.OnceFunc(func() {
		revoke(nil)
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.readers, id)
		close(r.done)
	})
}

// revoke ends the reader of a volume, and waits until it has.
func (l *Locks) revoke(ctx context.Context, id string) error {
	l.mu.Lock()
	r := l.readers[id]
	l.mu.Unlock()
	if r == nil {
		return nil
	}
	r.revoke(ErrRevoked)
	select {
	case <-r.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: the files of volume %s are being read; try again", errdefs.ErrAborted, id)
	}
}

// Acquire locks a volume, and ends its reader. It waits until ctx is done, at most lockWait, and then returns ErrAborted, as the CSI
// specification requires while an operation on the volume is pending.
func (l *Locks) Acquire(ctx context.Context, id string) (unlock func(), err error) {
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
		unlock := func() { <-lock.token; l.leave(id, lock) }
		if err := l.revoke(ctx, id); err != nil {
			unlock()
			return nil, err
		}
		return unlock, nil
	case <-ctx.Done():
		l.leave(id, lock)
		return nil, fmt.Errorf("%w: another operation on volume %s is in progress; try again", errdefs.ErrAborted, id)
	}
}

// TryAcquire locks a volume if it is not locked.
func (l *Locks) TryAcquire(id string) (unlock func(), ok bool) {
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

// IsHeld reports whether an operation on a volume is in progress.
func (l *Locks) IsHeld(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, held := l.held[id]
	return held
}

// Pins keep frozen uppers from being discarded that no record lists: those that are being made or read for long.
type Pins struct {
	mu    sync.Mutex
	count map[string]int
}

// NewPins returns pins that keep nothing.
func NewPins() *Pins { return &Pins{count: map[string]int{}} }

// Pin keeps frozen uppers until unpin is called. The caller holds snapshots.listing for reading, or nobody has made them yet.
func (p *Pins) Pin(ids ...string) (unpin func()) {
	p.add(ids, 1)
	return sync.OnceFunc(func() { p.add(ids, -1) })
}

func (p *Pins) add(ids []string, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, id := range ids {
		if p.count[id] += n; p.count[id] == 0 {
			delete(p.count, id)
		}
	}
}

// All returns the frozen uppers that are pinned now.
func (p *Pins) All() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.count)
}

func (l *Locks) leave(id string, lock *volumeLock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lock.users--
	if lock.users == 0 {
		delete(l.held, id)
	}
}
