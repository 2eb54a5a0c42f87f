package integration

import (
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// TestFiftyClonesAtOnce makes fifty clones of one snapshot and publishes them, beside fifty new claims, all at once.
func TestFiftyClonesAtOnce(t *testing.T) {
	const count = 50
	onEachFreezing(t, []string{"directory", "image"}, func(t *testing.T, node *drivertest.Node, attributes []string) {
		source := createSized(t, node, "source", readWriteOnce, snapshotSize, attributes...)
		wantVolume(t, node, source, map[string]string{}, "file")
		snapshot := createSnapshot(t, node, "snapshot", source)
		var volumes [2 * count]drivertest.Volume
		var pods [2 * count]*drivertest.Pod
		var created, published [2 * count]time.Duration
		for i := range pods {
			pods[i] = newPod(t, node, fmt.Sprint("pod-", i))
		}
		began := time.Now()
		must(t, atOnce(2*count, func(i int) (err error) {
			from := ofSnapshot(snapshot)
			if i%2 > 0 {
				from = nil
			}
			volumes[i], err = createFrom(timeout(t), node, fmt.Sprint("claim-", i), from, snapshotSize, attributes...)
			created[i] = time.Since(began)
			if err == nil {
				_, err = pods[i].Publish(timeout(t), volumes[i])
			}
			published[i] = time.Since(began)
			return err
		}))
		for i, kind := range []string{"clones", "new claims"} {
			t.Logf("%d %s, until created: %s; until published: %s", count, kind, spread(created[:], i), spread(published[:], i))
		}
		for i, v := range volumes {
			want := map[string]string{}
			if i%2 == 0 {
				want["file"] = "source"
			}
			target := pods[i].Target(v.Name)
			wantFiles(t, target, want)
			write(t, filepath.Join(target, "own"), v.Name)
		}
		must(t, atOnce(2*count, func(i int) error { return pods[i].Unpublish(timeout(t), volumes[i]) }))
		wantVolume(t, node, volumes[0], map[string]string{"file": "source", "own": "claim-0"})
		for _, v := range append(volumes[:], source) {
			deleteVolume(t, node, v)
		}
		deleteSnapshot(t, node, snapshot)
		wantNothingFrozen(t, node)
	})
}

// spread returns the median and the most of every second duration.
func spread(all []time.Duration, first int) string {
	var some []time.Duration
	for i := first; i < len(all); i += 2 {
		some = append(some, all[i])
	}
	slices.Sort(some)
	return fmt.Sprintf("median %s, at most %s", some[len(some)/2].Round(time.Millisecond), some[len(some)-1].Round(time.Millisecond))
}
