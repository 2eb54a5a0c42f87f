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
	r, p, err := m.published(id, path)
	if err != nil {
		return Stats{}, err
	}
	live, err := m.views.isLive(p)
	if err != nil {
		return Stats{}, err
	}
	if !live {
		return Stats{}, fmt.Errorf("%w: volume %s is not mounted at %s", errdefs.ErrNotFound, id, path)
	}
	if !hasUpper(r) {
		return Stats{}, nil
	}
	measure := func() (Stats, error) { return m.uppers.open(r, p).Usage(ctx) }
	if r.Backend.CountsFiles() {
		return m.usage.get(path, measure)
	}
	return measure()
}

// published returns the record of a volume and its publication at path. It returns ErrNotFound if there is none.
func (m *Manager) published(id, path string) (*record.Record, *record.Publication, error) {
	r, err := m.records.Load(id)
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, nil, err
	}
	if err != nil || r.Publication(path) == nil {
		return nil, nil, fmt.Errorf("%w: volume %s is not published at %s", errdefs.ErrNotFound, id, path)
	}
	return r, r.Publication(path), nil
}

// usageCache caches the usage of uppers whose files have to be counted, which takes longer the more there are. Counting takes
// at most a twentieth of the time.
type usageCache struct {
	mu      sync.Mutex
	entries map[string]usageEntry
}

type usageEntry struct {
	stats Stats
	until time.Time
}

// cacheFactor is the time for which a result is valid, as a multiple of the time that the count took.
const cacheFactor = 20

// get returns the usage of the upper at path, measured now or not long ago.
func (c *usageCache) get(path string, measure func() (Stats, error)) (Stats, error) {
	began := time.Now()
	c.mu.Lock()
	cached, ok := c.entries[path]
	c.mu.Unlock()
	if ok && began.Before(cached.until) {
		return cached.stats, nil
	}
	stats, err := measure()
	if err != nil {
		return Stats{}, err
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries == nil {
		c.entries = map[string]usageEntry{}
	}
	c.entries[path] = usageEntry{stats, now.Add(cacheFactor * now.Sub(began))}
	for other, entry := range c.entries {
		if now.After(entry.until) {
			delete(c.entries, other)
		}
	}
	return stats, nil
}
