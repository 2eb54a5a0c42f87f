package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// reboot does to the node what a reboot does: the driver ends without a word, every mount is gone, the state is of an
// earlier boot. (The kernel's boot ID cannot be changed, so the state's is.)
func reboot(t *testing.T, node *drivertest.Node) {
	t.Helper()
	must(t, node.Reboot())
}

func TestReboot(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		layers := layersOf(t, node, map[string]string{"f": "layer"})
		pod := newPod(t, node, "pod")
		ephemeral := inline("layers", layers)
		each := claim("each", readWriteMany, "layers", layers, "upper", "pod")
		kept := claim("kept", readWriteOnce, "layers", layers)
		for _, v := range []drivertest.Volume{ephemeral, each, kept} {
			write(t, filepath.Join(publish(t, pod, v), "f"), "before the reboot")
		}
		reboot(t, node)
		start(t, node)
		// Kubelet starts the pod again: same UID, same volumes.
		wantFile(t, filepath.Join(publish(t, pod, ephemeral), "f"), "layer")
		wantFile(t, filepath.Join(publish(t, pod, each), "f"), "layer")
		wantFile(t, filepath.Join(publish(t, pod, kept), "f"), "before the reboot")
		for _, v := range []drivertest.Volume{ephemeral, each, kept} {
			unpublish(t, pod, v)
		}
	})
}

// TestPodDeletedWhileTheNodeReboots is kubernetes #127229: kubelet comes back without the pod, asks for nothing, and
// the volume stays for ever.
func TestPodDeletedWhileTheNodeReboots(t *testing.T) {
	node := startNode(t, "--reconcile-interval=100ms")
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	kept := claim("kept", readWriteOnce, "layers", layers)
	volumes := []drivertest.Volume{inline("layers", layers), claim("each", readWriteMany, "layers", layers, "upper", "pod"),
		claim("rox", readOnlyMany, "layers", layers), kept}
	pod, later := newPod(t, node, "pod"), newPod(t, node, "later")
	for _, p := range []*drivertest.Pod{pod, later} {
		for _, v := range volumes {
			publish(t, p, v)
		}
	}
	write(t, filepath.Join(pod.Target("kept"), "f"), "kept")
	reboot(t, node)
	// One pod's directory is gone when the driver starts, the other's goes while it runs.
	must(t, os.RemoveAll(pod.Dir()))
	start(t, node)
	must(t, os.RemoveAll(later.Dir()))
	volumesDir := filepath.Join(node.DataRoot, "volumes")
	eventually(t, "only the claim's upper is left", func() bool {
		entries, err := os.ReadDir(volumesDir)
		return err == nil && len(entries) == 1
	})
	wantFile(t, filepath.Join(upperDir(node, later, kept), "f"), "kept")
}

// TestMissingKubeletDirectoryIsNoProof: where kubelet's directory itself is gone, pods are not.
func TestMissingKubeletDirectoryIsNoProof(t *testing.T) {
	node := startNode(t, "--reconcile-interval=50ms")
	v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}))
	pod := newPod(t, node, "pod")
	write(t, filepath.Join(publish(t, pod, v), "f"), "pod")
	must(t, node.Kill())
	must(t, drivertest.UnmountBeneath(node.KubeletDir))
	pods := filepath.Join(node.KubeletDir, "pods")
	must(t, os.Rename(pods, pods+".away"))
	start(t, node)
	for range 2 {
		waitForReconcile(t, node)
	}
	must(t, os.Rename(pods+".away", pods))
	// Of the same boot, so that what was written is still there.
	wantFile(t, filepath.Join(publish(t, pod, v), "f"), "pod")
	unpublish(t, pod, v)
}

// waitForReconcile waits until the driver has looked through its volumes: it then has removed a directory without a state.
func waitForReconcile(t *testing.T, node *drivertest.Node) {
	t.Helper()
	dir := filepath.Join(node.DataRoot, "volumes", "zz-left-by-a-crash")
	must(t, os.MkdirAll(dir, 0o700))
	eventually(t, "the driver has reconciled", func() bool {
		_, err := os.Lstat(dir)
		return os.IsNotExist(err)
	})
}

func TestLiveViewsOutliveTheDriver(t *testing.T) {
	for name, end := range map[string]func(*drivertest.Node) error{"SIGTERM": (*drivertest.Node).Stop, "SIGKILL": (*drivertest.Node).Kill} {
		t.Run(name, func(t *testing.T) {
			node := startNode(t)
			layers := layersOf(t, node, map[string]string{"f": "layer"})
			pod := newPod(t, node, "pod")
			volumes := []drivertest.Volume{inline("layers", layers), claim("kept", readWriteOnce, "layers", layers)}
			for _, v := range volumes {
				target := publish(t, pod, v)
				open, err := os.Create(filepath.Join(target, "open"))
				must(t, err)
				must(t, end(node))
				_, err = open.WriteString("while the driver is away")
				must(t, err)
				must(t, open.Close())
				start(t, node)
				wantFile(t, filepath.Join(target, "open"), "while the driver is away")
				if again := publish(t, pod, v); again != target {
					t.Error("published elsewhere")
				}
				unpublish(t, pod, v)
			}
		})
	}
}

// TestDriverNeedsNoMountOfItsOwn is dell/csm #1843: a mount in the driver's own mount namespace was gone after a
// restart. Here the driver finds the shared overlay at a pod's target, and makes no mount anywhere else.
func TestDriverNeedsNoMountOfItsOwn(t *testing.T) {
	node := startNode(t)
	v := claim("shared", readWriteOnce, "layers", layersOf(t, node, map[string]string{"f": "layer"}))
	one, two := newPod(t, node, "one"), newPod(t, node, "two")
	first := publish(t, one, v)
	mounts, err := drivertest.Mounts(node.Dir)
	must(t, err)
	for _, mount := range mounts {
		if mount.Mountpoint != first && mount.Mountpoint != node.Dir {
			t.Errorf("a mount that is no pod's: %s", mount.Mountpoint)
		}
	}
	must(t, node.Kill())
	start(t, node)
	second := publish(t, two, v)
	if device(t, first) != device(t, second) {
		t.Error("two overlays on one upper")
	}
	unpublish(t, one, v)
	unpublish(t, two, v)
}

// TestUpperThatAContainerStillHas: the host's mount is gone, but a mount namespace still has it. A second overlay on the
// upper would be undefined behaviour.
func TestUpperThatAContainerStillHas(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		v := claim("kept", readWriteOnce, "layers", layersOf(t, node, map[string]string{"f": "layer"}))
		pod := newPod(t, node, "pod")
		target := publish(t, pod, v)
		open, err := os.Create(filepath.Join(target, "f"))
		must(t, err)
		must(t, unix.Unmount(target, unix.MNT_DETACH))
		_, err = pod.Publish(timeout(t), v)
		wantCode(t, err, codes.Unavailable, "another overlay")
		_, err = open.WriteString("late")
		must(t, err)
		must(t, open.Close())
		wantFile(t, filepath.Join(publish(t, pod, v), "f"), "late")
		unpublish(t, pod, v)
	})
}

func TestCrashRemains(t *testing.T) {
	node := startNode(t)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}))
	pod := newPod(t, node, "pod")
	publish(t, pod, v)
	must(t, node.Kill())
	volumes := filepath.Join(node.DataRoot, "volumes")
	must(t, os.MkdirAll(filepath.Join(volumes, "no-state"), 0o700))
	must(t, os.MkdirAll(filepath.Join(volumes, "half-written"), 0o700))
	write(t, filepath.Join(volumes, "half-written/volume.json.new"), `{"vers`)
	must(t, os.MkdirAll(filepath.Join(volumes, "torn/upper"), 0o700))
	write(t, filepath.Join(volumes, "torn/volume.json"), "")
	must(t, os.MkdirAll(filepath.Join(volumes, "lost/upper"), 0o700))
	write(t, filepath.Join(volumes, "lost/upper/precious"), "bytes")
	must(t, os.MkdirAll(filepath.Join(volumes, "damaged/upper"), 0o700))
	write(t, filepath.Join(volumes, "damaged/volume.json"), `{"version":1,`)
	write(t, filepath.Join(volumes, "damaged/upper/precious"), "bytes")
	must(t, os.MkdirAll(filepath.Join(node.DataRoot, "trash/old/deep/er"), 0o700))
	start(t, node)
	for _, gone := range []string{"volumes/no-state", "volumes/half-written", "volumes/torn", "trash/old"} {
		eventually(t, gone+" is gone", func() bool {
			_, err := os.Lstat(filepath.Join(node.DataRoot, gone))
			return os.IsNotExist(err)
		})
	}
	// What may be somebody's bytes is left for a person.
	wantFile(t, filepath.Join(volumes, "lost/upper/precious"), "bytes")
	wantFile(t, filepath.Join(volumes, "damaged/upper/precious"), "bytes")
	_, err := pod.Publish(timeout(t), claim("lost", readWriteOnce, "layers", drivertest.Layers("layer-0")))
	wantCode(t, err, codes.DataLoss, "without its record")
	// Nor is it taken for rubbish when the volume is asked for with another policy.
	_, err = pod.Publish(timeout(t), claim("lost", readWriteMany, "layers", drivertest.Layers("layer-0"), "upper", "pod"))
	wantCode(t, err, codes.DataLoss, "without its record")
	wantFile(t, filepath.Join(volumes, "lost/upper/precious"), "bytes")
	_, err = pod.Publish(timeout(t), claim("damaged", readWriteOnce, "layers", drivertest.Layers("layer-0")))
	wantCode(t, err, codes.DataLoss, "damaged")
	unpublish(t, pod, v)
}

// TestBusyMountOfAnInterruptedPublishIsUnmounted: kubelet could not unmount the volume, and the pod would stay Terminating.
func TestBusyMountOfAnInterruptedPublishIsUnmounted(t *testing.T) {
	node := startNode(t)
	pod := newPod(t, node, "pod")
	volume := sibling(t, pod, "data", "ext4")
	v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "upper", "volume://data/up")
	target := publish(t, pod, v)
	must(t, node.Kill())
	must(t, unix.Unmount(target, 0))
	if err := unix.Unmount(volume, 0); !isErrno(err, unix.EBUSY) {
		t.Fatalf("no pin: %v", err)
	}
	start(t, node)
	// The publish that is tried again pins again.
	publish(t, pod, v)
	if err := unix.Unmount(volume, 0); !isErrno(err, unix.EBUSY) {
		t.Fatalf("no pin: %v", err)
	}
	unpublish(t, pod, v)
	must(t, unix.Unmount(volume, 0))
}

func TestOnlyOneDriverOnADataRoot(t *testing.T) {
	node := startNode(t)
	second := newNode(t)
	second.DataRoot = node.DataRoot
	done := make(chan error, 1)
	go func() { done <- second.Start(t.Context()) }()
	eventually(t, "the second driver waits", func() bool { return strings.Contains(second.Log(), "Waiting for another process to end") })
	select {
	case err := <-done:
		t.Fatalf("the second driver did not wait: %v", err)
	default:
	}
	must(t, node.Kill())
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
