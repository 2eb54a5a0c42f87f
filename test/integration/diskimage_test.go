package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// TestDamagedDiskImageIsNotMadeAnew: what cannot be read may be repaired, as long as nobody formats it.
func TestDamagedDiskImageIsNotMadeAnew(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	v := createSized(t, node, "kept", readWriteOnce, 16<<20, "layers", layers, "sizeEnforcement", "image")
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	write(t, filepath.Join(target, "f"), "mine")
	unpublish(t, pod, v)
	image := filepath.Join(node.DataRoot, "volumes", v.ID, "disk.img")
	content, err := os.ReadFile(image)
	must(t, err)
	must(t, os.WriteFile(image, append(make([]byte, 4096), content[4096:]...), 0o600))
	_, err = pod.Publish(timeout(t), v)
	wantCode(t, err, codes.DataLoss, image, "e2fsck")
	must(t, os.WriteFile(image, content, 0o600))
	wantFile(t, filepath.Join(publish(t, pod, v), "f"), "mine")
	unpublish(t, pod, v)
	wantNoLoops(t, node)
}

// TestManyDiskImages makes and removes as many as a busy node has.
func TestManyDiskImages(t *testing.T) {
	takesMinutes(t)
	count, at := proof(200, 1000), 16
	if os.Getenv("OVERLAY_CSI_TEST_NATIVE") != "" || os.Getenv("OVERLAY_CSI_BUILD_FLAGS") != "" {
		// In a virtual machine, and with the race detector, that takes minutes.
		count = 100
	}
	node := startNode(t)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "sizeLimit", "8Mi", "sizeEnforcement", "image")
	pods := make([]*drivertest.Pod, count)
	must(t, atOnce(at, func(worker int) error {
		for i := worker; i < count; i += at {
			pod, err := node.NewPod(fmt.Sprint("pod-", i))
			if err != nil {
				return err
			}
			pods[i] = pod
			if _, err := pod.Publish(timeout(t), v); err != nil {
				return fmt.Errorf("volume %d: %w", i, err)
			}
		}
		return nil
	}))
	write(t, filepath.Join(pods[count-1].Target(v.Name), "f"), "x")
	must(t, atOnce(at, func(worker int) error {
		for i := worker; i < count; i += at {
			if err := pods[i].Unpublish(timeout(t), v); err != nil {
				return fmt.Errorf("volume %d: %w", i, err)
			}
		}
		return nil
	}))
	wantNothingLeft(t, node)
	wantNoLoops(t, node)
}

// TestInterruptedImageIsMadeAgain: what a crash left of an image that was being made is none.
func TestInterruptedImageIsMadeAgain(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	v := createSized(t, node, "kept", readWriteOnce, 16<<20, "layers", layers, "sizeEnforcement", "image")
	dir := filepath.Join(node.DataRoot, "volumes", v.ID)
	must(t, os.WriteFile(filepath.Join(dir, "disk.img.new"), []byte("a crash came while it was made"), 0o600))
	pod := newPod(t, node, "pod")
	wantFile(t, filepath.Join(publish(t, pod, v), "f"), "layer")
	if _, err := os.Lstat(filepath.Join(dir, "disk.img.new")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was left is still there: %v", err)
	}
	unpublish(t, pod, v)
}
