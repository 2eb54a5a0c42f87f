package volume

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Stats is what a volume's upper takes of its limit, in bytes and inodes, without the layers. It is zero for a volume without
// an upper.
type Stats = upper.Usage

// Stats measures the volume that is published at path. It returns ErrNotFound if the volume is not mounted there.
func (m *Manager) Stats(ctx context.Context, id, path string) (Stats, error) {
	r, p, err := m.live(id, path)
	if err != nil || !hasUpper(r) {
		return Stats{}, err
	}
	if !r.Backend.CountsFiles() {
		return m.uppers.open(r, p).Usage(ctx)
	}
	return m.usage.get(ctx, path, func(ctx context.Context) (Stats, error) {
		// Once more: the count does not hold the volume's lock, and dropPublication ends only those that have begun.
		r, p, err := m.live(id, path)
		if err != nil {
			return Stats{}, err
		}
		return m.uppers.open(r, p).Usage(ctx)
	})
}

// live returns the record of a volume and its publication at path. It returns ErrNotFound if it is not mounted there.
func (m *Manager) live(id, path string) (*record.Record, *record.Publication, error) {
	r, p, err := published(m.records, id, path)
	if err != nil {
		return nil, nil, err
	}
	live, err := m.views.isLive(p)
	if err == nil && !live {
		err = fmt.Errorf("%w: volume %s is not mounted at %s", errdefs.ErrNotFound, id, path)
	}
	return r, p, err
}

// published returns the record of a volume and its publication at path. It returns ErrNotFound if there is none.
func published(records *record.Store, id, path string) (*record.Record, *record.Publication, error) {
	r, err := records.Load(id)
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, nil, err
	}
	if err != nil || r.Publication(path) == nil {
		return nil, nil, fmt.Errorf("%w: volume %s is not published at %s", errdefs.ErrNotFound, id, path)
	}
	return r, r.Publication(path), nil
}

// usageCache counts the files of uppers, and remembers the result: to count takes longer the more files there are. It counts an
// upper once at a time, for at most a twentieth of the time, and goes on when the caller no longer waits: a count that takes longer
// than kubelet's patience would otherwise never come to a result.
type usageCache struct {
	mu     sync.Mutex
	counts map[string]*count
}

// count is the last count of an upper, which may still be running.
type count struct {
	end  context.CancelFunc
	done chan struct{}
	// What follows is valid when done is closed.
	stats Stats
	err   error
	until time.Time
	// before is the result before this one, nil if there is none.
	before *Stats
}

// cacheFactor is the time for which a result is valid, as a multiple of the time that the count took.
const cacheFactor = 20

// get returns the usage of the upper at path, measured now or not long ago. If ctx ends during the count, it returns the result
// before this one, or ErrUnavailable.
func (u *usageCache) get(ctx context.Context, path string, measure func(context.Context) (Stats, error)) (Stats, error) {
	c := u.current(ctx, path, measure)
	select {
	case <-c.done:
		return c.stats, c.err
	case <-ctx.Done():
	}
	if c.before != nil {
		return *c.before, nil
	}
	return Stats{}, fmt.Errorf("%w: the files of the volume at %s are being counted", errdefs.ErrUnavailable, path)
}

// current returns the count of an upper that is running or valid, or a new one.
func (u *usageCache) current(ctx context.Context, path string, measure func(context.Context) (Stats, error)) *count {
	u.mu.Lock()
	defer u.mu.Unlock()
	last := u.counts[path]
	c := &count{done: make(chan struct{})}
	switch {
	case last == nil:
	case !last.isDone() || time.Now().Before(last.until):
		return last
	case last.err == nil:
		c.before = &last.stats
	default:
		c.before = last.before
	}
	ctx, c.end = context.WithCancel(context.WithoutCancel(ctx))
	if u.counts == nil {
		u.counts = map[string]*count{}
	}
	u.counts[path] = c
	go func() {
		defer c.end()
		defer close(c.done)
		began := time.Now()
		c.stats, c.err = measure(ctx)
		if c.err == nil {
			c.until = time.Now().Add(cacheFactor * time.Since(began))
		}
	}()
	return c
}

// forget ends the count of an upper and waits for its end, so that nothing in the upper is open.
func (u *usageCache) forget(path string) {
	u.mu.Lock()
	c := u.counts[path]
	delete(u.counts, path)
	u.mu.Unlock()
	if c != nil {
		c.end()
		<-c.done
	}
}

func (c *count) isDone() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}
