package store

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

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
				held, err := s.acquire(ctx, host, remaining, func() { lost = append(lost, name) })
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
