package integration

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// wantListed checks which volumes the list of volumes with problems has, with these reasons.
func wantListed(t *testing.T, node *drivertest.Node, want ...string) {
	t.Helper()
	response, err := node.Controller().ControllerListVolumeHealth(timeout(t), &csi.ControllerListVolumeHealthRequest{})
	must(t, err)
	var got []string
	for _, entry := range response.GetEntries() {
		for _, c := range entry.GetHealthStatuses() {
			got = append(got, entry.GetVolumeId()+" "+c.GetReason())
		}
	}
	slices.Sort(want)
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("the list has %q, want %q", got, want)
	}
}

// TestHealthOfALayerThatDoesNotAnswer is a layer on a server that is away: to ask it takes without end. Only that is said, no
// operation waits for it, and the list has the other volumes.
func TestHealthOfALayerThatDoesNotAnswer(t *testing.T) {
	node := startNode(t, "--volume-health")
	layers := layersOf(t, node, map[string]string{"f": "f"})
	hanging := create(t, node, "hanging", readWriteOnce, "layers", layers)
	dir := filepath.Join(node.LayerDir, "layer-0")
	missing, err := node.Layer("missing", map[string]string{"g": "g"})
	must(t, err)
	other := create(t, node, "other", readWriteOnce, "layers", "dir://layers/missing")
	pod := newPod(t, node, "pod")
	target := publish(t, pod, hanging)
	must(t, os.RemoveAll(missing))

	release, err := drivertest.Hang(dir)
	must(t, err)
	release = sync.OnceValue(release)
	t.Cleanup(func() { must(t, release()) })
	for range 3 {
		wantHealth(t, node, pod, hanging, inaccessible, "DoesNotAnswer")
	}
	response, err := node.Controller().ControllerGetVolumeHealth(timeout(t), &csi.ControllerGetVolumeHealthRequest{VolumeId: hanging.ID})
	must(t, err)
	wantConditions(t, response.GetVolumeHealth(), inaccessible, "DoesNotAnswer")
	if message := response.GetVolumeHealth().GetHealthStatuses()[0].GetMessage(); !strings.Contains(message, dir+" does not answer") {
		t.Errorf("the message does not say what does not answer: %s", message)
	}
	wantListed(t, node, hanging.ID+" DoesNotAnswer", other.ID+" LayerMissing")
	// The view itself goes on, and the pod can end.
	wantFile(t, filepath.Join(target, "f"), "f")
	unpublish(t, pod, hanging)

	must(t, release())
	eventually(t, "the layer answers again", func() bool {
		response, err := node.Controller().ControllerGetVolumeHealth(timeout(t), &csi.ControllerGetVolumeHealthRequest{VolumeId: hanging.ID})
		return err == nil && len(response.GetVolumeHealth().GetHealthStatuses()) == 0
	})
	publish(t, pod, hanging)
	wantHealth(t, node, pod, hanging, 0, "")
	unpublish(t, pod, hanging)
	deleteVolume(t, node, hanging)
	deleteVolume(t, node, other)
	wantNothingLeft(t, node)
}

// TestHealthOfABusyVolume: a volume that waits for a registry must not fail the list of all, and is not reported for what has yet to
// be mounted.
func TestHealthOfABusyVolume(t *testing.T) {
	node := startNode(t, "--volume-health")
	r := startRegistry(t, node, registrytest.Options{})
	busy := create(t, node, "busy", readWriteOnce, "layers", pushImage(t, r, "a:1", map[string]string{"f": "f"}))
	missing, err := node.Layer("missing", map[string]string{"g": "g"})
	must(t, err)
	other := create(t, node, "other", readWriteOnce, "layers", "dir://layers/missing")
	must(t, os.RemoveAll(missing))
	asked, answer := make(chan struct{}), make(chan struct{})
	var once sync.Once
	r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, "") {
			once.Do(func() { close(asked) })
			<-answer
		}
		return false
	})
	answered := sync.OnceFunc(func() { close(answer) })
	defer answered()
	pod := newPod(t, node, "pod")
	published := make(chan error, 1)
	go func() {
		_, err := pod.Publish(timeout(t), busy)
		published <- err
	}()
	<-asked
	wantListed(t, node, other.ID+" LayerMissing")
	response, err := node.Controller().ControllerGetVolumeHealth(timeout(t), &csi.ControllerGetVolumeHealthRequest{VolumeId: busy.ID})
	must(t, err)
	wantConditions(t, response.GetVolumeHealth(), 0, "")
	answered()
	must(t, <-published)
	wantHealth(t, node, pod, busy, 0, "")
	unpublish(t, pod, busy)
}
