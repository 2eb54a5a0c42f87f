package integration

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// TestSnapshotKills kills the driver while it makes and deletes snapshots and volumes, and publishes these. Repeated, each request is
// answered with OK, and every volume and snapshot has the files that it had.
func TestSnapshotKills(t *testing.T) {
	takesMinutes(t)
	onEachFreezing(t, []string{"directory", "image", "btrfs"}, func(t *testing.T, node *drivertest.Node, attributes []string) {
		k := snapshotKills{t: t, node: node, attributes: attributes,
			volumes: map[string]*keptVolume{}, snapshots: map[string]map[string]string{}, took: map[string]time.Duration{}}
		for range proof(5, 100) {
			k.round()
		}
		t.Logf("%d of %d kills came while a request was under way", k.interrupting, k.kills)
		k.end()
	})
}

// snapshotKills has the files that volumes and snapshots must have, by the names or IDs of these.
type snapshotKills struct {
	t          *testing.T
	node       *drivertest.Node
	attributes []string
	volumes    map[string]*keptVolume
	snapshots  map[string]map[string]string
	// made counts what was made, for names.
	made, kills, interrupting int
	// took is how long each kind of request took the last time.
	took map[string]time.Duration
}

// keptVolume is a volume with the files that were synced.
type keptVolume struct {
	drivertest.Volume
	files map[string]string
}

// round makes one request of each kind that can be made, and kills the driver during some of them.
func (k *snapshotKills) round() {
	const most = 4
	if len(k.volumes) == 0 {
		k.create(nil, map[string]string{})
	}
	k.write(k.anyVolume())
	source := k.anyVolume()
	k.snapshot("snapshot", source)
	snapshot := anyOf(k.snapshots)
	k.create(ofSnapshot(snapshot), k.snapshots[snapshot])
	source = k.anyVolume()
	k.create(ofVolume(source.Volume), source.files)
	for len(k.volumes) > most {
		k.delete(anyOf(k.volumes))
	}
	for len(k.snapshots) > most {
		k.deleteSnapshot(anyOf(k.snapshots))
	}
}

func (k *snapshotKills) name(what string) string {
	k.made++
	return fmt.Sprint(what, "-", k.made)
}

func anyOf[V any](m map[string]V) string {
	names := slices.Sorted(maps.Keys(m))
	return names[rand.IntN(len(names))]
}

func (k *snapshotKills) anyVolume() *keptVolume { return k.volumes[anyOf(k.volumes)] }

// request makes a request, kills the driver meanwhile, more often than not, and then repeats it: it must work.
func (k *snapshotKills) request(kind string, do func(ctx context.Context) error) {
	k.t.Helper()
	if rand.IntN(3) > 0 {
		done := make(chan error, 1)
		go func() { done <- do(timeout(k.t)) }()
		time.Sleep(rand.N(k.took[kind]*5/4 + 10*time.Millisecond))
		must(k.t, k.node.Kill())
		k.kills++
		if <-done != nil {
			k.interrupting++
		}
		if rand.IntN(4) == 0 {
			must(k.t, k.node.Launch())
			time.Sleep(rand.N(100 * time.Millisecond))
			must(k.t, k.node.Kill())
		}
		start(k.t, k.node)
	}
	began := time.Now()
	if err := do(timeout(k.t)); err != nil {
		k.t.Fatalf("%s: %v", kind, err)
	}
	k.took[kind] = time.Since(began)
}

func (k *snapshotKills) create(source *csi.VolumeContentSource, files map[string]string) {
	k.t.Helper()
	v := &keptVolume{files: maps.Clone(files)}
	name := k.name("volume")
	k.request("create", func(ctx context.Context) (err error) {
		v.Volume, err = createFrom(ctx, k.node, name, source, snapshotSize, k.attributes...)
		return err
	})
	k.volumes[name] = v
}

// write looks at all files of a volume and writes another one, sometimes with a snapshot of the volume in use before and after.
func (k *snapshotKills) write(v *keptVolume) {
	k.t.Helper()
	pod := newPod(k.t, k.node, "of-"+v.Name)
	k.request("publish", func(ctx context.Context) error { _, err := pod.Publish(ctx, v.Volume); return err })
	target := pod.Target(v.Name)
	wantFiles(k.t, target, v.files)
	name := k.name("file")
	writeSynced(k.t, filepath.Join(target, name), v.Name)
	v.files[name] = v.Name
	if !slices.Contains(k.attributes, "none") {
		k.snapshot("snapshot-in-use", v)
	}
	// A file system that a kill left frozen would have the pod wait.
	name = k.name("file")
	writeSynced(k.t, filepath.Join(target, name), v.Name)
	v.files[name] = v.Name
	k.request("unpublish", func(ctx context.Context) error { return pod.Unpublish(ctx, v.Volume) })
	removePod(k.t, pod)
}

func (k *snapshotKills) snapshot(kind string, v *keptVolume) {
	k.t.Helper()
	name, id := k.name(kind), ""
	k.request(kind, func(ctx context.Context) (err error) {
		id, err = snapshotOf(ctx, k.node, name, v.Volume)
		return err
	})
	k.snapshots[id] = maps.Clone(v.files)
}

func (k *snapshotKills) delete(name string) {
	k.t.Helper()
	k.request("delete", func(ctx context.Context) error {
		_, err := k.node.Controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: k.volumes[name].ID})
		return err
	})
	delete(k.volumes, name)
}

func (k *snapshotKills) deleteSnapshot(id string) {
	k.t.Helper()
	k.request("delete snapshot", func(ctx context.Context) error {
		_, err := k.node.Controller().DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
		return err
	})
	delete(k.snapshots, id)
}

// end looks at everything that there is, and deletes it.
func (k *snapshotKills) end() {
	k.t.Helper()
	for id, files := range k.snapshots {
		v := restore(k.t, k.node, k.name("last"), ofSnapshot(id), k.attributes...)
		wantVolume(k.t, k.node, v, files)
		deleteVolume(k.t, k.node, v)
		deleteSnapshot(k.t, k.node, id)
	}
	for _, v := range k.volumes {
		wantVolume(k.t, k.node, v.Volume, v.files)
		deleteVolume(k.t, k.node, v.Volume)
	}
	wantNothingFrozen(k.t, k.node)
}

// TestSnapshotTwins makes snapshots of a volume beside each other, and beside everything else that is done with it.
func TestSnapshotTwins(t *testing.T) {
	onEachFreezing(t, []string{"directory", "image"}, func(t *testing.T, node *drivertest.Node, attributes []string) {
		source := createSized(t, node, "source", readWriteOnce, snapshotSize, attributes...)
		wantVolume(t, node, source, map[string]string{}, "kept")
		for i := range proof(4, 40) {
			snapshotTwins(t, node, source, fmt.Sprint("-", i), attributes)
		}
		wantVolume(t, node, source, twinsFiles)
		deleteVolume(t, node, source)
		wantNothingFrozen(t, node)
	})
}

// twinsFiles are the files of the volume of snapshotTwins.
var twinsFiles = map[string]string{"kept": "source"}

// snapshotTwins makes snapshots and clones of a volume at once, and again while it is published and while they are deleted.
func snapshotTwins(t *testing.T, node *drivertest.Node, source drivertest.Volume, round string, attributes []string) {
	var snapshots [2]string
	var clones [2]drivertest.Volume
	snapshot := func(at int) (err error) {
		snapshots[at], err = snapshotOf(timeout(t), node, "snapshot"+round, source)
		return err
	}
	clone := func(at int, name string, of drivertest.Volume) (err error) {
		clones[at], err = createFrom(timeout(t), node, name+round, ofVolume(of), snapshotSize, attributes...)
		return err
	}
	must(t, together(
		func() error { return snapshot(0) },
		func() error { return snapshot(1) },
		func() error { return clone(0, "clone", source) },
		func() error { return clone(1, "clone", source) },
	))
	if snapshots[0] != snapshots[1] || clones[0].ID != clones[1].ID {
		t.Errorf("twins made %q and %q, %q and %q", snapshots[0], snapshots[1], clones[0].ID, clones[1].ID)
	}
	doomed := restore(t, node, "doomed"+round, ofSnapshot(snapshots[0]), attributes...)
	pod := newPod(t, node, "pod")
	// These may be refused: of a volume in use, and of one that is gone.
	var uncertain [2]string
	must(t, together(
		func() error { _, err := pod.Publish(timeout(t), source); return err },
		func() error { uncertain[0], _ = snapshotOf(timeout(t), node, "in-use"+round, source); return nil },
		func() error { uncertain[1], _ = snapshotOf(timeout(t), node, "of-doomed"+round, doomed); return nil },
		func() error {
			_, err := node.Controller().DeleteVolume(timeout(t), &csi.DeleteVolumeRequest{VolumeId: doomed.ID})
			return err
		},
		func() error {
			_, err := node.Controller().DeleteSnapshot(timeout(t), &csi.DeleteSnapshotRequest{SnapshotId: snapshots[0]})
			return err
		},
	))
	wantFiles(t, pod.Target(source.Name), twinsFiles)
	must(t, together(
		func() error { return pod.Unpublish(timeout(t), source) },
		func() error { return clone(0, "of-clone", clones[1]) },
	))
	removePod(t, pod)
	for _, id := range uncertain {
		if id == "" {
			continue
		}
		v := restore(t, node, "of-"+id, ofSnapshot(id), attributes...)
		wantVolume(t, node, v, twinsFiles)
		deleteVolume(t, node, v)
		deleteSnapshot(t, node, id)
	}
	for _, v := range clones {
		wantVolume(t, node, v, twinsFiles)
		deleteVolume(t, node, v)
	}
}

func together(do ...func() error) error { return atOnce(len(do), func(i int) error { return do[i]() }) }
