package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

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
