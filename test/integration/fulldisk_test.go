package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

func TestFullDisk(t *testing.T) {
	node := newNode(t)
	mountImage(t, "ext4", 16<<20, node.DataRoot, "")
	start(t, node)
	layers := layersOf(t, node, map[string]string{"f": "f"})
	kept := claim("kept", readWriteOnce, "layers", layers)
	pod := newPod(t, node, "pod")
	write(t, filepath.Join(publish(t, pod, kept), "f"), "kept")
	unpublish(t, pod, kept)

	filler := fillUp(t, node.DataRoot)
	var failed bool
	for i := range 200 {
		v := inline("layers", layers)
		v.Name = fmt.Sprint("v", i)
		if _, err := pod.Publish(timeout(t), v); err != nil {
			failed = true
			wantCode(t, err, codes.ResourceExhausted, "no space left", "free space")
			wantAbsent(t, pod.Target(v.Name))
			break
		}
	}
	if !failed {
		t.Error("200 views on a full disk")
	}
	for i := range 200 {
		v := inline("layers", layers)
		v.Name = fmt.Sprint("v", i)
		unpublish(t, pod, v)
	}
	for _, path := range filler {
		must(t, os.Remove(path))
	}
	wantFile(t, filepath.Join(publish(t, pod, kept), "f"), "kept")
	unpublish(t, pod, kept)
}

// TestUnpublishOnAFullDisk: a pod must not stay Terminating because its volume's state cannot be written. The driver must start there,
// since a pod can fill the disk, and what pods leave is what makes room.
func TestUnpublishOnAFullDisk(t *testing.T) {
	node := newNode(t, "--reconcile-interval=100ms")
	mountImage(t, "ext4", 16<<20, node.DataRoot, "")
	start(t, node)
	layers := layersOf(t, node, map[string]string{"f": "f"})
	kept := claim("kept", readWriteOnce, "layers", layers)
	each := claim("each", readWriteMany, "layers", layers, "upper", "pod")
	pod, other := newPod(t, node, "pod"), newPod(t, node, "other")
	for _, v := range []drivertest.Volume{kept, each} {
		write(t, filepath.Join(publish(t, pod, v), "f"), "kept")
		publish(t, other, v)
	}
	filler := fillUp(t, node.DataRoot)
	must(t, node.Kill())
	start(t, node)
	for _, v := range []drivertest.Volume{kept, each} {
		unpublish(t, pod, v)
		unpublish(t, pod, v)
		unpublish(t, other, v)
	}
	removePod(t, pod)
	removePod(t, other)
	for _, path := range filler {
		must(t, os.Remove(path))
	}
	eventually(t, "no publication is left", func() bool {
		description, err := node.Admin().Volume(timeout(t), kept.ID)
		must(t, err)
		_, err = os.Lstat(filepath.Join(node.DataRoot, "volumes", each.ID))
		return len(description.Publications) == 0 && os.IsNotExist(err)
	})
	wantFile(t, filepath.Join(publish(t, newPod(t, node, "later"), kept), "f"), "kept")
}

// fillUp takes every block and every inode.
func fillUp(t *testing.T, dir string) (files []string) {
	t.Helper()
	big := filepath.Join(dir, "filler")
	must(t, drivertest.FillUp(big))
	files = append(files, big)
	for i := 0; ; i++ {
		name := filepath.Join(dir, fmt.Sprint("filler-", i))
		if err := os.WriteFile(name, nil, 0o600); isErrno(err, unix.ENOSPC) {
			return files
		} else if err != nil {
			t.Fatal(err)
		}
		files = append(files, name)
	}
}

// TestReadOnlyDataRoot has the data root turn read-only, as after an I/O error (errors=remount-ro). The driver then starts, and pods
// end, but none gets a volume.
func TestReadOnlyDataRoot(t *testing.T) {
	node := newNode(t, "--reconcile-interval=100ms")
	mountImage(t, "ext4", 16<<20, node.DataRoot, "")
	start(t, node)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
	earlier := newPod(t, node, "earlier")
	target := publish(t, earlier, v)
	write(t, filepath.Join(target, "written"), "x")
	must(t, unix.Mount("", node.DataRoot, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	pod := newPod(t, node, "pod")
	_, err := pod.Publish(timeout(t), v)
	wantCode(t, err, codes.FailedPrecondition, "read-only")
	wantAbsent(t, pod.Target(v.Name))
	must(t, node.Stop())
	start(t, node)
	if log := node.Log(); !strings.Contains(log, "cannot be written to") {
		t.Errorf("the log does not say that the data root is read-only:\n%s", log)
	}
	_, err = pod.Publish(timeout(t), v)
	wantCode(t, err, codes.FailedPrecondition, "read-only")
	unpublish(t, earlier, v)
	removePod(t, earlier)
	must(t, unix.Mount("", node.DataRoot, "", unix.MS_REMOUNT, ""))
	eventually(t, "the upper of the pod that is gone is discarded", func() bool {
		volumes, err := os.ReadDir(filepath.Join(node.DataRoot, "volumes"))
		must(t, err)
		return len(volumes) == 0
	})
	publish(t, pod, v)
	unpublish(t, pod, v)
	wantNothingLeft(t, node)
}
