package chaos

import (
	"flag"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

var (
	seed  = flag.Uint64("seed", 0, "walk of this seed alone (0: one seed after the other until the time is over)")
	steps = flag.Int("steps", 60, "steps of a walk")
)

// schedule returns the first seed and how long new walks begin: the same walks for a minute, or new ones for an hour in make proof.
func schedule() (uint64, time.Duration) {
	if os.Getenv("OVERLAY_CSI_PROOF") == "1" {
		return uint64(time.Now().UnixNano()) / 1000, time.Hour
	}
	return 1, time.Minute
}

// tally counts what walks have done.
type tally struct {
	seeds, rpcs, kills, powerCuts, faults int
	// snapshots and clones are those that were made, refused those that had to be refused, and merges how often frozen uppers were merged.
	snapshots, clones, refused, merges, commits int
	// peak is the most memory in bytes that a driver had resident.
	peak int64
}

func TestChaos(t *testing.T) {
	needs.Root(t)
	binary, err := drivertest.Build(t.TempDir())
	must(t, err)
	var total tally
	walk := func(seed uint64) bool {
		return t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			total.seeds++
			newWorld(t, binary, seed, &total).walk(*steps)
		})
	}
	if *seed != 0 {
		walk(*seed)
	} else {
		first, duration := schedule()
		for next, end := first, time.Now().Add(duration); time.Now().Before(end); next++ {
			if !walk(next) {
				t.Errorf("walk it again: go test ./test/chaos -seed %d -steps %d", next, *steps)
				break
			}
		}
	}
	t.Logf("%d seeds, %d RPCs, %d kills, %d power cuts, %d faults, at most %d MiB resident",
		total.seeds, total.rpcs, total.kills, total.powerCuts, total.faults, total.peak>>20)
	t.Logf("%d snapshots, %d clones, %d of both refused, %d merges, %d commits to caches",
		total.snapshots, total.clones, total.refused, total.merges, total.commits)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
