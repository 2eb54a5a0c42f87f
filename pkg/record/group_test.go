package record

import (
	"fmt"
	"testing"
)

// TestGroupSwaps: whatever groups a volume had, what is stored as its group is shown as the pod's, and no two IDs as one.
func TestGroupSwaps(t *testing.T) {
	for _, c := range []struct {
		group Group
		// shown are IDs in the upper, with what a pod sees.
		shown map[uint32]uint32
	}{
		{Group{ID: 1000, First: 1000, Stored: 1000}, map[uint32]uint32{0: 0, 1000: 1000, 2000: 2000}},
		{Group{ID: 2000, First: 1000, Stored: 1000}, map[uint32]uint32{0: 0, 1000: 2000, 2000: 1000, 3000: 3000}},
		{Group{ID: 0, First: 1000, Stored: 1000}, map[uint32]uint32{0: 1000, 1000: 0}},
		{Group{ID: 1000, First: 1000, Stored: 0}, map[uint32]uint32{0: 1000, 1000: 0, 2000: 2000}},
		{Group{ID: 2000, First: 1000, Stored: 0}, map[uint32]uint32{0: 2000, 1000: 0, 2000: 1000}},
		{Group{ID: 0, First: 1000, Stored: 0}, map[uint32]uint32{0: 0, 1000: 1000}},
		{Group{ID: 1000, First: 0, Stored: 0}, map[uint32]uint32{0: 1000, 1000: 0}},
		{Group{ID: 2000, First: 1000, Stored: 999}, map[uint32]uint32{0: 0, 999: 2000, 1000: 999, 2000: 1000}},
	} {
		t.Run(fmt.Sprint(c.group), func(t *testing.T) {
			for id, want := range c.shown {
				got := id
				for _, swap := range c.group.Swaps() {
					got = swap.Of(got)
				}
				if got != want {
					t.Errorf("group %d is shown as %d, want %d", id, got, want)
				}
			}
		})
	}
	if swaps := (*Group)(nil).Swaps(); swaps != nil {
		t.Errorf("a volume without a group: %v", swaps)
	}
}
