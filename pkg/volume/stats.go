package volume

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Stats is how much a volume's upper takes, in bytes and inodes, and what is left to it: the upper alone, none of the
// layers. Of a volume without an upper it is nothing.
type Stats = upper.Usage

// Stats measures the volume that is published at path. It is of the kind NotFound where the volume is not there.
func (m *Manager) Stats(ctx context.Context, id, path string) (Stats, error) {
	r, p, err := m.published(id, path)
	if err != nil {
		return Stats{}, err
	}
	live, err := m.isLive(p)
	if err != nil {
		return Stats{}, err
	}
	if !live {
		return Stats{}, fmt.Errorf("%w: volume %s is not mounted at %s", errdefs.ErrNotFound, id, path)
	}
	if r.Spec.Upper == spec.UpperNone {
		return Stats{}, nil
	}
	usage := func() (Stats, error) { return m.openUpper(r, p).Usage(ctx) }
	if r.Kept.CountsFiles() {
		return m.counts.of(path, usage)
	}
	return usage()
}

// published is the record of a volume and its publication at path.
func (m *Manager) published(id, path string) (*record, *publication, error) {
	r, err := m.states.load(id)
	if err != nil {
		return nil, nil, err
	}
	if r == nil || r.publication(path) == nil {
		return nil, nil, fmt.Errorf("%w: volume %s is not published at %s", errdefs.ErrNotFound, id, path)
	}
	return r, r.publication(path), nil
}

// counts remembers what was found by counting files, which takes the longer the more there are: of one volume, a
// twentieth of the time is spent on that at most.
type counts struct {
	mu    sync.Mutex
	found map[string]counted
}

type counted struct {
	stats Stats
	until time.Time
}

// countedShare is how many times as long as a count took its result is used again.
const countedShare = 20

func (c *counts) of(path string, count func() (Stats, error)) (Stats, error) {
	began := time.Now()
	c.mu.Lock()
	before, ok := c.found[path]
	c.mu.Unlock()
	if ok && began.Before(before.until) {
		return before.stats, nil
	}
	stats, err := count()
	if err != nil {
		return Stats{}, err
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.found == nil {
		c.found = map[string]counted{}
	}
	c.found[path] = counted{stats, now.Add(countedShare * now.Sub(began))}
	for other, found := range c.found {
		if now.After(found.until) {
			delete(c.found, other)
		}
	}
	return stats, nil
}
