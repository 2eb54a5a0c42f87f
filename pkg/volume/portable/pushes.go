package portable

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/semaphore"
	"k8s.io/klog/v2"
)

// Keys of log messages.
const (
	keySnapshot = "snapshot"
	keyDuration = "duration"
)

// abandonAfter is the time after which a push that nobody asks for ends. external-snapshotter asks every few minutes.
const abandonAfter = 10 * time.Minute

// errAbandoned is the cause of the end of a push that nobody asks for.
var errAbandoned = fmt.Errorf("%w: nobody has asked for the snapshot for %s, and its push has ended; it goes on now",
	errdefs.ErrUnavailable, abandonAfter)

// Pushes are the pushes of snapshots that run. A push goes on after the request that began it.
type Pushes struct {
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
	// slots bounds how many pushes run at a time. Others wait.
	slots        *semaphore.Weighted
	abandonAfter time.Duration

	mu      sync.Mutex
	running map[string]*push
	// failed are the errors of the last pushes that nobody has been told.
	failed map[string]error
}

// push is a push that runs, or waits for its turn.
type push struct {
	cancel  context.CancelCauseFunc
	abandon *time.Timer
	done    chan struct{}
}

// NewPushes returns a Pushes that runs parallel pushes at a time. Its pushes log to the logger of ctx, and end with Close.
func NewPushes(ctx context.Context, parallel int) *Pushes {
	p := &Pushes{
		slots: semaphore.NewWeighted(int64(parallel)), abandonAfter: abandonAfter, running: map[string]*push{}, failed: map[string]error{},
	}
	p.ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return p
}

// Close ends all pushes, and waits until they have ended.
func (p *Pushes) Close() {
	p.cancel()
	p.work.Wait()
}

// Continue has the snapshot with an ID pushed by do, unless that runs already. It does not wait for it. It returns the error of the last
// push, once: a caller that repeats its request learns why the snapshot is not in the registry, and the push is tried again all
// the same.
func (p *Pushes) Continue(id string, do func(ctx context.Context) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return fmt.Errorf("%w: the driver ends", errdefs.ErrUnavailable)
	}
	if current := p.running[id]; current != nil {
		current.abandon.Reset(p.abandonAfter)
		return nil
	}
	last := p.failed[id]
	delete(p.failed, id)
	ctx, cancel := context.WithCancelCause(p.ctx)
	current := &push{cancel: cancel, done: make(chan struct{})}
	current.abandon = time.AfterFunc(p.abandonAfter, func() { cancel(errAbandoned) })
	p.running[id] = current
	p.work.Go(func() { p.run(ctx, id, current, do) })
	return last
}

func (p *Pushes) run(ctx context.Context, id string, current *push, do func(ctx context.Context) error) {
	logger := klog.FromContext(ctx).WithValues(keySnapshot, id)
	began := time.Now()
	err := p.slots.Acquire(ctx, 1)
	if err == nil {
		logger.Info("Pushing snapshot")
		err = do(klog.NewContext(ctx, logger))
		p.slots.Release(1)
	}
	if errors.Is(context.Cause(ctx), errAbandoned) && err != nil {
		err = errAbandoned
	}
	current.abandon.Stop()
	stopped := errors.Is(context.Cause(ctx), context.Canceled)
	current.cancel(nil)
	duration := time.Since(began).Round(time.Millisecond).String()
	switch {
	case err == nil:
		logger.Info("Snapshot pushed", keyDuration, duration)
	case !stopped:
		logger.Error(err, "Could not push snapshot", keyDuration, duration)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.running, id)
	if err != nil && !stopped {
		p.failed[id] = err
	}
	close(current.done)
}

// Stop ends the push of a snapshot that is to be deleted, and waits until it has ended.
func (p *Pushes) Stop(id string) {
	p.mu.Lock()
	current := p.running[id]
	delete(p.failed, id)
	p.mu.Unlock()
	if current == nil {
		return
	}
	current.cancel(nil)
	<-current.done
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.failed, id)
}
