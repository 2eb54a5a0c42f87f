package integration

import (
	"errors"
	"fmt"
	"io/fs"
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

func createSized(t *testing.T, node *drivertest.Node, name string, mode csi.VolumeCapability_AccessMode_Mode, size int64, attributes ...string) drivertest.Volume {
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
	response, err := node.NodeService().NodeGetVolumeStats(timeout(t), &csi.NodeGetVolumeStatsRequest{VolumeId: pod.Request(v).GetVolumeId(), VolumePath: pod.Target(v.Name)})
	must(t, err)
	for _, usage := range response.GetUsage() {
		switch usage.GetUnit() {
		case csi.VolumeUsage_BYTES:
			bytes = usage
		case csi.VolumeUsage_INODES:
			inodes = usage
		}
	}
	return bytes, inodes
}

// wantNoLoops waits until no loop device shows a file of the node: the kernel takes the last user's time to let go.
func wantNoLoops(t *testing.T, node *drivertest.Node) {
	t.Helper()
	var left []string
	for range 100 {
		left = nil
		files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		must(t, err)
		for _, file := range files {
			backing, err := os.ReadFile(file)
			if err == nil && strings.HasPrefix(string(backing), node.DataRoot) {
				left = append(left, strings.TrimSpace(string(backing)))
			}
		}
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
				wantCode(t, err, codes.OutOfRange, "does not become smaller")
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
		VolumeId: pod.Request(v).GetVolumeId(), VolumePath: pod.Target(v.Name), CapacityRange: &csi.CapacityRange{RequiredBytes: size, LimitBytes: limit},
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
	wantCode(t, err, codes.ResourceExhausted, "can promise")
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	must(t, os.WriteFile(filepath.Join(target, "big"), make([]byte, 64<<20), 0o644))
	must(t, syncFS(target))
	if left := capacity(); left > whole-128<<20 || left < whole-140<<20 {
		t.Errorf("of %d bytes %d are left after half of the promise was taken", whole, left)
	}
	wantCode(t, expand(t, node, pod, v, 250<<20, 0), codes.ResourceExhausted, "can promise")
	unpublish(t, pod, v)
	createSized(t, node, "unlimited", readWriteOnce, 240<<20, "layers", layers, "sizeEnforcement", "none")
	deleteVolume(t, node, v)

	must(t, node.Stop())
	node.AddArgs("--overcommit=3")
	start(t, node)
	createSized(t, node, "twice", readWriteOnce, 220<<20, "layers", layers)
	createSized(t, node, "twice-2", readWriteOnce, 220<<20, "layers", layers)
}

// TestKeptVolumeSurvivesAPowerCut cuts the power as far as a file can: the data root is copied as its disk has it at that
// moment, mounted anew, and has all that was synced.
func TestKeptVolumeSurvivesAPowerCut(t *testing.T) {
	for _, c := range []struct{ system, limit, kept string }{
		{"ext4", "none", "directory"},
		{"ext4", "image", "disk-image"},
		{"btrfs with quota", "", "btrfs-qgroup"},
		{"ext4 with project quota", "quota", "project-quota"},
		{"xfs with project quota", "quota", "project-quota"},
	} {
		t.Run(c.kept+" on "+c.system, func(t *testing.T) { cutPower(t, c.system, c.limit, c.kept) })
	}
}

func cutPower(t *testing.T, system, limit, kept string) {
	node := newNode(t)
	disk := node.DataRoot + ".img"
	mountImage(t, system, 512<<20, node.DataRoot, "")
	start(t, node)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	attributes := []string{"layers", layers}
	if limit != "" {
		attributes = append(attributes, "sizeEnforcement", limit)
	}
	v := createSized(t, node, "kept", readWriteOnce, 32<<20, attributes...)
	wantKept(t, node, v, kept)
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	for n := range 20 {
		path := filepath.Join(target, fmt.Sprint("synced-", n))
		write(t, path, strings.Repeat("s", 1000*n))
		file, err := os.Open(path)
		must(t, err)
		must(t, errors.Join(file.Sync(), file.Close()))
		write(t, filepath.Join(target, fmt.Sprint("lost-", n)), "perhaps")
	}
	after := newNode(t)
	// What no sync has reached is in the page cache of the file system, and not in its image.
	runProgram(t, "cp", "--sparse=always", disk, after.DataRoot+".img")
	unpublish(t, pod, v)
	must(t, node.Stop())
	// Not two of one UUID at a time: btrfs and xfs refuse that.
	must(t, unix.Unmount(node.DataRoot, 0))

	mountExisting(t, system, after.DataRoot+".img", after.DataRoot)
	must(t, os.RemoveAll(after.LayerDir))
	must(t, os.CopyFS(after.LayerDir, os.DirFS(node.LayerDir)))
	start(t, after)
	pod = newPod(t, after, "pod")
	target = publish(t, pod, v)
	for n := range 20 {
		wantFile(t, filepath.Join(target, fmt.Sprint("synced-", n)), strings.Repeat("s", 1000*n))
	}
	write(t, filepath.Join(target, "new"), "x")
	if written := writeUntilFull(t, filepath.Join(target, "big")); written > 32<<20 && limit != "none" {
		t.Errorf("%d bytes went into 32 MiB after the power cut", written)
	}
	unpublish(t, pod, v)
	deleteVolume(t, after, v)
}

// wantKept checks how the driver keeps a volume's upper.
func wantKept(t *testing.T, node *drivertest.Node, v drivertest.Volume, kept string) {
	t.Helper()
	description, err := node.Admin().Volume(timeout(t), v.ID)
	must(t, err)
	if description.Backend != kept {
		t.Errorf("volume %s has the backend %s, want %s", v.ID, description.Backend, kept)
	}
}

func runProgram(t *testing.T, name string, args ...string) {
	t.Helper()
	output, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, output)
	}
}

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

// TestUpperOfAnEarlierDriverStays: the state of a volume did not always say how its upper is kept.
func TestUpperOfAnEarlierDriverStays(t *testing.T) {
	node := startNode(t)
	v := claim("kept", readWriteOnce, "layers", layersOf(t, node, map[string]string{"f": "layer"}), "sizeEnforcement", "none")
	pod := newPod(t, node, "pod")
	dir := filepath.Join(node.DataRoot, "volumes", v.ID)
	must(t, os.MkdirAll(filepath.Join(dir, "upper"), 0o755))
	write(t, filepath.Join(dir, "upper", "f"), "written")
	must(t, os.WriteFile(filepath.Join(dir, "volume.json"), fmt.Appendf(nil, `{"version":1,"id":%q,"spec":{"layers":["dir://layers/layer-0"],"upper":"claim","sizeEnforcement":"none"}}`, v.ID), 0o600))
	wantFile(t, filepath.Join(publish(t, pod, v), "f"), "written")
	unpublish(t, pod, v)
	deleteVolume(t, node, v)
}
