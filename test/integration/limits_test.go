package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// sizes are volumes with a size of each policy and medium: on the data root of the test the driver chooses how it keeps
// them to it, and on every one a disk image can be asked for.
func sizes(t *testing.T, node *drivertest.Node, layers string) map[string]drivertest.Volume {
	return map[string]drivertest.Volume{
		"inline":       inline("layers", layers, "sizeLimit", "16Mi"),
		"inline image": inline("layers", layers, "sizeLimit", "16Mi", "sizeEnforcement", "image"),
		"memory":       inline("layers", layers, "sizeLimit", "16Mi", "medium", "memory"),
		"claim":        createSized(t, node, "kept", readWriteOnce, 16<<20, "layers", layers),
		"claim image":  createSized(t, node, "image", readWriteOnce, 16<<20, "layers", layers, "sizeEnforcement", "image"),
		"each pod's":   createSized(t, node, "each", readWriteMany, 16<<20, "layers", layers, "upper", "pod"),
		"static claim": claim("static", readWriteOnce, "layers", layers, "sizeLimit", "16Mi"),
		"pods' memory": createSized(t, node, "pods-memory", readWriteMany, 16<<20, "layers", layers, "upper", "pod", "medium", "memory"),
	}
}

func createSized(t *testing.T, node *drivertest.Node, name string, mode csi.VolumeCapability_AccessMode_Mode, size int64,
	attributes ...string) drivertest.Volume {
	t.Helper()
	response, err := node.Controller().CreateVolume(timeout(t), createRequest(name, mode, size, attributes...))
	must(t, err)
	v := response.GetVolume()
	if v.GetCapacityBytes() != size {
		t.Errorf("a volume of %d bytes was asked for and is of %d", size, v.GetCapacityBytes())
	}
	return drivertest.Volume{Name: name, ID: v.GetVolumeId(), Claim: true, Mode: mode, Attributes: v.GetVolumeContext()}
}

func createRequest(name string, mode csi.VolumeCapability_AccessMode_Mode, size int64, attributes ...string) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name:               name,
		Parameters:         pairs(attributes),
		VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(mode)},
		CapacityRange:      &csi.CapacityRange{RequiredBytes: size},
	}
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// writeUntilFull writes to a file until there is no room, and returns how much went in.
func writeUntilFull(t *testing.T, path string) int64 {
	t.Helper()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	must(t, err)
	defer file.Close()
	block := []byte(strings.Repeat("0123456789abcdef", 4096))
	var written int64
	for written < 1<<30 {
		n, err := file.Write(block)
		written += int64(n)
		if isFull(err) {
			return written
		}
		must(t, err)
	}
	t.Fatal("there is no end")
	return 0
}

func TestVolumesKeepToTheirSize(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	neighbour, pod := inline("layers", layers), newPod(t, node, "neighbour")
	beside := publish(t, pod, neighbour)
	for name, v := range sizes(t, node, layers) {
		t.Run(name, func(t *testing.T) {
			pod := newPod(t, node, "pod")
			target := publish(t, pod, v)
			unharmed := writeBeside(t, beside)
			fillByDD(t, filepath.Join(target, "dd"))
			unharmed()
			must(t, os.Remove(filepath.Join(target, "dd")))
			written := writeUntilFull(t, filepath.Join(target, "big"))
			if written > 16<<20 || written < 8<<20 {
				t.Errorf("%d bytes went into 16 MiB", written)
			}
			if err := os.WriteFile(filepath.Join(target, "f"), make([]byte, 1<<20), 0o644); !isFull(err) {
				t.Errorf("a file of a layer was copied up and grew in a full volume: %v", err)
			}
			bytes, _ := stats(t, node, pod, v)
			if bytes.GetUsed() < written || bytes.GetTotal() > 16<<20 || bytes.GetAvailable() > 1<<20 {
				t.Errorf("after %d bytes the driver says %v", written, bytes)
			}
			var df unix.Statfs_t
			must(t, unix.Statfs(target, &df))
			if total := int64(df.Blocks) * df.Bsize; total > 16<<20 {
				t.Errorf("df shows %d bytes", total)
			}
			must(t, os.Remove(filepath.Join(target, "big")))
			unpublish(t, pod, v)
			removePod(t, pod)
			if v.Claim {
				deleteVolume(t, node, v)
			}
		})
	}
	unpublish(t, pod, neighbour)
	wantNothingLeft(t, node)
	wantNoLoops(t, node)
}

// fillByDD has dd write until there is no room.
func fillByDD(t *testing.T, path string) {
	t.Helper()
	output, err := exec.Command("dd", "if=/dev/zero", "of="+path, "bs=64k", "count=1024").CombinedOutput()
	if err == nil || !strings.Contains(string(output), "No space left") && !strings.Contains(string(output), "quota exceeded") {
		t.Errorf("dd of 64 MiB into 16: %v: %s", err, output)
	}
}

// writeBeside writes and reads in a view until the returned function is called, which fails the test where one of that
// did not work.
func writeBeside(t *testing.T, view string) (unharmed func()) {
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() { stopped <- writeUntil(stop, filepath.Join(view, "beside")) }()
	return func() {
		t.Helper()
		close(stop)
		if err := <-stopped; err != nil {
			t.Errorf("another volume, while this one was filled: %v", err)
		}
	}
}

func writeUntil(stop <-chan struct{}, path string) error {
	for n := 0; ; n++ {
		content := strings.Repeat(fmt.Sprint(n, " "), 10000)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != content {
			return errors.Join(err, fmt.Errorf("%d bytes were written, and %d others read back", len(content), len(got)))
		}
		select {
		case <-stop:
			return nil
		default:
		}
	}
}

// stats are what NodeGetVolumeStats says of bytes and inodes.
func stats(t *testing.T, node *drivertest.Node, pod *drivertest.Pod, v drivertest.Volume) (bytes, inodes *csi.VolumeUsage) {
	t.Helper()
	response, err := node.NodeService().NodeGetVolumeStats(timeout(t),
		&csi.NodeGetVolumeStatsRequest{VolumeId: pod.Request(v).GetVolumeId(), VolumePath: pod.Target(v.Name)})
	must(t, err)
	for _, usage := range response.GetUsage() {
		switch usage.GetUnit() {
		case csi.VolumeUsage_BYTES:
			bytes = usage
		case csi.VolumeUsage_INODES:
			inodes = usage
		default:
			t.Errorf("usage in the unit %s", usage.GetUnit())
		}
	}
	return bytes, inodes
}

// wantNoLoops waits until no loop device shows a file of the node: the kernel takes the last user's time to let go.
func wantNoLoops(t *testing.T, node *drivertest.Node) {
	t.Helper()
	var left []string
	for range 100 {
		var err error
		left, err = drivertest.LoopDevices(node.DataRoot)
		must(t, err)
		if len(left) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("loop devices are left: %q", left)
}

func TestVolumesGrowWhileTheyAreWrittenTo(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	for name, v := range sizes(t, node, layers) {
		t.Run(name, func(t *testing.T) {
			pod := newPod(t, node, "pod")
			target := publish(t, pod, v)
			before := writeUntilFull(t, filepath.Join(target, "big"))
			if err := expand(t, node, pod, v, 8<<20, 12<<20); v.Claim {
				wantCode(t, err, codes.OutOfRange, "cannot shrink")
			}
			err := expand(t, node, pod, v, 64<<20, 0)
			if err != nil && drivertest.LacksResource() && strings.Contains(err.Error(), "Permission denied to resize") {
				t.Skip("this machine's root lacks CAP_SYS_RESOURCE, which ext4 wants of whoever makes it larger")
			}
			must(t, err)
			must(t, expand(t, node, pod, v, 64<<20, 0))
			if more := writeUntilFull(t, filepath.Join(target, "big")); before+more < 40<<20 || before+more > 64<<20 {
				t.Errorf("%d bytes went in, and then %d more", before, more)
			}
			var df unix.Statfs_t
			must(t, unix.Statfs(target, &df))
			if total := int64(df.Blocks) * df.Bsize; total < 40<<20 || total > 64<<20 {
				t.Errorf("df shows %d bytes", total)
			}
			unpublish(t, pod, v)
			if v.Claim && v.Attributes["upper"] != "pod" {
				target = publish(t, pod, v)
				if info, err := os.Stat(filepath.Join(target, "big")); err != nil || info.Size() < 40<<20 {
					t.Errorf("what was written is not all there: %v, %v", info, err)
				}
				unpublish(t, pod, v)
			}
			removePod(t, pod)
		})
	}
}

func expand(t *testing.T, node *drivertest.Node, pod *drivertest.Pod, v drivertest.Volume, size, limit int64) error {
	t.Helper()
	_, err := node.NodeService().NodeExpandVolume(timeout(t), &csi.NodeExpandVolumeRequest{
		VolumeId: pod.Request(v).GetVolumeId(), VolumePath: pod.Target(v.Name), CapacityRange: &csi.CapacityRange{RequiredBytes: size,
			LimitBytes: limit},
	})
	return err
}

// TestCapacityCountsWhatIsPromised: a promise that nobody has written to yet is not free.
func TestCapacityCountsWhatIsPromised(t *testing.T) {
	node := newNode(t)
	mountImage(t, "ext4", 256<<20, node.DataRoot, "")
	start(t, node)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	capacity := func() int64 {
		response, err := node.Controller().GetCapacity(timeout(t), &csi.GetCapacityRequest{})
		must(t, err)
		return response.GetAvailableCapacity()
	}
	whole := capacity()
	v := createSized(t, node, "half", readWriteOnce, 128<<20, "layers", layers)
	if left := capacity(); left > whole-128<<20 || left < whole-132<<20 {
		t.Errorf("of %d bytes %d are left after 128 MiB were promised", whole, left)
	}
	_, err := node.Controller().CreateVolume(timeout(t), createRequest("other-half", readWriteOnce, 128<<20, "layers", layers))
	wantCode(t, err, codes.ResourceExhausted, "can reserve")
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	must(t, os.WriteFile(filepath.Join(target, "big"), make([]byte, 64<<20), 0o644))
	must(t, syncFS(target))
	if left := capacity(); left > whole-128<<20 || left < whole-140<<20 {
		t.Errorf("of %d bytes %d are left after half of the promise was taken", whole, left)
	}
	wantCode(t, expand(t, node, pod, v, 250<<20, 0), codes.ResourceExhausted, "can reserve")
	unpublish(t, pod, v)
	createSized(t, node, "unlimited", readWriteOnce, 240<<20, "layers", layers, "sizeEnforcement", "none")
	deleteVolume(t, node, v)
	// Until its image is deleted, the disk has less.
	eventually(t, "the trash is empty", func() bool {
		left, err := os.ReadDir(filepath.Join(node.DataRoot, "trash"))
		must(t, err)
		return len(left) == 0
	})

	must(t, node.Stop())
	node.AddArgs("--overcommit=3")
	start(t, node)
	createSized(t, node, "twice", readWriteOnce, 220<<20, "layers", layers)
	createSized(t, node, "twice-2", readWriteOnce, 220<<20, "layers", layers)
}

// TestLimitWithoutRequiredSize: a volume must not be bigger than limit_bytes, which a volume without a size is.
func TestLimitWithoutRequiredSize(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	request := func(name string, mode csi.VolumeCapability_AccessMode_Mode, limit int64, attributes ...string) *csi.CreateVolumeRequest {
		r := createRequest(name, mode, 0, append(attributes, "layers", layers)...)
		r.CapacityRange = &csi.CapacityRange{LimitBytes: limit}
		return r
	}
	for _, upper := range []string{"claim", "pod"} {
		t.Run(upper, func(t *testing.T) {
			r := request("limited-"+upper, readWriteOnce, 16<<20, "upper", upper)
			for range 2 {
				response, err := node.Controller().CreateVolume(timeout(t), r)
				must(t, err)
				if got := response.GetVolume().GetCapacityBytes(); got != 16<<20 {
					t.Errorf("limit_bytes alone, 16 MiB: the volume has %d bytes", got)
				}
			}
			response, err := node.Controller().CreateVolume(timeout(t), r)
			must(t, err)
			v := drivertest.Volume{Name: "limited", ID: response.GetVolume().GetVolumeId(), Claim: true, Mode: readWriteOnce,
				Attributes: response.GetVolume().GetVolumeContext()}
			pod := newPod(t, node, "pod-"+upper)
			target := publish(t, pod, v)
			if written := writeUntilFull(t, filepath.Join(target, "big")); written > 16<<20 {
				t.Errorf("%d bytes went into 16 MiB", written)
			}
			must(t, expand(t, node, pod, v, 0, 20<<20))
			wantCode(t, expand(t, node, pod, v, 0, 12<<20), codes.OutOfRange, "cannot shrink")
			unpublish(t, pod, v)
			deleteVolume(t, node, v)
		})
	}
	_, err := node.Controller().CreateVolume(timeout(t), request("small", readWriteOnce, 1<<20))
	wantCode(t, err, codes.OutOfRange, "8388608")
	// A volume without an upper takes no bytes.
	response, err := node.Controller().CreateVolume(timeout(t), request("reads", readOnlyMany, 1<<20))
	must(t, err)
	if got := response.GetVolume().GetCapacityBytes(); got != 0 {
		t.Errorf("a volume without an upper has %d bytes", got)
	}
	// One that has no size exceeds every limit.
	v := createSized(t, node, "unlimited", readWriteOnce, 0, "layers", layers)
	_, err = node.Controller().CreateVolume(timeout(t), request("unlimited", readWriteOnce, 16<<20))
	wantCode(t, err, codes.AlreadyExists, "without a size")
	pod := newPod(t, node, "pod")
	publish(t, pod, v)
	wantCode(t, expand(t, node, pod, v, 0, 16<<20), codes.OutOfRange, "has no size")
	must(t, expand(t, node, pod, v, 16<<20, 0))
	unpublish(t, pod, v)
}

// TestLaterPodsSize: a claim with an upper for each pod grows on its nodes as long as it has pods there.
func TestLaterPodsSize(t *testing.T) {
	node := startNode(t)
	v := createSized(t, node, "each", readWriteMany, 16<<20, "layers", layersOf(t, node, map[string]string{"f": "layer"}),
		"upper", "pod", "medium", "memory")
	wantSize := func(target string, want int64) {
		t.Helper()
		var df unix.Statfs_t
		must(t, unix.Statfs(target, &df))
		if got := int64(df.Blocks) * df.Bsize; got != want {
			t.Errorf("df shows %d bytes, want %d", got, want)
		}
	}
	first, second, third := newPod(t, node, "first"), newPod(t, node, "second"), newPod(t, node, "third")
	target := publish(t, first, v)
	must(t, expand(t, node, first, v, 64<<20, 0))
	wantSize(target, 64<<20)
	wantSize(publish(t, second, v), 64<<20)
	unpublish(t, first, v)
	unpublish(t, second, v)
	wantSize(publish(t, third, v), 16<<20)
	unpublish(t, third, v)
}
