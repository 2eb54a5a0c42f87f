package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// snapshotSize is the size of volumes of which snapshots are made.
const snapshotSize = 16 << 20

// freezings are the kinds of volumes that are frozen in ways of their own, with the attributes that ask for them.
var freezings = map[string][]string{
	"directory": {"sizeEnforcement", "none"},
	"image":     {"sizeEnforcement", "image"},
	"btrfs":     nil,
}

// onEachFreezing runs a test with kinds of volumes on a node with a layer. attributes are those of a volume of the kind on that layer.
func onEachFreezing(t *testing.T, kinds []string, test func(t *testing.T, node *drivertest.Node, attributes []string)) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			node := newNode(t)
			if kind == "btrfs" {
				mountImage(t, "btrfs with quota", 1<<30, node.DataRoot, "")
			}
			start(t, node)
			test(t, node, attributesOf(t, node, kind))
		})
	}
}

// attributesOf returns the attributes of a volume of a kind on one small layer.
func attributesOf(t *testing.T, node *drivertest.Node, kind string) []string {
	t.Helper()
	return append([]string{"layers", layersOf(t, node, map[string]string{"layer": "layer"})}, freezings[kind]...)
}

func ofSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func ofVolume(v drivertest.Volume) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.ID}}}
}

func snapshotOf(ctx context.Context, node *drivertest.Node, name string, v drivertest.Volume) (id string, err error) {
	response, err := node.Controller().CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.ID})
	if err == nil && !response.GetSnapshot().GetReadyToUse() {
		err = fmt.Errorf("snapshot %s is not ready", name)
	}
	return response.GetSnapshot().GetSnapshotId(), err
}

func createSnapshot(t *testing.T, node *drivertest.Node, name string, v drivertest.Volume) (id string) {
	t.Helper()
	id, err := snapshotOf(timeout(t), node, name, v)
	must(t, err)
	return id
}

func deleteSnapshot(t *testing.T, node *drivertest.Node, id string) {
	t.Helper()
	_, err := node.Controller().DeleteSnapshot(timeout(t), &csi.DeleteSnapshotRequest{SnapshotId: id})
	must(t, err)
}

// createFrom makes a volume with the attributes of another, which begins with a source.
func createFrom(
	ctx context.Context, node *drivertest.Node, name string, source *csi.VolumeContentSource, size int64, attributes ...string,
) (drivertest.Volume, error) {
	request := createRequest(name, readWriteOnce, size, attributes...)
	request.VolumeContentSource = source
	response, err := node.Controller().CreateVolume(ctx, request)
	v := response.GetVolume()
	return drivertest.Volume{Name: name, ID: v.GetVolumeId(), Claim: true, Mode: readWriteOnce, Attributes: v.GetVolumeContext()}, err
}

func restore(t *testing.T, node *drivertest.Node, name string, source *csi.VolumeContentSource, attributes ...string) drivertest.Volume {
	t.Helper()
	v, err := createFrom(timeout(t), node, name, source, snapshotSize, attributes...)
	must(t, err)
	return v
}

// wantVolume checks which files a volume has beside that of the layer, and their content, in the view of a pod. The pod then writes other
// files.
func wantVolume(t *testing.T, node *drivertest.Node, v drivertest.Volume, want map[string]string, writes ...string) {
	t.Helper()
	pod := newPod(t, node, "of-"+v.Name)
	target := publish(t, pod, v)
	wantFiles(t, target, want)
	for _, name := range writes {
		writeSynced(t, filepath.Join(target, name), v.Name)
	}
	unpublish(t, pod, v)
	removePod(t, pod)
}

func wantFiles(t *testing.T, target string, want map[string]string) {
	t.Helper()
	entries, err := os.ReadDir(target)
	must(t, err)
	got := map[string]string{}
	for _, entry := range entries {
		content, err := os.ReadFile(filepath.Join(target, entry.Name()))
		must(t, err)
		got[entry.Name()] = string(content)
	}
	want = maps.Clone(want)
	want["layer"] = "layer"
	if !maps.Equal(got, want) {
		t.Errorf("%s has %v, want %v", target, got, want)
	}
}

func writeSynced(t *testing.T, path, content string) {
	t.Helper()
	file, err := os.Create(path)
	must(t, err)
	_, err = file.WriteString(content)
	must(t, err)
	must(t, file.Sync())
	must(t, file.Close())
}

// wantNothingFrozen checks that all that was made of volumes, snapshots and clones is gone.
func wantNothingFrozen(t *testing.T, node *drivertest.Node) {
	t.Helper()
	eventually(t, "no frozen upper is left", func() bool {
		frozen, err := os.ReadDir(filepath.Join(node.DataRoot, "frozen"))
		return len(frozen) == 0 && (err == nil || os.IsNotExist(err))
	})
	if records, err := filepath.Glob(filepath.Join(node.DataRoot, "snapshots/*")); err != nil || len(records) > 0 {
		t.Errorf("snapshots are left: %q, %v", records, err)
	}
	wantNothingLeft(t, node)
	wantNoLoops(t, node)
}

func TestSnapshotsAndClones(t *testing.T) {
	onEachFreezing(t, []string{"directory", "image", "btrfs"}, func(t *testing.T, node *drivertest.Node, attributes []string) {
		source := createSized(t, node, "source", readWriteOnce, snapshotSize, attributes...)
		wantVolume(t, node, source, map[string]string{}, "old", "removed")
		snapshot := createSnapshot(t, node, "snapshot", source)
		if again := createSnapshot(t, node, "snapshot", source); again != snapshot {
			t.Errorf("the same request made %s and %s", snapshot, again)
		}

		pod := newPod(t, node, "writer")
		target := publish(t, pod, source)
		writeSynced(t, filepath.Join(target, "old"), "changed")
		must(t, os.Remove(filepath.Join(target, "removed")))
		unpublish(t, pod, source)
		old, changed := map[string]string{"old": "source", "removed": "source"}, map[string]string{"old": "changed"}
		restored := restore(t, node, "restored", ofSnapshot(snapshot), attributes...)
		clone := restore(t, node, "clone", ofVolume(source), attributes...)
		wantVolume(t, node, restored, old, "mine")
		wantVolume(t, node, clone, changed, "mine")
		wantVolume(t, node, source, changed)

		deleteVolume(t, node, source)
		second := restore(t, node, "second", ofSnapshot(snapshot), attributes...)
		ofClone := restore(t, node, "of-clone", ofVolume(clone), attributes...)
		deleteSnapshot(t, node, snapshot)
		deleteSnapshot(t, node, snapshot)
		_, err := createFrom(timeout(t), node, "late", ofSnapshot(snapshot), snapshotSize, attributes...)
		wantCode(t, err, codes.NotFound)
		must(t, node.Kill())
		start(t, node)
		wantVolume(t, node, second, old)
		wantVolume(t, node, restored, map[string]string{"old": "source", "removed": "source", "mine": "restored"})
		wantVolume(t, node, ofClone, map[string]string{"old": "changed", "mine": "clone"}, "own")
		deleteVolume(t, node, clone)
		wantVolume(t, node, ofClone, map[string]string{"old": "changed", "mine": "clone", "own": "of-clone"})
		for _, v := range []drivertest.Volume{restored, second, ofClone} {
			deleteVolume(t, node, v)
		}
		wantNothingFrozen(t, node)
	})
}

func TestSnapshotsAreRefused(t *testing.T) {
	node := startNode(t)
	layers, none := layersOf(t, node, map[string]string{"layer": "layer"}, map[string]string{"other": "o"}), "sizeEnforcement"
	attributes := []string{"layers", layers, none, "none"}
	source := createSized(t, node, "source", readWriteOnce, snapshotSize, attributes...)
	other := createSized(t, node, "other", readWriteOnce, snapshotSize, attributes...)
	snapshot := createSnapshot(t, node, "snapshot", source)
	_, err := snapshotOf(timeout(t), node, "snapshot", other)
	wantCode(t, err, codes.AlreadyExists)
	_, err = snapshotOf(timeout(t), node, "new", drivertest.Volume{ID: "missing"})
	wantCode(t, err, codes.NotFound)
	for name, from := range map[string]*csi.VolumeContentSource{"snapshot": ofSnapshot(snapshot), "volume": ofVolume(source)} {
		_, err := createFrom(timeout(t), node, "small", from, snapshotSize/2, attributes...)
		wantCode(t, err, codes.OutOfRange, "must not have less")
		_, err = createFrom(timeout(t), node, "layers", from, snapshotSize, "layers", drivertest.Layers("missing"), none, "none")
		wantCode(t, err, codes.NotFound, "missing")
		_, err = createFrom(timeout(t), node, "made-of-"+name, from, snapshotSize, attributes...)
		must(t, err)
		_, err = createFrom(timeout(t), node, "made-of-"+name, nil, snapshotSize, attributes...)
		wantCode(t, err, codes.AlreadyExists, "another source")
	}
	pod := newPod(t, node, "pod")
	publish(t, pod, source)
	_, err = snapshotOf(timeout(t), node, "in-use", source)
	wantCode(t, err, codes.FailedPrecondition, "while pods write", "sizeEnforcement: image", "inUse: copy")
	unpublish(t, pod, source)
	output, err := overlayctl(t, node, "snapshots", "-o", "json")
	must(t, err)
	var listed []api.Snapshot
	must(t, json.Unmarshal([]byte(output), &listed))
	if len(listed) != 1 || listed[0].ID != snapshot || listed[0].Volume != source.ID || listed[0].SizeBytes != snapshotSize ||
		listed[0].State != api.SnapshotReady || listed[0].Created.IsZero() {
		t.Errorf("listed %+v", listed)
	}
}

// TestSnapshotInUseCopies copies what has no moment file by file, if the class says so.
func TestSnapshotInUseCopies(t *testing.T) {
	onEachFreezing(t, []string{"directory"}, func(t *testing.T, node *drivertest.Node, attributes []string) {
		source := createSized(t, node, "source", readWriteOnce, snapshotSize, attributes...)
		pod := newPod(t, node, "pod")
		target := publish(t, pod, source)
		must(t, os.WriteFile(target+"/new", []byte("new"), 0o600))
		response, err := node.Controller().CreateSnapshot(timeout(t), &csi.CreateSnapshotRequest{
			Name: "copy", SourceVolumeId: source.ID, Parameters: map[string]string{"inUse": "copy"},
		})
		must(t, err)
		must(t, os.WriteFile(target+"/new", []byte("later"), 0o600))
		unpublish(t, pod, source)
		id := response.GetSnapshot().GetSnapshotId()
		restored := restore(t, node, "restored", ofSnapshot(id), attributes...)
		wantVolume(t, node, restored, map[string]string{"new": "new"})
		wantVolume(t, node, source, map[string]string{"new": "later"})
		deleteSnapshot(t, node, id)
	})
}

// TestSnapshotUnderAWriter: a snapshot of a volume in use has all that was synced before, and nothing that was written after.
func TestSnapshotUnderAWriter(t *testing.T) {
	onEachFreezing(t, []string{"image", "btrfs"}, func(t *testing.T, node *drivertest.Node, attributes []string) {
		source := createSized(t, node, "source", readWriteOnce, snapshotSize, attributes...)
		pod := newPod(t, node, "writer")
		log, err := os.Create(filepath.Join(publish(t, pod, source), "log"))
		must(t, err)
		var synced atomic.Int64
		stop, stopped := make(chan struct{}), make(chan error, 1)
		go func() { stopped <- writeLines(log, &synced, stop) }()
		for i := range 4 {
			eventually(t, "something is synced", func() bool { return synced.Load() > int64(i) })
			before := synced.Load()
			snapshot := createSnapshot(t, node, fmt.Sprint("snapshot-", i), source)
			after := synced.Load() + 1
			v := restore(t, node, fmt.Sprint("restored-", i), ofSnapshot(snapshot), attributes...)
			reader := newPod(t, node, "reader")
			content, err := os.ReadFile(filepath.Join(publish(t, reader, v), "log"))
			must(t, err)
			lines := strings.Split(strings.TrimSuffix(string(content), "\n"), "\n")
			if n := int64(len(lines)); n < before || n > after || lines[n-1] != fmt.Sprint("line ", n) {
				t.Errorf("the snapshot ends with line %d, %q; %d lines were synced before, %d were written after", n, lines[n-1], before, after)
			}
			unpublish(t, reader, v)
			deleteVolume(t, node, v)
			deleteSnapshot(t, node, snapshot)
		}
		close(stop)
		must(t, <-stopped)
		must(t, log.Close())
		unpublish(t, pod, source)
		deleteVolume(t, node, source)
		wantNothingFrozen(t, node)
	})
}

func writeLines(log *os.File, synced *atomic.Int64, stop <-chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		if _, err := fmt.Fprintln(log, "line", synced.Load()+1); err != nil {
			return err
		}
		if err := log.Sync(); err != nil {
			return err
		}
		synced.Add(1)
	}
}

// TestGroupOfACloneChanges: what a pod with an fsGroup wrote belongs to that of the pod that has the clone.
func TestGroupOfACloneChanges(t *testing.T) {
	onEachFreezing(t, []string{"directory", "image", "btrfs"}, func(t *testing.T, node *drivertest.Node, attributes []string) {
		source := createSized(t, node, "source", readWriteOnce, snapshotSize, attributes...)
		use := func(v drivertest.Volume, group uint32, files ...string) {
			t.Helper()
			pod := newPod(t, node, "pod")
			v = withGroup(v, groupText(group))
			target := publish(t, pod, v)
			writeAs(t, group, target, fmt.Sprint(v.Name, "-", group))
			for _, name := range append(files, "", fmt.Sprint(v.Name, "-", group)) {
				wantGroups(t, target, map[string]uint32{name: group})
			}
			unpublish(t, pod, v)
		}
		use(source, 1000)
		clone := restore(t, node, "clone", ofVolume(source), attributes...)
		use(clone, 2000, "source-1000")
		second := restore(t, node, "second", ofVolume(clone), attributes...)
		use(second, 3000, "source-1000", "clone-2000")
		use(clone, 1000, "source-1000", "clone-2000")
		use(source, 2000, "source-1000")
		for _, v := range []drivertest.Volume{second, clone, source} {
			deleteVolume(t, node, v)
		}
		wantNothingFrozen(t, node)
	})
}
