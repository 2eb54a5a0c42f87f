package store

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// withoutRanges is an origin whose registry sends a blob at rate bytes a second, and from its first byte whenever it is asked.
type withoutRanges struct {
	origin
	rate int64
}

func (o *withoutRanges) fetch(ctx context.Context, blob image.LayerBlob, _ string, progress *progressCounter) (Layer, error) {
	progress.IgnoresRanges.Store(progress.load() > 0)
	for sent := int64(0); sent < blob.Descriptor.Size; {
		select {
		case <-ctx.Done():
			return Layer{}, ctx.Err()
		case <-time.After(time.Second):
			sent += o.rate
			progress.Received.Store(max(progress.load(), min(sent, blob.Descriptor.Size)))
		}
	}
	return Layer{DiffID: blob.Descriptor.Digest}, nil
}

// TestSlotOfRegistryWithoutRanges: a blob that takes longer than a turn comes, although it begins again whenever it loses its slot.
func TestSlotOfRegistryWithoutRanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fetcher{observer: unobserved{}, slots: newSlots(1)}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var longest time.Duration
		var others sync.WaitGroup
		others.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				if other, err := f.slots.acquire(ctx, "good", slotTurn, func() int64 { return 0 }, nil); err == nil {
					longest = max(longest, time.Since(began))
					time.Sleep(time.Second)
					other.release()
				}
			}
		})
		var inSlot slotClock
		fetchOne := func(size int64) error {
			blob := image.LayerBlob{Descriptor: ocispec.Descriptor{Digest: digest.FromString("x"), Size: size}}
			key := fetchKeyOf(blob, source{host: "evil"})
			ctx, cancel := context.WithTimeout(ctx, 24*time.Hour)
			defer cancel()
			_, err := f.fetchInSlot(&fetch{ctx: ctx, cancel: cancel, clocks: []*slotClock{&inSlot}}, key, blob, &withoutRanges{rate: 1 << 20})
			return err
		}
		began := time.Now()
		if err := fetchOne(30 * 60 << 20); err != nil {
			t.Errorf("a blob of half an hour: %v", err)
		}
		if took := time.Since(began); inSlot.elapsed() < 30*time.Minute || inSlot.elapsed() >= took {
			t.Errorf("the clock of the pull ran for %s of %s", inSlot.elapsed(), took)
		}
		// No registry keeps a slot for ever.
		if err := fetchOne(10 * 60 * 60 << 20); err == nil {
			t.Error("a blob of ten hours came although others wait")
		}
		stop()
		others.Wait()
		if longest > maxSlotTurn+slotTurn {
			t.Errorf("another registry waited for %s", longest)
		}
	})
}

// TestSlotsTakeTurns: of a registry with many fetches that wait, one goes before each fetch of another one, whenever that begins.
func TestSlotsTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlots(1)
		ctx, stop := context.WithCancel(t.Context())
		var order []string
		begin := func(host, name string) {
			go func() {
				held, err := s.acquire(ctx, host, slotTurn, func() int64 { return 0 }, nil)
				if err == nil {
					order = append(order, name)
					time.Sleep(time.Second)
					held.release()
				}
			}()
			synctest.Wait()
		}
		for _, name := range []string{"e1", "e2", "e3", "e4", "e5"} {
			begin("evil", name)
		}
		begin("good", "g1")
		begin("good", "g2")
		time.Sleep(2500 * time.Millisecond)
		begin("other", "o1")
		time.Sleep(time.Minute)
		synctest.Wait()
		if want := []string{"e1", "e2", "g1", "e3", "g2", "o1", "e4", "e5"}; !slices.Equal(order, want) {
			t.Errorf("the order is %q, want %q", order, want)
		}
		stop()
	})
}

// TestSlotsOfRegistriesThatComeBack: registries with one fetch each, which come back whenever they have had a slot, keep no other one from
// its turns. A download that loses its slot comes back so.
func TestSlotsOfRegistriesThatComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const others, fetches = 8, 10
		s := newSlots(3)
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		fetch := func(host string) bool {
			held, err := s.acquire(ctx, host, slotTurn, func() int64 { return 0 }, nil)
			if err != nil {
				return false
			}
			time.Sleep(time.Second)
			held.release()
			return true
		}
		for i := range others {
			running.Go(func() {
				for fetch(strconv.Itoa(i)) {
				}
			})
		}
		synctest.Wait()
		var done atomic.Int64
		for range fetches {
			running.Go(func() {
				if fetch("many") {
					done.Add(1)
				}
			})
		}
		// Each registry has three slots in nine seconds.
		time.Sleep((others + 2) * fetches / 3 * time.Second)
		stop()
		running.Wait()
		if done.Load() != fetches {
			t.Errorf("a registry with %d fetches had a slot for %d of them", fetches, done.Load())
		}
	})
}

// TestSlots checks who gets a slot.
func TestSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlots(4)
		ctx, stop := context.WithCancel(t.Context())
		var lost []string
		begin := func(host, name string, rate int64) <-chan *slot {
			got := make(chan *slot, 1)
			began := time.Now()
			go func() {
				remaining := func() int64 { return 1<<40 - rate*int64(time.Since(began).Seconds()) }
				held, err := s.acquire(ctx, host, slotTurn, remaining, func() { lost = append(lost, name) })
				if err == nil {
					got <- held
				}
			}()
			synctest.Wait()
			return got
		}
		const slow, fast = 2 << 10, 1 << 20
		first := begin("evil", "e1", slow+1)
		second := begin("evil", "e2", slow)
		begin("evil", "e3", fast)
		fourth := begin("evil", "e4", slow)
		if len(first) != 1 || len(second) != 1 || len(fourth) != 0 {
			t.Fatal("one registry has all of the slots, or too few")
		}
		if len(begin("good", "g1", fast)) != 1 {
			t.Fatal("the last slot is not for another registry")
		}
		begin("evil", "e5", slow)
		third := begin("good", "g2", fast)
		(<-first).release()
		synctest.Wait()
		if len(third) != 1 || len(fourth) != 0 {
			t.Error("the free slot did not go to the registry that has the fewest")
		}
		// good has two slots, and evil two. The next of evil waits for a turn, and gets that of the slowest.
		time.Sleep(slotTurn + time.Second)
		synctest.Wait()
		if len(lost) != 1 || lost[0] != "e2" {
			t.Errorf("%q lost their slots instead of e2", lost)
		}
		(<-second).release()
		synctest.Wait()
		if len(fourth) != 1 {
			t.Error("the slot did not go to the fetch that waited longest")
		}
		stop()
		synctest.Wait()
		if len(s.waiting) != 0 {
			t.Errorf("%d fetches still wait", len(s.waiting))
		}
	})
}
