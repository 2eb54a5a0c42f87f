package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// damages are what becomes of a record.
var damages = map[string]func(t *testing.T, path string){
	"its end is gone": func(t *testing.T, path string) {
		data, err := os.ReadFile(path)
		must(t, err)
		must(t, os.WriteFile(path, data[:len(data)-2], 0o600))
	},
	"its beginning is gone": func(t *testing.T, path string) {
		data, err := os.ReadFile(path)
		must(t, err)
		must(t, os.WriteFile(path, data[2:], 0o600))
	},
	"zeroes":      func(t *testing.T, path string) { must(t, os.WriteFile(path, make([]byte, 4096), 0o600)) },
	"empty":       func(t *testing.T, path string) { must(t, os.Truncate(path, 0)) },
	"gone":        func(t *testing.T, path string) { must(t, os.Remove(path)) },
	"a directory": func(t *testing.T, path string) { must(t, os.Remove(path)); must(t, os.Mkdir(path, 0o700)) },
}

// TestCollectBesideADamagedRecord: the layers of a volume whose record cannot be read stay as long as its view is mounted, and those
// that no volume uses are removed all the same.
func TestCollectBesideADamagedRecord(t *testing.T) {
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			node := startNode(t, "--layer-gc-min-age=0s", "--reconcile-interval=1h", "--volume-health")
			r := startRegistry(t, node, registrytest.Options{})
			used := claim("used", readWriteMany, "layers", pushImage(t, r, "used:1", map[string]string{"f": "used"}, map[string]string{"g": "used"}),
				"upper", "pod")
			unused := inline("layers", pushImage(t, r, "unused:1", map[string]string{"f": "unused"}))
			pod := newPod(t, node, "pod")
			target := publish(t, pod, used)
			keep := storedLayers(t, node)
			publish(t, pod, unused)
			unpublish(t, pod, unused)
			record := filepath.Join(node.DataRoot, "volumes", pod.Request(used).GetVolumeId(), "volume.json")
			damage(t, record)
			collected, err := node.Admin().GC(timeout(t), false, true)
			must(t, err)
			if left := storedLayers(t, node); !slices.Equal(left, keep) {
				t.Errorf("the layers %q are left, want %q", left, keep)
			}
			wantFile(t, filepath.Join(target, "f"), "used")
			wantFile(t, filepath.Join(target, "g"), "used")
			if want := []string{"used"}; !slices.Equal(collected.Unreadable, want) {
				t.Errorf("overlayctl gc names the volumes %q, want %q", collected.Unreadable, want)
			}
			if reasons := storageHealth(t, node); !slices.Equal(reasons, []string{"STORAGE_DEGRADED RecordsDamaged"}) {
				t.Errorf("health: %q", reasons)
			}
		})
	}
}

// TestCollectBesideAViewOfUnknownLayers: where neither the record nor the kernel names the layers of a mounted view, any layer may be
// one of them, and none is removed.
func TestCollectBesideAViewOfUnknownLayers(t *testing.T) {
	for name, group := range map[string]string{"no descriptors": "", "ID-mapped": "1234"} {
		t.Run(name, func(t *testing.T) {
			node := newNode(t, "--layer-gc-min-age=0s", "--reconcile-interval=1h")
			if group == "" {
				node.AddArgs("--disable-kernel-features=layer-fd")
			}
			start(t, node)
			r := startRegistry(t, node, registrytest.Options{})
			v := inline("layers", pushImage(t, r, "used:1", map[string]string{"f": "used"}))
			v.Group = group
			pod := newPod(t, node, "pod")
			target := publish(t, pod, v)
			record := filepath.Join(node.DataRoot, "volumes", pod.Request(v).GetVolumeId(), "volume.json")
			whole, err := os.ReadFile(record)
			must(t, err)
			must(t, os.Truncate(record, 0))
			if _, err := node.Admin().GC(timeout(t), false, true); err == nil || !strings.Contains(err.Error(), target) {
				t.Errorf("garbage was collected: %v", err)
			}
			wantFile(t, filepath.Join(target, "f"), "used")
			must(t, os.WriteFile(record, whole, 0o600))
			collected, err := node.Admin().GC(timeout(t), false, true)
			if err != nil || len(collected.Layers) > 0 {
				t.Errorf("with the record restored: %+v, %v", collected, err)
			}
			unpublish(t, pod, v)
			collected, err = node.Admin().GC(timeout(t), false, true)
			if err != nil || len(collected.Layers) != 1 {
				t.Errorf("after the pod: %+v, %v", collected, err)
			}
		})
	}
}

// TestCreateTakesOverNoUpper: a directory without a record that has an upper is somebody's, and neither becomes the upper of a new
// claim nor is it discarded where that does not fit.
func TestCreateTakesOverNoUpper(t *testing.T) {
	node := startNode(t, "--reconcile-interval=1h")
	layers := layersOf(t, node, map[string]string{"f": "f"})
	var disk unix.Statfs_t
	must(t, unix.Statfs(node.DataRoot, &disk))
	for name, size := range map[string]int64{"fits": 1 << 20, "does-not-fit": int64(disk.Blocks) * disk.Bsize} {
		for _, dir := range []string{"upper", "pods/pod/upper"} {
			id := name + "-" + strings.ReplaceAll(dir, "/", "-")
			precious := filepath.Join(node.DataRoot, "volumes", id, dir, "precious")
			must(t, os.MkdirAll(filepath.Dir(precious), 0o700))
			write(t, precious, "bytes")
			_, err := node.Controller().CreateVolume(timeout(t), createRequest(id, readWriteOnce, size, "layers", layers))
			wantCode(t, err, codes.DataLoss, "without its record")
			wantFile(t, precious, "bytes")
		}
	}
	// What a crash between the directory and the record leaves is taken.
	must(t, os.Mkdir(filepath.Join(node.DataRoot, "volumes", "crashed"), 0o700))
	v := create(t, node, "crashed", readWriteOnce, "layers", layers)
	pod := newPod(t, node, "pod")
	wantFile(t, filepath.Join(publish(t, pod, v), "f"), "f")
	unpublish(t, pod, v)
}

// TestEmptyRecordOfALiveView: neither reconcile nor another pod's end throws away an upper that a view is mounted on.
func TestEmptyRecordOfALiveView(t *testing.T) {
	node := startNode(t, "--reconcile-interval=50ms")
	layers := layersOf(t, node, map[string]string{"f": "f"})
	one, two := newPod(t, node, "one"), newPod(t, node, "two")
	for name, v := range map[string]drivertest.Volume{
		"inline":    inline("layers", layers),
		"image":     inline("layers", layers, "sizeLimit", "16Mi", "sizeEnforcement", "image"),
		"memory":    inline("layers", layers, "sizeLimit", "16Mi", "medium", "memory"),
		"each pod":  claim("each", readWriteMany, "layers", layers, "upper", "pod"),
		"each's fs": claim("memory", readWriteMany, "layers", layers, "upper", "pod", "sizeLimit", "16Mi", "medium", "memory"),
	} {
		t.Run(name, func(t *testing.T) {
			target := publish(t, one, v)
			if v.Claim {
				publish(t, two, v)
			}
			must(t, os.Truncate(filepath.Join(node.DataRoot, "volumes", one.Request(v).GetVolumeId(), "volume.json"), 0))
			if v.Claim {
				unpublish(t, two, v)
			}
			waitForReconcile(t, node)
			write(t, filepath.Join(target, "written"), "after")
			wantFile(t, filepath.Join(target, "written"), "after")
			wantFile(t, filepath.Join(target, "f"), "f")
			unpublish(t, one, v)
		})
	}
	for range 2 {
		waitForReconcile(t, node)
	}
	wantNothingLeft(t, node)
}

// TestUnpublishWithADamagedRecord unmounts also what no record names any more: the file system of the upper, and the busy mount in
// another volume of the pod.
func TestUnpublishWithADamagedRecord(t *testing.T) {
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			node := startNode(t, "--reconcile-interval=1h")
			layers := layersOf(t, node, map[string]string{"f": "f"})
			pod := newPod(t, node, "pod")
			other := sibling(t, pod, "data", "ext4")
			scratch, err := pod.EmptyDir("scratch")
			must(t, err)
			kept := createSized(t, node, "kept", readWriteOnce, 16<<20, "layers", layers, "sizeEnforcement", "image")
			volumes := []drivertest.Volume{
				inline("layers", layers, "sizeLimit", "16Mi", "medium", "memory"),
				inline("layers", layers, "sizeLimit", "16Mi", "sizeEnforcement", "image"),
				claim("each", readWriteMany, "layers", layers, "upper", "pod", "sizeLimit", "16Mi", "medium", "memory"),
				inline("layers", layers, "upper", "volume://data/up"),
				inline("layers", layers, "upper", "volume://scratch/up"),
				kept,
			}
			for i := range volumes {
				if !volumes[i].Claim {
					volumes[i].Name = fmt.Sprint("inline-", i)
				}
				publish(t, pod, volumes[i])
			}
			second := newPod(t, node, "second")
			shared := publish(t, second, kept)
			for _, v := range volumes {
				damage(t, filepath.Join(node.DataRoot, "volumes", pod.Request(v).GetVolumeId(), "volume.json"))
				unpublish(t, pod, v)
			}
			// The file system of an upper that another pod has stays.
			write(t, filepath.Join(shared, "written"), "by the second")
			wantFile(t, filepath.Join(shared, "written"), "by the second")
			unpublish(t, second, kept)
			must(t, unix.Unmount(other, 0))
			must(t, os.RemoveAll(scratch))
			mounts, err := drivertest.Mounts(node.KubeletDir)
			must(t, err)
			for _, mount := range mounts {
				t.Errorf("left mounted: %s", mount.Mountpoint)
			}
			images, err := filepath.Glob(filepath.Join(node.DataRoot, "volumes", "*", "disk.img"))
			must(t, err)
			for _, image := range images {
				wantNoLoop(t, image)
			}
		})
	}
}

// TestUnpublishBesideABusyMountWithoutALockFile: the pod has removed the lock file of a view of its own. Its other volumes, also those that
// were unpublished already, end as ever, and the busy mount stays.
func TestUnpublishBesideABusyMountWithoutALockFile(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, record string){
		"twice":          func(*testing.T, string) {},
		"damaged record": func(t *testing.T, record string) { must(t, os.WriteFile(record, []byte("{"), 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			node := startNode(t, "--reconcile-interval=1h")
			layers := layersOf(t, node, map[string]string{"f": "layer"})
			pod := newPod(t, node, "pod")
			scratch, err := pod.EmptyDir("scratch")
			must(t, err)
			v, live := inline("layers", layers), inline("layers", layers, "upper", "volume://scratch/dir/live")
			live.Name = "live"
			publish(t, pod, v)
			target := publish(t, pod, live)
			container := mountBare(t, scratch)
			must(t, os.Remove(filepath.Join(container, "dir/live/overlay-csi.json")))
			must(t, os.Rename(filepath.Join(container, "dir"), filepath.Join(container, "moved")))
			must(t, unix.Unmount(container, unix.MNT_DETACH))
			damage(t, filepath.Join(node.DataRoot, "volumes", pod.Request(v).GetVolumeId(), "volume.json"))
			for range 2 {
				unpublish(t, pod, v)
			}
			if mounts, err := drivertest.Mounts(filepath.Join(scratch, "moved/live")); err != nil || len(mounts) != 1 {
				t.Errorf("the busy mount of the other view: %v, %v", mounts, err)
			}
			write(t, filepath.Join(target, "f"), "other")
			unpublish(t, pod, live)
			must(t, os.RemoveAll(scratch))
		})
	}
}

// wantNoLoop checks that no loop device has the file.
func wantNoLoop(t *testing.T, path string) {
	t.Helper()
	output, err := exec.Command("losetup", "--noheadings", "--associated", path).CombinedOutput()
	if err != nil || len(output) > 0 {
		t.Errorf("%s has a loop device: %s %v", path, output, err)
	}
}

// TestUppersOfNoPublication: an undo that failed half-way leaves the upper of a pod mounted, and no publication. Neither DeleteVolume
// nor reconcile throws the volume away with it.
func TestUppersOfNoPublication(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, node *drivertest.Node, v drivertest.Volume){
		"deleted": deleteVolume,
		"reconciled": func(t *testing.T, node *drivertest.Node, _ drivertest.Volume) {
			must(t, node.Kill())
			// It is ready once it has reconciled.
			start(t, node)
		},
	} {
		t.Run(name, func(t *testing.T) {
			node := startNode(t, "--reconcile-interval=1h")
			layers := layersOf(t, node, map[string]string{"f": "f"})
			pod := newPod(t, node, "pod")
			for kind, limit := range map[string][]string{"image": {"sizeEnforcement", "image"}, "memory": {"medium", "memory"}} {
				v := createSized(t, node, kind, readWriteMany, 16<<20, append([]string{"layers", layers, "upper", "pod"}, limit...)...)
				publish(t, pod, v)
				must(t, unix.Unmount(pod.Target(v.Name), 0))
				record := filepath.Join(node.DataRoot, "volumes", v.ID, "volume.json")
				data, err := os.ReadFile(record)
				must(t, err)
				var content map[string]any
				must(t, json.Unmarshal(data, &content))
				delete(content, "publications")
				data, err = json.Marshal(content)
				must(t, err)
				must(t, os.WriteFile(record, data, 0o600))
				end(t, node, v)
			}
			wantNothingLeft(t, node)
			loops, err := drivertest.LoopDevices(node.DataRoot)
			must(t, err)
			if len(loops) > 0 {
				t.Errorf("left attached: %q", loops)
			}
		})
	}
}

// TestMountPointsOfLostVolumes: a power cut can take a volume's directory, which was not synced, and leave the mount point of its upper.
func TestMountPointsOfLostVolumes(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "f"})
	pod := newPod(t, node, "pod")
	lost := inline("layers", layers, "sizeLimit", "16Mi", "medium", "memory")
	kept := inline("layers", layers, "sizeLimit", "16Mi", "sizeEnforcement", "image")
	lost.Name, kept.Name = "lost", "kept"
	publish(t, pod, lost)
	publish(t, pod, kept)
	must(t, node.Reboot())
	must(t, os.RemoveAll(filepath.Join(node.DataRoot, "volumes", pod.Request(lost).GetVolumeId())))
	start(t, node)
	publish(t, pod, kept)
	must(t, os.RemoveAll(filepath.Dir(pod.Target(lost.Name))))
	// What is mounted stays over a restart.
	must(t, node.Kill())
	start(t, node)
	write(t, filepath.Join(pod.Target(kept.Name), "f"), "written")
	unpublish(t, pod, kept)
	removePod(t, pod)
	wantNothingLeft(t, node)
}
