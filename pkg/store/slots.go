package store

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

const (
	// slotTurn is the time that a fetch waits for a slot before the slowest download must give its slot up.
	slotTurn = 2 * time.Minute
	// maxSlotTurn is the longest time that a download keeps its slot while others wait.
	maxSlotTurn = 32 * slotTurn
)

// errSlotLost is the cause of the end of a fetch that must wait for a slot again.
var errSlotLost = errors.New("another layer gets the slot of this slow download")

// slots bounds the number of layers that are downloaded and unpacked at the same time, and shares them fairly:
//
//   - No registry has all of the slots, if there is more than one. Archives count as one registry.
//   - A free slot goes to the registry that has the fewest. Of those that have as few, each has its turn, however many fetches of the
//     others wait. In a registry it goes to the fetch that has waited longest.
//   - When a fetch has waited for slotTurn, the slowest download gives its slot up and waits again.
//   - A download that begins again whenever it is continued keeps its slot for longer each time, until it is complete. Only one
//     does at a time, whatever registries answer.
type slots struct {
	total int

	mu sync.Mutex
	// round is that of the slot that was granted last.
	round int
	// held and waiting are in the order in which they began.
	held    []*slot
	waiting []*slot
}

// slot is the slot of a fetch, or its wait for one.
type slot struct {
	slots *slots
	// host is the registry of the fetch.
	host string
	// round orders the slots of registries that have equally many. Each registry has one slot in a round.
	round int
	// turn is the time after which the slot may be lost.
	turn time.Duration
	// remaining returns the number of bytes left to download.
	remaining func() int64
	// lose ends the fetch. It is nil for a fetch that keeps its slot.
	lose    func()
	granted chan struct{}

	// The lock of the slots guards these. since is the time when the slot was granted, and before what remained then.
	since  time.Time
	before int64
	isLost bool
}

// slotClock measures how long at least one fetch that a pull needs has had a slot.
type slotClock struct {
	mu sync.Mutex
	// running is the number of fetches that have a slot, began when it was last 0, and before the time that was measured until then.
	running int
	began   time.Time
	before  time.Duration
}

func (c *slotClock) start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running++; c.running == 1 {
		c.began = time.Now()
	}
}

func (c *slotClock) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running--; c.running == 0 {
		c.before += time.Since(c.began)
	}
}

func (c *slotClock) elapsed() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running > 0 {
		return c.before + time.Since(c.began)
	}
	return c.before
}

func newSlots(total int) *slots { return &slots{total: max(total, 1)} }

// acquire waits until a slot is free for a fetch from a registry. The fetch keeps the slot for turn at least, if no other has more than
// slotTurn.
func (s *slots) acquire(
	ctx context.Context, host string, turn time.Duration, remaining func() int64, lose func(),
) (*slot, error) {
	wanted := &slot{slots: s, host: host, turn: turn, remaining: remaining, lose: lose, granted: make(chan struct{})}
	s.mu.Lock()
	// A registry that comes back must not stay ahead of another one's second fetch.
	wanted.round = s.round + 1
	for _, other := range slices.Concat(s.held, s.waiting) {
		if other.host == host {
			wanted.round = max(wanted.round, other.round+1)
		}
	}
	s.waiting = append(s.waiting, wanted)
	s.grantLocked()
	s.mu.Unlock()
	ticker := time.NewTicker(slotTurn)
	defer ticker.Stop()
	for {
		select {
		case <-wanted.granted:
			return wanted, nil
		case <-ctx.Done():
			wanted.release()
			return nil, context.Cause(ctx)
		case <-ticker.C:
			s.takeFromSlowest(wanted)
		}
	}
}

// count returns how many slots are held, and how many fetches wait for one.
func (s *slots) count() (held, waiting int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.held), len(s.waiting)
}

// release frees the slot, or ends the wait for it.
func (w *slot) release() {
	s := w.slots
	s.mu.Lock()
	defer s.mu.Unlock()
	is := func(other *slot) bool { return other == w }
	s.held, s.waiting = slices.DeleteFunc(s.held, is), slices.DeleteFunc(s.waiting, is)
	s.grantLocked()
}

// grantLocked grants the free slots.
func (s *slots) grantLocked() {
	for len(s.held) < s.total {
		var next *slot
		for _, candidate := range s.waiting {
			if s.mayHaveLocked(candidate.host) && (next == nil || s.compareLocked(candidate, next) < 0) {
				next = candidate
			}
		}
		if next == nil {
			return
		}
		s.waiting = slices.DeleteFunc(s.waiting, func(other *slot) bool { return other == next })
		if slices.ContainsFunc(s.held, func(held *slot) bool { return held.turn > slotTurn }) {
			next.turn = slotTurn
		}
		s.held = append(s.held, next)
		s.round = max(s.round, next.round)
		next.since, next.before = time.Now(), next.remaining()
		close(next.granted)
	}
}

// compareLocked compares fetches that wait. The lower one gets a free slot first, and the one that began first if they are equal.
func (s *slots) compareLocked(a, b *slot) int {
	return cmp.Or(cmp.Compare(s.countLocked(a.host), s.countLocked(b.host)), cmp.Compare(a.round, b.round))
}

// mayHaveLocked reports whether a registry may have another slot.
func (s *slots) mayHaveLocked(host string) bool { return s.countLocked(host) < max(s.total-1, 1) }

// countLocked returns the number of slots that a registry has.
func (s *slots) countLocked(host string) int {
	var count int
	for _, held := range s.held {
		if held.host == host {
			count++
		}
	}
	return count
}

// takeFromSlowest ends the slowest download, unless wanted waits for its own registry or a slot is about to be free.
func (s *slots) takeFromSlowest(wanted *slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Contains(s.waiting, wanted) || !s.mayHaveLocked(wanted.host) {
		return
	}
	var slowest *slot
	var rate float64
	for _, held := range s.held {
		if held.isLost {
			return
		}
		took, remaining := time.Since(held.since), held.remaining()
		// What is downloaded is only unpacked, at the speed of the node.
		if took < held.turn || remaining <= 0 || held.lose == nil {
			continue
		}
		if r := float64(held.before-remaining) / took.Seconds(); slowest == nil || r < rate {
			slowest, rate = held, r
		}
	}
	if slowest != nil {
		slowest.isLost = true
		slowest.lose()
	}
}
