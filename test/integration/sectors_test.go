package integration

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// TestDiskImagesOnLargeSectors has the data root on a disk with sectors of 4096 bytes. With direct I/O, the disk images there have them
// too.
func TestDiskImagesOnLargeSectors(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			node := newNode(t)
			disk := node.DataRoot + ".img"
			must(t, os.WriteFile(disk, nil, 0o600))
			must(t, os.Truncate(disk, 1<<30))
			must(t, os.MkdirAll(node.DataRoot, 0o755))
			device, err := drivertest.LargeSectors(disk)
			must(t, err)
			mustRun(t, drivertest.FormatDevice(kind, device.Name()))
			must(t, unix.Mount(device.Name(), node.DataRoot, kind, 0, ""))
			t.Cleanup(func() { _ = unix.Unmount(node.DataRoot, unix.MNT_DETACH) })
			must(t, device.Close())
			start(t, node)
			layers := layersOf(t, node, map[string]string{"f": "layer"})
			pod := newPod(t, node, "pod")
			volumes := []drivertest.Volume{
				createSized(t, node, "smallest", readWriteOnce, 8<<20, "layers", layers, "sizeEnforcement", "image"),
				createSized(t, node, "small", readWriteOnce, 64<<20, "layers", layers, "sizeEnforcement", "image"),
				inline("layers", layers, "sizeLimit", "1Mi", "sizeEnforcement", "image"),
			}
			for _, v := range volumes {
				write(t, filepath.Join(publish(t, pod, v), "f"), "mine")
			}
			images, err := filepath.Glob(filepath.Join(node.DataRoot, "volumes", "*", "disk.img"))
			must(t, err)
			if len(images) != len(volumes) {
				t.Errorf("%d disk images, want %d", len(images), len(volumes))
			}
			for _, image := range images {
				loop, err := linux.FindLoop(image, "/")
				must(t, err)
				size, err := unix.IoctlGetInt(int(loop.Fd()), unix.BLKSSZGET)
				loop.Close()
				if err != nil || size != 4096 {
					t.Errorf("the sectors of %s have %d bytes, and the test shows nothing: %v", image, size, err)
				}
			}
			for _, v := range volumes {
				unpublish(t, pod, v)
			}
			wantFile(t, filepath.Join(publish(t, pod, volumes[0]), "f"), "mine")
			unpublish(t, pod, volumes[0])
			wantNoLoops(t, node)
		})
	}
}
