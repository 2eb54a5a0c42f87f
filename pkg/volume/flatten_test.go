package volume

import (
	"fmt"
	"math"
	"os"
	"slices"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/volume/flatten"
)

// chain makes snapshots s1, s2, … of the claim "v", each after a file was written.
func (n *fakeNode) chain(snapshots int) {
	n.t.Helper()
	n.create()
	for i := range snapshots {
		n.writeTo(fmt.Sprint("f", i+1))
		_, err := n.snapshot(fmt.Sprint("s", i+1))
		check(n.t, err)
	}
}

// filesIn are the files of all frozen uppers in a list, by name.
func (n *fakeNode) filesIn(list []record.Frozen) []string {
	files := n.filesOf(list)
	slices.Sort(files)
	return files
}

func (n *fakeNode) flatten(failed map[string]bool) (merged int) {
	for n.manager.flatten(n.t.Context(), failed) {
		merged++
	}
	return merged
}

// TestFlatten flattens the lists of a volume, of its last snapshot, which is as long, and of a clone, and leaves shorter ones alone.
func TestFlatten(t *testing.T) {
	n := newFakeNode(t)
	const snapshots = flatten.MaxFrozen + 1
	n.chain(snapshots)
	_, err := n.clone("c", Source{Volume: "v"})
	check(t, err)
	want := n.filesIn(n.loaded("v").Frozen)
	if merged := n.flatten(map[string]bool{}); merged != 1 {
		t.Errorf("%d runs were merged", merged)
	}
	if n.mergedApart {
		t.Error("files were copied that could be linked")
	}
	last, err := n.records.Snapshots().Load(fmt.Sprint("s", snapshots))
	check(t, err)
	shorter, err := n.records.Snapshots().Load(fmt.Sprint("s", snapshots-1))
	check(t, err)
	for name, list := range map[string][]record.Frozen{"v": n.loaded("v").Frozen, "c": n.loaded("c").Frozen, "snapshot": last.Frozen} {
		if len(list) != 1 || list[0].ID != n.loaded("v").Frozen[0].ID {
			t.Errorf("%s: %v", name, list)
			continue
		}
		wantNames(t, name, n.filesIn(list), want...)
	}
	if len(shorter.Frozen) != snapshots-1 {
		t.Errorf("the shorter snapshot has %d", len(shorter.Frozen))
	}
	check(t, n.manager.sweep(t.Context()))
	// The merged one, and those of the shorter snapshots.
	if got := len(n.frozen()); got != snapshots {
		t.Errorf("%d frozen uppers are left, want %d", got, snapshots)
	}
}

// TestFlattenMounted leaves the list of a mounted volume alone, so that the lowers of its view stay, and copies files for others.
func TestFlattenMounted(t *testing.T) {
	n := newFakeNode(t)
	n.chain(flatten.MaxFrozen + 1)
	_, err := n.clone("c", Source{Volume: "v"})
	check(t, err)
	req := n.publish(n.request("p", rwo))
	before := n.loaded("v").Frozen
	n.flatten(map[string]bool{})
	check(t, n.manager.sweep(t.Context()))
	if got := n.loaded("v").Frozen; len(got) != len(before) || len(n.loaded("c").Frozen) != 1 || !n.mergedApart {
		t.Errorf("the mounted volume has %d, the clone %d, copied: %t", len(got), len(n.loaded("c").Frozen), n.mergedApart)
	}
	wantNames(t, "mounted", n.filesIn(before), n.filesIn(n.loaded("c").Frozen)...)
	check(t, n.manager.Unpublish(t.Context(), "v", req.Target))
	n.flatten(map[string]bool{})
	if got := n.loaded("v").Frozen; len(got) != 1 || n.mergedApart {
		t.Errorf("the volume has %d, copied: %t", len(got), n.mergedApart)
	}
}

// TestFlattenCrash flattens again after a crash at each step, and what is not listed is discarded.
func TestFlattenCrash(t *testing.T) {
	for name, crash := range map[string]func(n *fakeNode){
		"measuring": func(n *fakeNode) { n.fail["measure frozen"] = errForced },
		"merging":   func(n *fakeNode) { n.fail["merge frozen"] = errForced },
		"merged, no record saved": func(n *fakeNode) {
			lists, err := n.manager.lists()
			check(n.t, err)
			run := flatten.Plan(lists, func([]record.Frozen) bool { return false })
			check(n.t, n.manager.merge(n.t.Context(), lists, run, newMerged(run)))
		},
		"one record saved": func(n *fakeNode) {
			lists, err := n.manager.lists()
			check(n.t, err)
			run := flatten.Plan(lists, func([]record.Frozen) bool { return false })
			merged := newMerged(run)
			check(n.t, n.manager.merge(n.t.Context(), lists, run, merged))
			_, err = n.manager.replace(n.t.Context(), flatten.List{Volume: "v"}, run, merged)
			check(n.t, err)
		},
		"no room": func(n *fakeNode) { n.measured = math.MaxInt64 / 2 },
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			n.chain(flatten.MaxFrozen + 1)
			want := n.filesIn(n.loaded("v").Frozen)
			crash(n)
			failed := map[string]bool{}
			n.flatten(failed)
			wantNames(t, "after the crash", n.filesIn(n.loaded("v").Frozen), want...)
			if (name == "measuring" || name == "merging") != (len(failed) == 1) {
				t.Errorf("tried without success: %v", failed)
			}
			clear(n.fail)
			n.measured = 0
			n.boot(testBoot)
			n.manager.reconcile(t.Context())
			n.flatten(map[string]bool{})
			n.manager.reconcile(t.Context())
			wantNames(t, "flattened", n.filesIn(n.loaded("v").Frozen), want...)
			if got := len(n.loaded("v").Frozen); got != 1 {
				t.Errorf("the volume has %d frozen uppers", got)
			}
			for i := range flatten.MaxFrozen + 1 {
				check(t, n.manager.DeleteSnapshot(t.Context(), fmt.Sprint("s", i+1), nil))
			}
			check(t, n.manager.Delete(t.Context(), "v"))
			if left := n.frozen(); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			if _, err := os.Stat(n.records.Dir("v")); err == nil {
				t.Error("the volume is still there")
			}
		})
	}
}
