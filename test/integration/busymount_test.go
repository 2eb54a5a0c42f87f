package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// newContainerNode makes a node whose driver has a mount namespace of its own, with kubelet's directory Bidirectional, as in its
// container. This process is the host.
func newContainerNode(t *testing.T, args ...string) *drivertest.Node {
	t.Helper()
	script := filepath.Join(t.TempDir(), "overlay-csi")
	// The shell of busybox takes its own unshare, which cannot do this, for a name without a path.
	unshare, err := exec.LookPath("unshare")
	mustRun(t, err)
	content := fmt.Sprintf("#!/bin/sh\nexec %s --mount --propagation unchanged %s \"$@\"\n", unshare, driverBinary(t))
	must(t, os.WriteFile(script, []byte(content), 0o755))
	node := newNodeOf(t, script, args...)
	must(t, unix.Mount(node.KubeletDir, node.KubeletDir, "", unix.MS_BIND, ""))
	must(t, unix.Mount("", node.KubeletDir, "", unix.MS_SHARED, ""))
	return node
}

// stage mounts the file system of a claim as a CSI driver does for kubelet, and returns what puts the claim into a pod.
func stage(t *testing.T, node *drivertest.Node) (mountIn func(pod *drivertest.Pod) (path string)) {
	t.Helper()
	global := filepath.Join(node.KubeletDir, "plugins/kubernetes.io/csi/other.example.com/hash/globalmount")
	must(t, os.MkdirAll(global, 0o755))
	mountTmpfs(t, global)
	return func(pod *drivertest.Pod) string {
		t.Helper()
		path, err := pod.CSIVolume("data", "Ephemeral")
		must(t, err)
		must(t, unix.Mount(global, path, "", unix.MS_BIND, ""))
		t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
		return path
	}
}

// mountBare mounts a volume elsewhere without what is mounted in it, as a container may have it, and returns the path.
func mountBare(t *testing.T, volume string) string {
	t.Helper()
	path := t.TempDir()
	must(t, unix.Mount(volume, path, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	return path
}

func wantBusy(t *testing.T, volume, when string) {
	t.Helper()
	if err := unix.Unmount(volume, 0); !isErrno(err, unix.EBUSY) {
		t.Fatalf("%s, kubelet could unmount the volume under the upper: %v", when, err)
	}
}

// TestUpperInAClaimOfTwoPods: the view of one pod keeps the claim mounted in that pod, and in no other one.
func TestUpperInAClaimOfTwoPods(t *testing.T) {
	for _, secondIsLater := range []bool{false, true} {
		t.Run(fmt.Sprintf("second is later %t", secondIsLater), func(t *testing.T) {
			node := newContainerNode(t, "--reconcile-interval=50ms")
			start(t, node)
			mountIn := stage(t, node)
			one, two := newPod(t, node, "one"), newPod(t, node, "two")
			inOne := mountIn(one)
			v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "upper", "volume://data/up")
			var target, inTwo string
			if secondIsLater {
				target = publish(t, one, v)
				inTwo = mountIn(two)
			} else {
				inTwo = mountIn(two)
				target = publish(t, one, v)
			}
			write(t, filepath.Join(target, "f"), "pod")
			wantBusy(t, inOne, "while the view is mounted")
			must(t, unix.Unmount(inTwo, 0))

			// A publish of the second pod that is refused, and its recovery, leave the first pod's upper alone.
			must(t, os.Remove(inTwo))
			inTwo = mountIn(two)
			_, err := two.Publish(timeout(t), v)
			wantCode(t, err, codes.FailedPrecondition, "never share one upper")
			waitForReconcile(t, node)
			wantBusy(t, inOne, "after another pod's publish failed")

			must(t, node.Kill())
			if secondIsLater {
				wantBusy(t, inOne, "while the driver is dead")
			}
			start(t, node)
			wantBusy(t, inOne, "after the driver started")
			waitForReconcile(t, node)
			wantBusy(t, inOne, "after recovery")
			unpublish(t, two, v)
			must(t, unix.Unmount(inTwo, 0))
			wantBusy(t, inOne, "after the other pod")
			wantFile(t, filepath.Join(target, "f"), "pod")

			unpublish(t, one, v)
			wantFile(t, filepath.Join(inOne, "up/upper/f"), "pod")
			must(t, unix.Unmount(inOne, 0))
		})
	}
}

// TestUpperInAClaimOfOnePod: the mount of the claim at which it is staged is no other pod's, and the volume stays busy also while the
// driver is dead.
func TestUpperInAClaimOfOnePod(t *testing.T) {
	node := newContainerNode(t)
	start(t, node)
	pod := newPod(t, node, "pod")
	volume := stage(t, node)(pod)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "upper", "volume://data/up")
	publish(t, pod, v)
	must(t, node.Kill())
	wantBusy(t, volume, "while the driver is dead")
	start(t, node)
	unpublish(t, pod, v)
	must(t, unix.Unmount(volume, 0))
}

// TestUpperIsNotWrittenBeneathItsView: containers have the busy mount in the other volume, as well those that mount that read-only.
func TestUpperIsNotWrittenBeneathItsView(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		pod := newPod(t, node, "pod")
		scratch, err := pod.EmptyDir("scratch")
		must(t, err)
		v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "upper", "volume://scratch/up")
		target := publish(t, pod, v)
		// A container runtime mounts a volume with what is mounted in it, and makes that one mount read-only.
		container := t.TempDir()
		must(t, unix.Mount(scratch, container, "", unix.MS_BIND|unix.MS_REC, ""))
		t.Cleanup(func() { _ = unix.Unmount(container, unix.MNT_DETACH) })
		must(t, unix.Mount("", container, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		for _, volume := range []string{scratch, container} {
			if err := os.WriteFile(filepath.Join(volume, "up/upper/written"), nil, 0o644); !isErrno(err, unix.EROFS) {
				t.Errorf("write beneath the mounted overlay: %v, want EROFS", err)
			}
		}
		write(t, filepath.Join(target, "f"), "pod")
		wantFile(t, filepath.Join(container, "up/upper/f"), "pod")
		write(t, filepath.Join(scratch, "beside"), "the upper")
		// The driver itself can still clear the work directory of a view that somebody unmounted.
		must(t, unix.Unmount(container, unix.MNT_DETACH))
		must(t, unix.Unmount(target, 0))
		wantFile(t, filepath.Join(publish(t, pod, v), "f"), "pod")
		unpublish(t, pod, v)
		write(t, filepath.Join(scratch, "up/upper/written"), "")
	})
}

// TestBusyMountThatThePodHides: a pod that hides the busy mount and forges the lock file does not stay Terminating.
func TestBusyMountThatThePodHides(t *testing.T) {
	for name, forge := range map[string]func(t *testing.T, base string){
		"deleted": func(t *testing.T, base string) { must(t, os.Remove(filepath.Join(base, "overlay-csi.json"))) },
		"not JSON": func(t *testing.T, base string) {
			must(t, os.WriteFile(filepath.Join(base, "overlay-csi.json"), []byte("{"), 0o600))
		},
		"of a view that is gone": func(t *testing.T, base string) {
			setOwner(t, base, map[string]string{"node": "test-node", "bootID": "b", "volumeID": "gone", "target": "/gone"})
		},
		"of another node": func(t *testing.T, base string) {
			setOwner(t, base, map[string]string{"node": "other", "bootID": "b", "volumeID": "there", "target": "/there"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			node := startNode(t, "--reconcile-interval=1h")
			pod := newPod(t, node, "pod")
			scratch, err := pod.EmptyDir("scratch")
			must(t, err)
			layers := layersOf(t, node, map[string]string{"f": "layer"})
			v, other := inline("layers", layers, "upper", "volume://scratch/a/up"), inline("layers", layers, "upper", "volume://scratch/other")
			other.Name = "other"
			publish(t, pod, v)
			publish(t, pod, other)
			container := mountBare(t, scratch)
			must(t, os.Rename(filepath.Join(container, "a"), filepath.Join(container, "b")))
			forge(t, filepath.Join(container, "b/up"))
			must(t, unix.Unmount(container, unix.MNT_DETACH))

			unpublish(t, pod, v)
			must(t, os.RemoveAll(filepath.Join(scratch, "b")))
			if mounts, err := drivertest.Mounts(filepath.Join(scratch, "other")); err != nil || len(mounts) != 1 {
				t.Errorf("the busy mount of the other view: %v, %v", mounts, err)
			}
			unpublish(t, pod, other)
			must(t, os.RemoveAll(scratch))
		})
	}
}

// TestLockFileThatNamesALiveView: a pod that names in its lock file a view that is published elsewhere does not stay Terminating,
// and the other view is left alone.
func TestLockFileThatNamesALiveView(t *testing.T) {
	for _, c := range []struct {
		name    string
		samePod bool
	}{{"of another pod", false}, {"of the pod, in another volume", true}} {
		t.Run(c.name, func(t *testing.T) {
			node := startNode(t, "--reconcile-interval=1h")
			layers := layersOf(t, node, map[string]string{"f": "layer"})
			pod := newPod(t, node, "pod")
			victim := pod
			if !c.samePod {
				victim = newPod(t, node, "victim")
			}
			scratch, err := pod.EmptyDir("scratch")
			must(t, err)
			elsewhere, err := victim.EmptyDir("elsewhere")
			must(t, err)
			v, live := inline("layers", layers, "upper", "volume://scratch/up"), inline("layers", layers, "upper", "volume://elsewhere/up")
			live.Name = "live"
			target := publish(t, victim, live)
			publish(t, pod, v)

			container := mountBare(t, scratch)
			setOwner(t, filepath.Join(container, "up"), holderOf(t, filepath.Join(elsewhere, "up")))
			must(t, unix.Unmount(container, unix.MNT_DETACH))

			unpublish(t, pod, v)
			must(t, os.RemoveAll(scratch))
			if mounts, err := drivertest.Mounts(filepath.Join(elsewhere, "up")); err != nil || len(mounts) != 1 {
				t.Errorf("the busy mount of the other view: %v, %v", mounts, err)
			}
			write(t, filepath.Join(target, "f"), "other")
			unpublish(t, victim, live)
			wantFile(t, filepath.Join(elsewhere, "up/upper/f"), "other")
			must(t, os.RemoveAll(elsewhere))
		})
	}
}

// TestBusyMountOfNobody: where neither a record nor a lock file says whose a busy mount is, the pod ends if nothing is mounted on the
// upper. That of another view of the pod stays as long as the view.
func TestBusyMountOfNobody(t *testing.T) {
	for _, where := range []string{"scratch", "elsewhere"} {
		t.Run("the other in "+where, func(t *testing.T) { testBusyMountOfNobody(t, where) })
	}
}

func testBusyMountOfNobody(t *testing.T, where string) {
	node := startNode(t, "--reconcile-interval=1h")
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	pod := newPod(t, node, "pod")
	scratch, err := pod.EmptyDir("scratch")
	must(t, err)
	elsewhere, err := pod.EmptyDir(where)
	must(t, err)
	v, live := inline("layers", layers, "upper", "volume://scratch/up"), inline("layers", layers, "upper", "volume://"+where+"/live")
	live.Name = "live"
	publish(t, pod, v)
	target := publish(t, pod, live)
	// A pod sees no busy mount.
	forget := func(v drivertest.Volume, volume, name string) {
		container := mountBare(t, volume)
		must(t, os.Remove(filepath.Join(container, name, "overlay-csi.json")))
		must(t, unix.Unmount(container, unix.MNT_DETACH))
		must(t, os.WriteFile(filepath.Join(node.DataRoot, "volumes", pod.Request(v).GetVolumeId(), "volume.json"), []byte("{"), 0o600))
	}
	forget(v, scratch, "up")
	unpublish(t, pod, v)
	must(t, os.RemoveAll(filepath.Join(scratch, "up")))

	must(t, os.RemoveAll(filepath.Join(node.DataRoot, "volumes", pod.Request(v).GetVolumeId())))
	publish(t, pod, v)
	forget(v, scratch, "up")
	forget(live, elsewhere, "live")
	wantCode(t, pod.Unpublish(timeout(t), v), codes.DataLoss)
	must(t, os.RemoveAll(filepath.Join(scratch, "up")))
	if mounts, err := drivertest.Mounts(filepath.Join(elsewhere, "live")); err != nil || len(mounts) != 1 {
		t.Errorf("the busy mount of the other view: %v, %v", mounts, err)
	}
	write(t, filepath.Join(target, "f"), "other")
	unpublish(t, pod, live)
	unpublish(t, pod, v)
	wantFile(t, filepath.Join(elsewhere, "live/upper/f"), "other")
	must(t, os.RemoveAll(scratch))
	must(t, os.RemoveAll(elsewhere))
}

// holderOf returns the holder in the lock file of an upper.
func holderOf(t *testing.T, base string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(base, "overlay-csi.json"))
	must(t, err)
	var file struct{ Holder map[string]string }
	must(t, json.Unmarshal(data, &file))
	return file.Holder
}

// TestLockFileThatCannotBeRemoved: a pod ends whatever becomes of the other volume, and the lock that stays is stale.
func TestLockFileThatCannotBeRemoved(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, volume string)
		mend  func(t *testing.T, volume string)
	}{
		"full": {
			func(t *testing.T, volume string) { must(t, drivertest.FillUp(filepath.Join(volume, "big"))) },
			func(t *testing.T, volume string) { must(t, os.Remove(filepath.Join(volume, "big"))) },
		},
		"read-only": {
			func(t *testing.T, volume string) {
				must(t, unix.Mount("", volume, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
			},
			func(t *testing.T, volume string) {
				must(t, unix.Mount("", volume, "", unix.MS_REMOUNT|unix.MS_BIND, ""))
			},
		},
		"lock file is no JSON": {
			func(t *testing.T, volume string) { write(t, filepath.Join(volume, "up/overlay-csi.json"), "{") },
			func(t *testing.T, volume string) { must(t, os.Remove(filepath.Join(volume, "up/overlay-csi.json"))) },
		},
		"lock file is a directory": {
			func(t *testing.T, volume string) {
				must(t, os.Remove(filepath.Join(volume, "up/overlay-csi.json")))
				must(t, os.Mkdir(filepath.Join(volume, "up/overlay-csi.json"), 0o755))
			},
			func(t *testing.T, volume string) { must(t, os.Remove(filepath.Join(volume, "up/overlay-csi.json"))) },
		},
		"locked by another process": {
			func(t *testing.T, volume string) {
				dir, err := os.Open(filepath.Join(volume, "up"))
				must(t, err)
				t.Cleanup(func() { dir.Close() })
				must(t, unix.Flock(int(dir.Fd()), unix.LOCK_EX))
			},
			nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			node := startNode(t)
			pod := newPod(t, node, "pod")
			volume, err := pod.CSIVolume("data", "Ephemeral")
			must(t, err)
			mountImage(t, "ext4", 16<<20, volume, "")
			v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "upper", "volume://data/up")
			publish(t, pod, v)
			container := mountBare(t, volume)
			if name == "read-only" {
				c.spoil(t, volume)
			} else {
				c.spoil(t, container)
			}
			unpublish(t, pod, v)
			if c.mend == nil {
				return
			}
			c.mend(t, volume)
			// Another view takes it over.
			v.Name = "second"
			wantFile(t, filepath.Join(publish(t, pod, v), "f"), "layer")
			unpublish(t, pod, v)
			must(t, unix.Unmount(container, unix.MNT_DETACH))
			must(t, unix.Unmount(volume, 0))
			wantNoViews(t, node)
		})
	}
}
