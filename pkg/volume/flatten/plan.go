// Package flatten chooses which frozen uppers of a node to merge, so that the lists of volumes and snapshots stay short.
package flatten

import (
	"cmp"
	"reflect"
	"slices"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// MaxFrozen is the length up to which a list of frozen uppers is left alone.
const MaxFrozen = 16

// List is the list of frozen uppers of one volume or snapshot, the topmost first.
type List struct {
	// Volume or Snapshot is its ID.
	Volume, Snapshot string
	Frozen           []record.Frozen
	// IsMounted is set while a view has these lowers. The list is not changed then.
	IsMounted bool
}

// Plan returns frozen uppers that follow one another in a list that is too long, the topmost first. Merged into one, they are to be
// replaced in every list that Has them. It returns nil if there is nothing to merge. skip reports whether some were tried before, without
// success.
//
// It prefers those at the end that all too long lists have which end alike, such as clones of one snapshot: these go on sharing them.
// Otherwise it takes all of the list.
func Plan(lists []List, skip func(run []record.Frozen) bool) []record.Frozen {
	long := slices.DeleteFunc(slices.Clone(lists), func(l List) bool { return l.IsMounted || len(l.Frozen) <= MaxFrozen })
	slices.SortStableFunc(long, func(a, b List) int { return cmp.Compare(len(b.Frozen), len(a.Frozen)) })
	for _, list := range long {
		for _, part := range [][]record.Frozen{sharedEnd(list, long), list.Frozen} {
			run := mergeable(part)
			if left := len(list.Frozen) - len(run) + 1; len(run) > 1 && left <= MaxFrozen && !skip(run) {
				return run
			}
		}
		// What lies between uppers that cannot be merged.
		if run := mergeable(list.Frozen); len(run) > 1 && !skip(run) {
			return run
		}
	}
	return nil
}

// sharedEnd returns the end of a list that all lists have which have its last frozen upper.
func sharedEnd(list List, long []List) []record.Frozen {
	shared := list.Frozen
	for _, other := range long {
		n := 0
		for n < min(len(shared), len(other.Frozen)) && shared[len(shared)-1-n].ID == other.Frozen[len(other.Frozen)-1-n].ID {
			n++
		}
		if n > 0 {
			shared = shared[len(shared)-n:]
		}
	}
	return shared
}

// mergeable returns the longest part of a list that can be one frozen upper: one backend, files that are stored with one group, and no
// disk images, which would have to be made with a size.
func mergeable(list []record.Frozen) (longest []record.Frozen) {
	for start := 0; start < len(list); {
		end := start + 1
		for end < len(list) && fits(list[start], list[end]) {
			end++
		}
		if end-start > len(longest) && list[start].Backend != upper.DiskImage {
			longest = list[start:end]
		}
		start = end
	}
	return longest
}

func fits(a, b record.Frozen) bool {
	return a.Backend == b.Backend && reflect.DeepEqual(a.Group, b.Group)
}

// Has reports whether a list has a run of frozen uppers, one after the other.
func Has(list, run []record.Frozen) bool { return indexOf(list, run) >= 0 }

// Shares reports whether a list has any of a run of frozen uppers.
func Shares(list, run []record.Frozen) bool {
	return slices.ContainsFunc(list, func(a record.Frozen) bool {
		return slices.ContainsFunc(run, func(b record.Frozen) bool { return a.ID == b.ID })
	})
}

// Replaced returns a list with merged in place of a run. It returns nil if the list does not have the run.
func Replaced(list, run []record.Frozen, merged record.Frozen) []record.Frozen {
	at := indexOf(list, run)
	if at < 0 {
		return nil
	}
	return slices.Concat(list[:at], []record.Frozen{merged}, list[at+len(run):])
}

func indexOf(list, run []record.Frozen) int {
	same := func(a, b record.Frozen) bool { return a.ID == b.ID }
	for at := 0; at+len(run) <= len(list); at++ {
		if slices.EqualFunc(list[at:at+len(run)], run, same) {
			return at
		}
	}
	return -1
}
