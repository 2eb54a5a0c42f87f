package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

const (
	degraded     = csi.VolumeHealthErrorType_DEGRADED
	inaccessible = csi.VolumeHealthErrorType_INACCESSIBLE
	dataLoss     = csi.VolumeHealthErrorType_DATA_LOSS
)

// wantHealth checks that a volume has this condition, "" for none, as its pod sees it.
func wantHealth(t *testing.T, node *drivertest.Node, pod *drivertest.Pod, v drivertest.Volume, severity csi.VolumeHealthErrorType,
	reason string) {
	t.Helper()
	request := pod.Request(v)
	response, err := node.NodeService().NodeGetVolumeHealth(timeout(t),
		&csi.NodeGetVolumeHealthRequest{VolumeId: request.GetVolumeId(), VolumePublishPath: request.GetTargetPath()})
	must(t, err)
	wantConditions(t, response.GetVolumeHealth(), severity, reason)
}

func wantConditions(t *testing.T, health *csi.VolumeHealth, severity csi.VolumeHealthErrorType, reason string) {
	t.Helper()
	var got []string
	for _, c := range health.GetHealthStatuses() {
		if c.GetMessage() == "" {
			t.Errorf("%s says nothing", c.GetReason())
		}
		got = append(got, fmt.Sprint(c.GetStatus(), " ", c.GetReason()))
	}
	var want []string
	if reason != "" {
		want = []string{fmt.Sprint(severity, " ", reason)}
	}
	if !slices.Equal(got, want) {
		t.Errorf("volume %s: %q, want %q (%v)", health.GetVolumeId(), got, want, health)
	}
}

func storageHealth(t *testing.T, node *drivertest.Node) []string {
	t.Helper()
	response, err := node.NodeService().NodeGetStorageHealth(timeout(t), &csi.NodeGetStorageHealthRequest{})
	must(t, err)
	var reasons []string
	for _, b := range response.GetBackendHealth() {
		reasons = append(reasons, fmt.Sprint(b.GetStatus(), " ", b.GetReason()))
	}
	return reasons
}

func TestHealthIsOffByDefault(t *testing.T) {
	node := startNode(t)
	_, err := node.NodeService().NodeGetVolumeHealth(timeout(t), &csi.NodeGetVolumeHealthRequest{VolumeId: "x"})
	wantCode(t, err, codes.Unimplemented)
	_, err = node.NodeService().NodeGetStorageHealth(timeout(t), &csi.NodeGetStorageHealthRequest{})
	wantCode(t, err, codes.Unimplemented)
	_, err = node.Controller().ControllerGetVolumeHealth(timeout(t), &csi.ControllerGetVolumeHealthRequest{VolumeId: "x"})
	wantCode(t, err, codes.Unimplemented)
	_, err = node.Controller().ControllerListVolumeHealth(timeout(t), &csi.ControllerListVolumeHealthRequest{})
	wantCode(t, err, codes.Unimplemented)
}

func TestHealthOfLayers(t *testing.T) {
	node := startNode(t, "--volume-health")
	layers := layersOf(t, node, map[string]string{"f": "f", "dir/deep": "d"}, map[string]string{"g": "g"})
	pod := newPod(t, node, "pod")
	for name, v := range map[string]drivertest.Volume{
		"inline": inline("layers", layers),
		"claim":  create(t, node, "kept", readWriteOnce, "layers", layers),
		"reads":  inline("layers", layers, "upper", "none"),
	} {
		t.Run(name, func(t *testing.T) {
			target := publish(t, pod, v)
			if v.Attributes["upper"] != "none" {
				write(t, filepath.Join(target, "f"), "changed")
			}
			wantHealth(t, node, pod, v, 0, "")
			layer := filepath.Join(node.LayerDir, "layer-1")
			must(t, os.Rename(layer, layer+".away"))
			wantHealth(t, node, pod, v, degraded, "LayerMissing")
			must(t, os.MkdirAll(layer, 0o755))
			wantHealth(t, node, pod, v, degraded, "LayerChanged")
			must(t, os.Remove(layer))
			must(t, os.Rename(layer+".away", layer))
			wantHealth(t, node, pod, v, 0, "")
			write(t, filepath.Join(layer, "new"), "x")
			wantHealth(t, node, pod, v, degraded, "LayerChanged")
			unpublish(t, pod, v)
			must(t, os.Remove(filepath.Join(layer, "new")))
			publish(t, pod, v)
			wantHealth(t, node, pod, v, 0, "")
			must(t, unix.Unmount(target, 0))
			wantHealth(t, node, pod, v, inaccessible, "NotMounted")
			unpublish(t, pod, v)
		})
	}
}

// TestLostUpperIsNotMadeAnew: an empty upper in place of a lost one would be taken for what was written.
func TestLostUpperIsNotMadeAnew(t *testing.T) {
	node := startNode(t, "--volume-health")
	layers := layersOf(t, node, map[string]string{"f": "f"})
	pod := newPod(t, node, "pod")
	for _, limit := range []string{"none", "image"} {
		v := createSized(t, node, "kept-"+limit, readWriteOnce, 16<<20, "layers", layers, "sizeEnforcement", limit)
		dir := filepath.Join(node.DataRoot, "volumes", v.ID)
		publish(t, pod, v)
		lost := filepath.Join(dir, "disk.img")
		if limit == "none" {
			lost = upperDir(node, pod, v)
		}
		must(t, os.Rename(lost, lost+".away"))
		wantHealth(t, node, pod, v, dataLoss, "UpperLost")
		unpublish(t, pod, v)
		_, err := pod.Publish(timeout(t), v)
		wantCode(t, err, codes.DataLoss, "is gone", dir)
		response, err := node.Controller().ControllerGetVolumeHealth(timeout(t), &csi.ControllerGetVolumeHealthRequest{VolumeId: v.ID})
		must(t, err)
		wantConditions(t, response.GetVolumeHealth(), dataLoss, "UpperLost")
		description, err := node.Admin().Volume(timeout(t), v.ID)
		must(t, err)
		if len(description.Conditions) != 1 || description.Conditions[0].Reason != "UpperLost" {
			t.Errorf("overlayctl inspect shows %+v", description.Conditions)
		}
		must(t, os.Rename(lost+".away", lost))
		publish(t, pod, v)
		wantHealth(t, node, pod, v, 0, "")
		unpublish(t, pod, v)
		deleteVolume(t, node, v)
	}
	wantNothingLeft(t, node)
}

// TestHealthOfAFileSystemThatFailed: ext4 stops writing when it finds itself damaged.
func TestHealthOfAFileSystemThatFailed(t *testing.T) {
	node := newNode(t, "--volume-health")
	mountImage(t, "ext4", 128<<20, node.DataRoot, "")
	start(t, node)
	if reasons := storageHealth(t, node); len(reasons) > 0 {
		t.Errorf("%q", reasons)
	}
	layers := layersOf(t, node, map[string]string{"f": "f"})
	pod := newPod(t, node, "pod")
	kept := createSized(t, node, "kept", readWriteOnce, 16<<20, "layers", layers, "sizeEnforcement", "none")
	publish(t, pod, kept)
	image := createSized(t, node, "image", readWriteOnce, 16<<20, "layers", layers, "sizeEnforcement", "image")
	publish(t, pod, image)
	inner, err := filepath.Glob(filepath.Join(node.KubeletDir, "plugins", drivertest.DriverName, "uppers", "*"))
	must(t, err)
	if len(inner) != 1 {
		t.Fatalf("file systems of disk images: %q", inner)
	}
	of := abort(t, inner[0])
	wantHealth(t, node, pod, image, of.severity, of.upper)
	wantHealth(t, node, pod, kept, 0, "")
	of = abort(t, node.DataRoot)
	if of.code == codes.Internal {
		// Nor can the state be read.
		of.upper = "RecordDamaged"
	}
	wantHealth(t, node, pod, kept, of.severity, of.upper)
	must(t, os.Rename(node.LayerDir, node.LayerDir+".away"))
	if reasons := storageHealth(t, node); !slices.Equal(reasons, []string{of.dataRoot, "STORAGE_DEGRADED LayerRootMissing"}) {
		t.Errorf("%q", reasons)
	}
	must(t, os.Rename(node.LayerDir+".away", node.LayerDir))
	for _, v := range []drivertest.Volume{kept, image} {
		// The view goes, and the pod can end. The state cannot be written.
		unpublish(t, pod, v)
		wantAbsent(t, pod.Target(v.Name))
	}
}

// failure is what is to be told of a file system that failed.
type failure struct {
	severity        csi.VolumeHealthErrorType
	upper, dataRoot string
	code            codes.Code
}

// abort does what the kernel does when it finds an ext4 damaged (ext4(5), "abort"). Of what it then answers to writes,
// kernels have different opinions.
func abort(t *testing.T, path string) failure {
	t.Helper()
	if output, err := exec.Command("mount", "-o", "remount,abort", path).CombinedOutput(); err != nil {
		t.Logf("remount,abort %s: %v: %s", path, err, output)
	}
	err := os.WriteFile(filepath.Join(path, "written"), []byte("x"), 0o600)
	switch {
	case isErrno(err, unix.EROFS):
		return failure{degraded, "UpperReadOnly", "STORAGE_DEGRADED DataRootReadOnly", codes.FailedPrecondition}
	case isErrno(err, unix.EIO):
		return failure{inaccessible, "UpperFails", "STORAGE_UNREACHABLE DataRootFails", codes.Internal}
	}
	t.Fatalf("the file system at %s was to fail: %v", path, err)
	return failure{}
}

func TestHealthOfFullUppers(t *testing.T) {
	node := startNode(t, "--volume-health")
	layers := layersOf(t, node, map[string]string{"f": "f"})
	for name, v := range sizes(t, node, layers) {
		t.Run(name, func(t *testing.T) {
			pod := newPod(t, node, "pod")
			target := publish(t, pod, v)
			wantHealth(t, node, pod, v, 0, "")
			writeUntilFull(t, filepath.Join(target, "big"))
			wantHealth(t, node, pod, v, degraded, "OutOfSpace")
			must(t, os.Remove(filepath.Join(target, "big")))
			must(t, syncFS(target))
			wantHealth(t, node, pod, v, 0, "")
			unpublish(t, pod, v)
		})
	}
	pod := newPod(t, node, "pod")
	other := sibling(t, pod, "data", "ext4")
	v := inline("layers", layers, "upper", "volume://data/up")
	target := publish(t, pod, v)
	wantHealth(t, node, pod, v, 0, "")
	writeUntilFull(t, filepath.Join(target, "big"))
	wantHealth(t, node, pod, v, degraded, "OutOfSpace")
	must(t, os.Remove(filepath.Join(target, "big")))
	bare := mountBare(t, other)
	must(t, os.Rename(filepath.Join(bare, "up/upper"), filepath.Join(bare, "up/moved")))
	wantHealth(t, node, pod, v, dataLoss, "UpperLost")
	unpublish(t, pod, v)
}

func TestHealthOfManyVolumes(t *testing.T) {
	node := startNode(t, "--volume-health")
	layers := layersOf(t, node, map[string]string{"f": "f"})
	for n := range 5 {
		v := create(t, node, fmt.Sprint("kept-", n), readWriteOnce, "layers", layers, "sizeEnforcement", "none")
		pod := newPod(t, node, "pod")
		publish(t, pod, v)
		upper := upperDir(node, pod, v)
		unpublish(t, pod, v)
		if n%2 == 0 {
			must(t, os.RemoveAll(upper))
		}
	}
	damaged := filepath.Join(node.DataRoot, "volumes", "damaged")
	must(t, os.MkdirAll(filepath.Join(damaged, "upper"), 0o700))
	var ids []string
	request := &csi.ControllerListVolumeHealthRequest{MaxEntries: 2}
	for {
		response, err := node.Controller().ControllerListVolumeHealth(timeout(t), request)
		must(t, err)
		if len(response.GetEntries()) > 2 {
			t.Errorf("%d entries", len(response.GetEntries()))
		}
		for _, entry := range response.GetEntries() {
			wantConditions(t, entry, dataLoss, "UpperLost")
			ids = append(ids, entry.GetVolumeId())
		}
		if request.StartingToken = response.GetNextToken(); request.StartingToken == "" {
			break
		}
	}
	if got := strings.Join(ids, " "); got != "kept-0 kept-2 kept-4" {
		t.Errorf("listed: %s", got)
	}
	_, err := node.Controller().ControllerListVolumeHealth(timeout(t), &csi.ControllerListVolumeHealthRequest{StartingToken: "?"})
	wantCode(t, err, codes.Aborted, "token")
	_, err = node.NodeService().NodeGetVolumeHealth(timeout(t), &csi.NodeGetVolumeHealthRequest{VolumeId: "not-there"})
	wantCode(t, err, codes.NotFound)
	_, err = node.NodeService().NodeGetVolumeHealth(timeout(t), &csi.NodeGetVolumeHealthRequest{VolumeId: "a/b"})
	wantCode(t, err, codes.InvalidArgument)
	_, err = node.NodeService().NodeGetVolumeHealth(timeout(t), &csi.NodeGetVolumeHealthRequest{VolumeId: "x", VolumePublishPath: "relative"})
	wantCode(t, err, codes.InvalidArgument)
	response, err := node.NodeService().NodeGetVolumeHealth(timeout(t), &csi.NodeGetVolumeHealthRequest{VolumeId: "damaged"})
	must(t, err)
	wantConditions(t, response.GetVolumeHealth(), inaccessible, "RecordDamaged")
}
