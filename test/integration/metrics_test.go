package integration

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestMetrics: what is done shows in the metrics of the driver that did it, and so does what there is.
func TestMetrics(t *testing.T) {
	address := freeAddress(t)
	node := startNode(t, "--http-endpoint="+address, "--reconcile-interval=50ms", "--layer-gc-min-age=0s")
	r := startRegistry(t, node, registrytest.Options{})
	pushImage(t, r, "a:1", map[string]string{"f": "f"}, map[string]string{"g": "g"})
	wants := func(lines ...string) {
		t.Helper()
		var body string
		eventually(t, "the metrics have "+strings.Join(lines, ", "), func() bool {
			var code int
			if code, body = get(t, "http://"+address+"/metrics"); code != http.StatusOK {
				t.Fatalf("/metrics: %d %s", code, body)
			}
			for _, line := range lines {
				if !strings.Contains(body, "\noverlay_csi_"+line) {
					return false
				}
			}
			return true
		})
	}
	wants(`ready 1`, `registered 1`, `images 0`, `damaged_records 0`, `data_root_available_bytes `)

	pod := newPod(t, node, "pod")
	v := inline("layers", "oci://"+r.Host+"/a:1")
	publish(t, pod, v)
	wants(`rpc_duration_seconds_count{code="OK",method="NodePublishVolume"} 1`, `volumes{backend="directory",upper="pod"} 1`,
		`views{backend="directory",upper="pod"} 1`, `images 1`, `layers 2`, `pull_duration_seconds_count{result="ok"} 1`,
		`image_requests_total{result="miss"} 1`, `pulls 0`)

	_, err := node.NodeService().NodeUnpublishVolume(context.Background(), &csi.NodeUnpublishVolumeRequest{VolumeId: "../x", TargetPath: "/x"})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("unpublish of a volume ../x: %v", err)
	}
	unpublish(t, pod, v)
	_, err = node.Admin().GC(context.Background(), false, true)
	must(t, err)
	wants(`rpc_duration_seconds_count{code="InvalidArgument",method="NodeUnpublishVolume"} 1`,
		`rpc_duration_seconds_count{code="OK",method="NodeUnpublishVolume"} 1`, `collected_layers_total 2`, `layers 0`, `trash_trees 0`)

	// Whoever may not look at profiles learns nothing.
	if code, _ := get(t, "http://"+address+"/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("/debug/pprof/: %d without --enable-pprof", code)
	}
}
