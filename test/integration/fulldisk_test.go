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

// TestUnpublishOnAFullDisk: a pod must not stay Terminating because its volume's state cannot be written.
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
	file, err := os.Create(big)
	must(t, err)
	for size := 1 << 20; size > 0; size /= 2 {
		for err == nil {
			_, err = file.Write(make([]byte, size))
		}
		err = nil
	}
	must(t, file.Close())
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

func TestReadOnlyDataRoot(t *testing.T) {
	node := newNode(t)
	mountImage(t, "ext4", 16<<20, node.DataRoot, "")
	start(t, node)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
	// As after an I/O error: errors=remount-ro.
	must(t, unix.Mount("", node.DataRoot, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	pod := newPod(t, node, "pod")
	_, err := pod.Publish(timeout(t), v)
	wantCode(t, err, codes.FailedPrecondition, "read-only")
	wantAbsent(t, pod.Target(v.Name))
	must(t, node.Stop())
	if err := node.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("started on a read-only data root: %v", err)
	}
	node.Forget()
	must(t, unix.Mount("", node.DataRoot, "", unix.MS_REMOUNT, ""))
	start(t, node)
	publish(t, pod, v)
	unpublish(t, pod, v)
	wantNothingLeft(t, node)
}
