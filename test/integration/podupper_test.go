package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// sibling makes another volume of the pod with a file system of its own, and returns where it is mounted.
func sibling(t *testing.T, pod *drivertest.Pod, name, kind string) string {
	t.Helper()
	path, err := pod.CSIVolume(name, "Ephemeral")
	must(t, err)
	if kind == "tmpfs" {
		mountTmpfs(t, path)
		return path
	}
	mountImage(t, kind, 512<<20, path, "")
	return path
}

func TestUpperInAnotherVolumeKeepsItBusy(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
			t.Run(kind, func(t *testing.T) {
				pod := newPod(t, node, "pod")
				volume := sibling(t, pod, "data", kind)
				v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "upper", "volume://data/over/here")
				target := publish(t, pod, v)
				write(t, filepath.Join(target, "f"), "pod")
				if err := unix.Unmount(volume, 0); !isErrno(err, unix.EBUSY) {
					t.Fatalf("kubelet could unmount the volume under the upper: %v", err)
				}
				unpublish(t, pod, v)
				wantFile(t, filepath.Join(volume, "over/here/upper/f"), "pod")
				must(t, unix.Unmount(volume, 0))
				wantNoViews(t, node)
			})
		}
	})
}

func TestUpperInAnEmptyDir(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		pod := newPod(t, node, "pod")
		scratch, err := pod.EmptyDir("scratch")
		must(t, err)
		v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "upper", "volume://scratch")
		target := publish(t, pod, v)
		write(t, filepath.Join(target, "f"), "pod")
		// Kubelet tears an emptyDir down by deleting it: the busy mount keeps the upper in it.
		if err := os.RemoveAll(scratch); !isErrno(err, unix.EROFS) {
			t.Errorf("delete the emptyDir under the upper: %v", err)
		}
		wantFile(t, filepath.Join(target, "f"), "pod")
		unpublish(t, pod, v)
		must(t, os.RemoveAll(scratch))
		must(t, os.Remove(filepath.Dir(scratch)))
		removePod(t, pod)
		wantNothingLeft(t, node)
	})
}

func TestUpperInAnotherVolumeIsForTheNextPodToo(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"}, map[string]string{"g": "layer"})
	v := inline("layers", layers, "upper", "volume://data/up")
	image := filepath.Join(t.TempDir(), "device")
	for turn, want := range []string{"layer", "pod"} {
		pod := newPod(t, node, "pod")
		volume, err := pod.CSIVolume("data", "Ephemeral")
		must(t, err)
		if turn == 0 {
			makeImage(t, "ext4", image, 64<<20, "")
		}
		mountExisting(t, "ext4", image, volume)
		target := publish(t, pod, v)
		wantFile(t, filepath.Join(target, "f"), want)
		write(t, filepath.Join(target, "f"), "pod")
		unpublish(t, pod, v)

		// The upper was made on other layers than these.
		other := v
		other.Attributes = pairs([]string{"layers", drivertest.Layers("layer-1"), "upper", "volume://data/up"})
		_, err = pod.Publish(timeout(t), other)
		wantCode(t, err, codes.FailedPrecondition, "other layers")
		must(t, unix.Unmount(volume, 0))
	}
	wantNoViews(t, node)
}

func TestTwoOverlaysNeverShareAnUpper(t *testing.T) {
	node := startNode(t)
	pod := newPod(t, node, "pod")
	volume := sibling(t, pod, "data", "ext4")
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	first := inline("layers", layers, "upper", "volume://data/up")
	second := first
	second.Name = "second"
	target := publish(t, pod, first)
	_, err := pod.Publish(timeout(t), second)
	wantCode(t, err, codes.FailedPrecondition, "never share one upper")
	write(t, filepath.Join(target, "f"), "first")

	// The lock outlives the driver.
	must(t, node.Kill())
	start(t, node)
	_, err = pod.Publish(timeout(t), second)
	wantCode(t, err, codes.FailedPrecondition, "never share one upper")

	unpublish(t, pod, first)
	wantFile(t, filepath.Join(publish(t, pod, second), "f"), "first")
	unpublish(t, pod, second)

	// A lock that a crash of this node left is no obstacle, one of another node on this device neither: the device is
	// attached here.
	for _, node := range []string{"test-node", "another-node"} {
		setOwner(t, filepath.Join(volume, "up"), map[string]string{"node": node, "bootID": "another boot", "volumeID": "gone", "target": "/gone"})
		publish(t, pod, second)
		unpublish(t, pod, second)
	}
	// Two paths in one volume are two uppers.
	second.Attributes = pairs([]string{"layers", layers, "upper", "volume://data/other"})
	publish(t, pod, first)
	publish(t, pod, second)
	if err := unix.Unmount(volume, 0); !isErrno(err, unix.EBUSY) {
		t.Errorf("unmount with two uppers: %v", err)
	}
	unpublish(t, pod, first)
	if err := unix.Unmount(volume, 0); !isErrno(err, unix.EBUSY) {
		t.Errorf("unmount with one upper: %v", err)
	}
	unpublish(t, pod, second)
	must(t, unix.Unmount(volume, 0))
}

func setOwner(t *testing.T, base string, owner map[string]string) {
	t.Helper()
	path := filepath.Join(base, "overlay-csi.json")
	data, err := os.ReadFile(path)
	must(t, err)
	var file map[string]any
	must(t, json.Unmarshal(data, &file))
	file["holder"] = owner
	data, err = json.Marshal(file)
	must(t, err)
	must(t, os.WriteFile(path, data, 0o600))
}

func TestFileSystemsThatCannotHoldAnUpperAreRefused(t *testing.T) {
	node := startNode(t)
	content := filepath.Join(node.Dir, "content")
	fill(t, content, map[string]string{"up/f": "f"})
	for name, c := range map[string]struct {
		mount func(t *testing.T, path string)
		word  string
	}{
		"ramfs":    {func(t *testing.T, path string) { must(t, unix.Mount("ramfs", path, "ramfs", 0, "")) }, "ramfs"},
		"squashfs": {func(t *testing.T, path string) { mountImage(t, "squashfs", 0, path, content) }, "read-only"},
		// FUSE is how most network file systems that are not in the kernel come.
		"fuse":    {func(t *testing.T, path string) { mustRun(t, exec.Command("bindfs", content, path).Run()) }, "fuse"},
		"overlay": {mountOverlay, "overlay"},
	} {
		t.Run(name, func(t *testing.T) {
			pod := newPod(t, node, "pod")
			path, err := pod.CSIVolume("data", "Ephemeral")
			must(t, err)
			c.mount(t, path)
			t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
			_, err = pod.Publish(timeout(t), inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "upper", "volume://data/up"))
			wantCode(t, err, codes.FailedPrecondition, c.word)
			// Nothing pins what was refused.
			must(t, unix.Unmount(path, 0))
			wantNoViews(t, node)
		})
	}
}

func mountOverlay(t *testing.T, path string) {
	dir := t.TempDir()
	for _, name := range []string{"lower", "upper", "work"} {
		must(t, os.Mkdir(filepath.Join(dir, name), 0o755))
	}
	options := "lowerdir=" + filepath.Join(dir, "lower") + ",upperdir=" + filepath.Join(dir, "upper") +
		",workdir=" + filepath.Join(dir, "work")
	must(t, unix.Mount("overlay", path, "overlay", 0, options))
}

// TestPodCannotLeadTheDriverOutOfItsVolume: everything in an emptyDir is the pod's to change, at any time.
func TestPodCannotLeadTheDriverOutOfItsVolume(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	outside := filepath.Join(node.Dir, "outside")
	must(t, os.Mkdir(outside, 0o755))

	t.Run("path is a link", func(t *testing.T) {
		pod := newPod(t, node, "pod")
		scratch, err := pod.EmptyDir("scratch")
		must(t, err)
		must(t, os.Symlink(outside, filepath.Join(scratch, "up")))
		_, _ = pod.Publish(timeout(t), inline("layers", layers, "upper", "volume://scratch/up"))
		wantEmpty(t, outside)
	})
	t.Run("path is a file", func(t *testing.T) {
		pod := newPod(t, node, "pod")
		scratch, err := pod.EmptyDir("scratch")
		must(t, err)
		write(t, filepath.Join(scratch, "up"), "the pod's")
		v := inline("layers", layers, "upper", "volume://scratch/up")
		_, err = pod.Publish(timeout(t), v)
		wantCode(t, err, codes.FailedPrecondition, `upper at "up"`, "something else than a directory")
		unpublish(t, pod, v)
		wantFile(t, filepath.Join(scratch, "up"), "the pod's")
	})
	t.Run("upper is a link", func(t *testing.T) {
		pod := newPod(t, node, "pod")
		scratch, err := pod.EmptyDir("scratch")
		must(t, err)
		must(t, os.Mkdir(filepath.Join(scratch, "up"), 0o777))
		for _, name := range []string{"upper", "work", "overlay-csi.json", "overlay-csi.json.new"} {
			must(t, os.Symlink(filepath.Join(outside, name), filepath.Join(scratch, "up", name)))
		}
		_, _ = pod.Publish(timeout(t), inline("layers", layers, "upper", "volume://scratch/up"))
		wantEmpty(t, outside)
	})
	t.Run("directory under the busy mount is renamed and replaced by a link", func(t *testing.T) {
		pod := newPod(t, node, "pod")
		scratch, err := pod.EmptyDir("scratch")
		must(t, err)
		v := inline("layers", layers, "upper", "volume://scratch/a/up")
		publish(t, pod, v)
		victim := filepath.Join(outside, "up")
		must(t, os.MkdirAll(victim, 0o755))
		mountTmpfs(t, victim)
		must(t, os.Rename(filepath.Join(scratch, "a"), filepath.Join(scratch, "b")))
		must(t, os.Symlink(outside, filepath.Join(scratch, "a")))
		unpublish(t, pod, v)
		mounts, err := drivertest.Mounts(victim)
		must(t, err)
		if len(mounts) != 1 {
			t.Errorf("the driver unmounted what it did not mount")
		}
		// Neither is the pin left where the pod moved it: nothing is in the way of kubelet's teardown.
		must(t, os.RemoveAll(scratch))
		scratch, err = pod.EmptyDir("scratch")
		must(t, err)
		must(t, os.RemoveAll(scratch))
	})
	wantNoViews(t, node)
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, entry := range entries {
		t.Errorf("the driver made %s", filepath.Join(dir, entry.Name()))
	}
}

func TestLockFileThatIsNoneIsReported(t *testing.T) {
	node := startNode(t)
	pod := newPod(t, node, "pod")
	scratch, err := pod.EmptyDir("scratch")
	must(t, err)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "upper", "volume://scratch/up")
	for name, content := range map[string]string{"no JSON": "{", "huge": strings.Repeat("[", 1<<20)} {
		t.Run(name, func(t *testing.T) {
			fill(t, scratch, map[string]string{"up/overlay-csi.json": content})
			_, err := pod.Publish(timeout(t), v)
			wantCode(t, err, codes.FailedPrecondition, "overlay-csi.json")
		})
	}
	must(t, os.Remove(filepath.Join(scratch, "up/overlay-csi.json")))
	must(t, unix.Mkfifo(filepath.Join(scratch, "up/overlay-csi.json"), 0o666))
	_, err = pod.Publish(timeout(t), v)
	wantCode(t, err, codes.FailedPrecondition, "regular file")
	wantNoViews(t, node)
}
