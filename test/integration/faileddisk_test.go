package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// TestPodsEndOnAFailedDisk: whether something is mounted is a question to the mount table. The file system of the upper cannot answer.
func TestPodsEndOnAFailedDisk(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run("data root on "+kind, func(t *testing.T) {
			node := newNode(t)
			mountImage(t, kind, 512<<20, node.DataRoot, "")
			start(t, node)
			layers := layersOf(t, node, map[string]string{"f": "f"})
			pod := newPod(t, node, "pod")
			volumes := []drivertest.Volume{inline("layers", layers), claim("kept", readWriteOnce, "layers", layers)}
			for _, v := range volumes {
				write(t, filepath.Join(publish(t, pod, v), "f"), "written")
			}
			must(t, drivertest.ShutDown(node.DataRoot))
			for _, v := range volumes {
				unpublish(t, pod, v)
				wantAbsent(t, pod.Target(v.Name))
			}
			removePod(t, pod)
			mounted, err := os.ReadFile("/proc/self/mounts")
			must(t, err)
			if strings.Contains(string(mounted), pod.UID) {
				t.Errorf("something of the pod is still mounted:\n%s", mounted)
			}
		})
		t.Run("upper elsewhere, data root on "+kind, func(t *testing.T) {
			node := newNode(t)
			mountImage(t, kind, 512<<20, node.DataRoot, "")
			start(t, node)
			pod := newPod(t, node, "pod")
			scratch, err := pod.EmptyDir("scratch")
			must(t, err)
			v := inline("layers", layersOf(t, node, map[string]string{"f": "f"}), "upper", "volume://scratch/up")
			publish(t, pod, v)
			must(t, drivertest.ShutDown(node.DataRoot))
			unpublish(t, pod, v)
			must(t, os.RemoveAll(filepath.Dir(scratch)))
			removePod(t, pod)
		})
		t.Run("other volume on "+kind, func(t *testing.T) {
			node := startNode(t)
			pod := newPod(t, node, "pod")
			volume := sibling(t, pod, "data", kind)
			v := inline("layers", layersOf(t, node, map[string]string{"f": "f"}), "upper", "volume://data/up")
			write(t, filepath.Join(publish(t, pod, v), "f"), "written")
			must(t, drivertest.ShutDown(volume))
			unpublish(t, pod, v)
			wantAbsent(t, pod.Target(v.Name))
			must(t, unix.Unmount(volume, 0))
			must(t, os.RemoveAll(filepath.Dir(volume)))
			removePod(t, pod)
			wantNothingLeft(t, node)
		})
	}
}

// TestDeletedVolumeStaysDeleted: once DeleteVolume has answered, nobody asks for the volume again.
func TestDeletedVolumeStaysDeleted(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			node := newNode(t)
			mountImage(t, kind, 512<<20, node.DataRoot, "")
			start(t, node)
			v := create(t, node, "gone", readWriteOnce, "layers", layersOf(t, node, map[string]string{"f": "f"}))
			deleteVolume(t, node, v)
			must(t, drivertest.ShutDown(node.DataRoot))
			must(t, node.Kill())
			must(t, unix.Unmount(node.DataRoot, 0))
			mountExisting(t, kind, node.DataRoot+".img", node.DataRoot)
			start(t, node)
			wantNothingLeft(t, node)
		})
	}
}

// TestLayerThatDoesNotAnswer: a layer on a server that is away is waited for by nobody else. FUSE is such a server: its process is
// stopped, and every question to it waits.
func TestLayerThatDoesNotAnswer(t *testing.T) {
	for name, args := range map[string][]string{"statmount": nil, "no statmount": {"--disable-kernel-features=statmount"}} {
		t.Run(name, func(t *testing.T) {
			node := newNode(t, args...)
			away, content := filepath.Join(node.Dir, "away"), filepath.Join(node.Dir, "content")
			must(t, os.Mkdir(away, 0o755))
			fill(t, content, map[string]string{"layer/f": "f"})
			server := exec.Command("bindfs", "-f", "-o", "attr_timeout=0,entry_timeout=0", content, away)
			mustRun(t, server.Start())
			t.Cleanup(func() {
				must(t, server.Process.Signal(unix.SIGCONT))
				_ = unix.Unmount(away, unix.MNT_DETACH)
				must(t, errors.Join(server.Process.Kill(), ignoreExit(server.Wait())))
			})
			eventually(t, "the server answers", func() bool {
				_, err := os.Lstat(filepath.Join(away, "layer/f"))
				return err == nil
			})
			node.AddArgs("--layer-root=away="+away, "--reconcile-interval=50ms", "--volume-health")
			start(t, node)
			pod := newPod(t, node, "pod")
			hung := inline("layers", "dir://away/layer", "upper", "none")
			other := inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
			hung.Name, other.Name = "hung", "other"
			wantFile(t, filepath.Join(publish(t, pod, hung), "f"), "f")
			publish(t, pod, other)
			must(t, server.Process.Signal(unix.SIGSTOP))
			for range 2 {
				waitForReconcile(t, node)
			}
			unpublish(t, pod, other)
			wantHealth(t, node, pod, hung, inaccessible, "DoesNotAnswer")
			late := hung
			late.Name = "late"
			for range 2 {
				_, err := pod.Publish(timeout(t), late)
				wantCode(t, err, codes.Unavailable, "layer root away", "does not answer")
			}
			unpublish(t, pod, late)
			_, err := node.Controller().CreateVolume(timeout(t), createRequest("late", readWriteOnce, 0, "layers", "dir://away/layer"))
			wantCode(t, err, codes.Unavailable, "layer root away", "does not answer")
			storage, err := node.NodeService().NodeGetStorageHealth(timeout(t), &csi.NodeGetStorageHealthRequest{})
			must(t, err)
			found := fmt.Sprint(storage.GetBackendHealth())
			if !strings.Contains(found, "STORAGE_DEGRADED") || !strings.Contains(found, "layer root away: ") {
				t.Errorf("the health of the storage: %s", found)
			}
			must(t, node.Kill())
			start(t, node)
			unpublish(t, pod, hung)
			removePod(t, pod)
			wantNothingLeft(t, node)
		})
	}
}

// ignoreExit returns nil for a process that was killed.
func ignoreExit(err error) error {
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		return nil
	}
	return err
}
