package integration

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// fullDisks are disks that are filled, with the kinds of volumes on them.
var fullDisks = []struct{ system, kind string }{{"ext4", "directory"}, {"xfs", "image"}, {"xfs", "directory"}}

const fullDiskSize = 384 << 20

// leaveRoom fills a disk but for some pages, and returns a function that empties it again.
func leaveRoom(t *testing.T, dir string, pages int64) (empty func()) {
	t.Helper()
	filler := filepath.Join(dir, "filler")
	must(t, drivertest.FillUp(filler))
	info, err := os.Stat(filler)
	must(t, err)
	must(t, os.Truncate(filler, max(0, info.Size()-pages*int64(os.Getpagesize()))))
	return func() {
		t.Helper()
		must(t, os.Remove(filler))
		eventually(t, "the disk has room", func() bool {
			var stat unix.Statfs_t
			must(t, unix.Statfs(dir, &stat))
			return int64(stat.Bfree)*stat.Bsize > info.Size()/2
		})
	}
}

// wantNoRoom checks the error of a request on a full disk, which may have had room enough, and reports whether there is one.
func wantNoRoom(t *testing.T, what string, err error) bool {
	t.Helper()
	if err != nil && (status.Code(err) != codes.ResourceExhausted || len(status.Convert(err).Message()) > 4096) {
		t.Errorf("%s on a full disk: %v", what, err)
	}
	return err != nil
}

// TestSnapshotsOnAFullDisk has the disk be full at each step of a snapshot, a restore and a clone. The source keeps all that it has, and
// the same request works once there is room.
func TestSnapshotsOnAFullDisk(t *testing.T) {
	takesMinutes(t)
	for _, disk := range fullDisks {
		t.Run(disk.kind+" on "+disk.system, func(t *testing.T) {
			node := newNode(t, "--reconcile-interval=100ms")
			mountImage(t, disk.system, fullDiskSize, node.DataRoot, "")
			start(t, node)
			attributes := attributesOf(t, node, disk.kind)
			source := createSized(t, node, "source", readWriteOnce, snapshotSize, attributes...)
			files := map[string]string{}
			failed := map[string]int{}
			for pages := range int64(proof(10, 40)) {
				written := fmt.Sprint("file-", pages)
				wantVolume(t, node, source, files, written)
				files[written] = "source"
				suffix := fmt.Sprint("-", pages)
				try := func() (of map[string]error, snapshot string, volumes []drivertest.Volume) {
					of = map[string]error{}
					snapshot, of["snapshot"] = snapshotOf(timeout(t), node, "snapshot"+suffix, source)
					clone, err := createFrom(timeout(t), node, "clone"+suffix, ofVolume(source), snapshotSize, attributes...)
					of["clone"], volumes = err, append(volumes, clone)
					if snapshot != "" {
						restored, err := createFrom(timeout(t), node, "restored"+suffix, ofSnapshot(snapshot), snapshotSize, attributes...)
						of["restore"], volumes = err, append(volumes, restored)
					}
					return of, snapshot, volumes
				}
				empty := leaveRoom(t, node.DataRoot, pages)
				errs, _, _ := try()
				for what, err := range errs {
					if wantNoRoom(t, what, err) {
						failed[what]++
					}
				}
				empty()
				errs, snapshot, volumes := try()
				for what, err := range errs {
					if err != nil {
						t.Fatalf("%s, repeated when there is room: %v", what, err)
					}
				}
				for _, v := range volumes {
					wantVolume(t, node, v, files)
					deleteVolume(t, node, v)
				}
				deleteSnapshot(t, node, snapshot)
			}
			wantVolume(t, node, source, files)
			t.Logf("refused for want of room: %v", failed)
			if len(failed) == 0 {
				t.Error("the disk was never full")
			}
			deleteVolume(t, node, source)
			wantNothingFrozen(t, node)
		})
	}
}

// TestMergeOnAFullDisk: frozen uppers are not merged while there is no room, and are once there is.
func TestMergeOnAFullDisk(t *testing.T) {
	node := newNode(t, "--reconcile-interval=100ms")
	mountImage(t, "ext4", fullDiskSize, node.DataRoot, "")
	start(t, node)
	attributes := attributesOf(t, node, "directory")
	source := createSized(t, node, "source", readWriteOnce, snapshotSize, attributes...)
	files, content := map[string]string{}, strings.Repeat("x", 100<<10)
	var snapshots []string
	link := func(i int) {
		pod := newPod(t, node, fmt.Sprint("pod-", i))
		name := fmt.Sprint("file-", i)
		writeSynced(t, filepath.Join(publish(t, pod, source), name), content)
		files[name] = content
		unpublish(t, pod, source)
		removePod(t, pod)
	}
	for i := range 16 {
		link(i)
		snapshots = append(snapshots, createSnapshot(t, node, fmt.Sprint("snapshot-", i), source))
	}
	link(16)
	empty := leaveRoom(t, node.DataRoot, 60)
	snapshots = append(snapshots, createSnapshot(t, node, "snapshot-16", source))
	eventually(t, "the driver says that there is no room", func() bool { return strings.Contains(node.Log(), "are not merged now") })
	wantVolume(t, node, source, files)
	if strings.Contains(node.Log(), "Frozen uppers merged") {
		t.Error("there was room")
	}
	empty()
	eventually(t, "the frozen uppers are merged", func() bool { return strings.Contains(node.Log(), "Frozen uppers merged") })
	wantVolume(t, node, source, files)
	last := restore(t, node, "last", ofSnapshot(snapshots[16]), attributes...)
	wantVolume(t, node, last, files)
	for _, v := range []drivertest.Volume{last, source} {
		deleteVolume(t, node, v)
	}
	for _, id := range snapshots {
		deleteSnapshot(t, node, id)
	}
	wantNothingFrozen(t, node)
}

// TestCommitOnAFullDisk: a pod ends on a full disk, and the cache has what it had, or what the pod wrote. The next pod commits.
func TestCommitOnAFullDisk(t *testing.T) {
	for _, disk := range fullDisks {
		t.Run(disk.kind+" on "+disk.system, func(t *testing.T) {
			node, statuses := newCacheNode(t, "--reconcile-interval=100ms")
			mountImage(t, disk.system, fullDiskSize, node.DataRoot, "")
			start(t, node)
			deps := cacheVolume("ci", "cache://deps", "deps")
			maps.Copy(deps.Attributes, pairs(freezings[disk.kind]))
			deps.Attributes["sizeLimit"] = "16Mi"
			job(t, node, statuses, "first", deps, corev1.PodSucceeded, "a")
			want := map[string]string{"a": "first"}
			committed := 0
			for pages := range int64(proof(6, 40)) {
				pod := newPod(t, node, fmt.Sprint("job-", pages))
				write(t, filepath.Join(publish(t, pod, deps), "a"), pod.Name)
				statuses.Set(pod, corev1.PodSucceeded)
				empty := leaveRoom(t, node.DataRoot, pages)
				unpublish(t, pod, deps)
				removePod(t, pod)
				empty()
				reader := newPod(t, node, "reader")
				content, err := os.ReadFile(filepath.Join(publish(t, reader, deps), "a"))
				must(t, err)
				unpublish(t, reader, deps)
				removePod(t, reader)
				switch string(content) {
				case pod.Name:
					committed++
				case want["a"]:
				default:
					t.Errorf("the cache has %q, of %q and %q", content, want["a"], pod.Name)
				}
				next := fmt.Sprint("next-", pages)
				job(t, node, statuses, next, deps, corev1.PodSucceeded, "a")
				want["a"] = next
				wantCache(t, node, "ci", "cache://deps", want)
			}
			t.Logf("%d of %d commits found room", committed, proof(6, 40))
			must(t, node.Admin().DeleteCache(t.Context(), "ci", "deps"))
			wantNothingFrozen(t, node)
		})
	}
}
