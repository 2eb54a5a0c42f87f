package integration

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// imageOf is the disk image of a claim.
func imageOf(node *drivertest.Node, v drivertest.Volume) string {
	return filepath.Join(node.DataRoot, "volumes", v.ID, "disk.img")
}

// innerMounts are where the file systems of disk images are mounted.
func innerMounts(t *testing.T, node *drivertest.Node) []string {
	t.Helper()
	mounts, err := filepath.Glob(filepath.Join(node.KubeletDir, "plugins", "*", "uppers", "*"))
	must(t, err)
	return mounts
}

// fillSynced writes a file until it is full, syncs it, and returns how much went in.
func fillSynced(t *testing.T, path string) int64 {
	t.Helper()
	written := writeUntilFull(t, path)
	file, err := os.Open(path)
	must(t, err)
	defer file.Close()
	if err := file.Sync(); err != nil {
		t.Errorf("fsync after %d bytes: %v", written, err)
	}
	return written
}

// wantFilled reads back what writeUntilFull has written.
func wantFilled(t *testing.T, path string, size int64) {
	t.Helper()
	file, err := os.Open(path)
	must(t, err)
	defer file.Close()
	block, want := make([]byte, 64<<10), bytes.Repeat([]byte("0123456789abcdef"), 4096)
	var read int64
	for {
		n, err := io.ReadFull(file, block)
		if !bytes.Equal(block[:n], want[:n]) {
			t.Fatalf("%s has other content from byte %d on", path, read)
		}
		read += int64(n)
		if err != nil {
			break
		}
	}
	if read != size {
		t.Errorf("%d bytes are read back of %d", read, size)
	}
}

// TestNeighbourFillsTheDisk: what a claim was promised is there for it, whatever others write.
func TestNeighbourFillsTheDisk(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			node := newNode(t)
			mountImage(t, kind, 512<<20, node.DataRoot, "")
			start(t, node)
			layers := layersOf(t, node, map[string]string{"f": "layer"})
			v := createSized(t, node, "kept", readWriteOnce, 32<<20, "layers", layers, "sizeEnforcement", "image")
			small := createSized(t, node, "grows", readWriteOnce, 16<<20, "layers", layers, "sizeEnforcement", "image")
			pod := newPod(t, node, "pod")
			target, other := publish(t, pod, v), publish(t, pod, small)
			// What was written and removed belongs to the claim too.
			fillSynced(t, filepath.Join(target, "big"))
			must(t, os.Remove(filepath.Join(target, "big")))
			must(t, syncFS(target))
			for _, mount := range innerMounts(t, node) {
				if err := drivertest.Trim(mount); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
					t.Error(err)
				}
			}
			stat, err := linux.StatPath(imageOf(node, v))
			must(t, err)
			if stat.DiskBytes() < 32<<20 {
				t.Errorf("a disk image of %d bytes has %d on the disk", stat.Size, stat.DiskBytes())
			}

			neighbour := inline("layers", layers)
			filler := filepath.Join(publish(t, pod, neighbour), "filler")
			must(t, drivertest.FillUp(filler))
			must(t, syncFS(node.DataRoot))

			wantCode(t, expand(t, node, pod, small, 128<<20, 0), codes.ResourceExhausted)
			write(t, filepath.Join(other, "f"), "mine")
			must(t, syncFS(other))
			written := fillSynced(t, filepath.Join(target, "big"))
			if written < 20<<20 {
				t.Errorf("%d bytes went into 32 MiB", written)
			}
			unpublish(t, pod, v)
			unpublish(t, pod, small)
			must(t, os.Remove(filler))
			wantFilled(t, filepath.Join(publish(t, pod, v), "big"), written)
			wantFile(t, filepath.Join(publish(t, pod, small), "f"), "mine")
			for _, each := range []drivertest.Volume{v, small, neighbour} {
				unpublish(t, pod, each)
			}
			wantNoLoops(t, node)
		})
	}
}

// TestGrowthIsReserved: what a disk image grows by is there as well. One that was made sparse, with overcommit, is reserved when it is
// mounted without, and is refused where that does not fit.
func TestGrowthIsReserved(t *testing.T) {
	node := newNode(t, "--overcommit=2")
	mountImage(t, "ext4", 256<<20, node.DataRoot, "")
	start(t, node)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	v := createSized(t, node, "kept", readWriteOnce, 64<<20, "layers", layers, "sizeEnforcement", "image")
	pod := newPod(t, node, "pod")
	onDisk := func() int64 {
		stat, err := linux.StatPath(imageOf(node, v))
		must(t, err)
		return stat.DiskBytes()
	}
	target := publish(t, pod, v)
	fillSynced(t, filepath.Join(target, "big"))
	must(t, os.Remove(filepath.Join(target, "big")))
	must(t, syncFS(target))
	for _, mount := range innerMounts(t, node) {
		must(t, drivertest.Trim(mount))
	}
	if got := onDisk(); got > 16<<20 {
		t.Errorf("with overcommit, an empty disk image takes %d bytes", got)
	}
	unpublish(t, pod, v)
	must(t, node.Stop())
	node.AddArgs("--overcommit=1")
	start(t, node)

	filler := filepath.Join(node.DataRoot, "filler")
	must(t, drivertest.FillUp(filler))
	_, err := pod.Publish(timeout(t), v)
	wantCode(t, err, codes.ResourceExhausted)
	must(t, os.Truncate(filler, 64<<20))
	publish(t, pod, v)
	if got := onDisk(); got < 64<<20 {
		t.Errorf("without overcommit, a disk image of 64 MiB takes %d bytes", got)
	}
	wantCode(t, expand(t, node, pod, v, 200<<20, 0), codes.ResourceExhausted)
	if err := expand(t, node, pod, v, 96<<20, 0); !drivertest.LacksResource() {
		// Without it, ext4 does not grow, but its disk image does.
		must(t, err)
	}
	if got := onDisk(); got < 96<<20 {
		t.Errorf("a disk image that grew to 96 MiB takes %d bytes", got)
	}
	unpublish(t, pod, v)
	deleteVolume(t, node, v)
	wantNoLoops(t, node)
}
