package driver

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

func TestPanicBecomesAnError(t *testing.T) {
	_, err := withStatus(t.Context(), nil, nil, func(context.Context, any) (any, error) { panic("out of cheese") })
	wantStatus(t, err, codes.Internal, "internal error: handler panicked: out of cheese (see driver log)")
}

// unobserved is an rpcObserver of tests in which nobody observes.
type unobserved struct{}

func (unobserved) RPCEnded(string, string, time.Duration) {}

// observed has what was observed of the last RPC.
type observed struct{ method, code string }

func (o *observed) RPCEnded(method, code string, _ time.Duration) { o.method, o.code = method, code }

func TestRPCsAreObserved(t *testing.T) {
	var last observed
	info := &grpc.UnaryServerInfo{FullMethod: csi.Node_NodePublishVolume_FullMethodName}
	fail := func(context.Context, any) (any, error) { return nil, status.Error(codes.NotFound, "none") }
	if _, err := withLog(klog.Background(), &last)(t.Context(), goodPublish(), info, fail); status.Code(err) != codes.NotFound {
		t.Errorf("error %v; want that of the handler", err)
	}
	if want := (observed{"NodePublishVolume", "NotFound"}); last != want {
		t.Errorf("observed %v; want %v", last, want)
	}
}

func TestReadOnlyRPC(t *testing.T) {
	for method, want := range map[string]bool{
		csi.Identity_Probe_FullMethodName:                        true,
		csi.Identity_GetPluginInfo_FullMethodName:                true,
		csi.Node_NodeGetVolumeStats_FullMethodName:               true,
		csi.Node_NodePublishVolume_FullMethodName:                false,
		csi.Node_NodeUnpublishVolume_FullMethodName:              false,
		csi.Node_NodeExpandVolume_FullMethodName:                 false,
		csi.Controller_CreateVolume_FullMethodName:               false,
		csi.Controller_DeleteVolume_FullMethodName:               false,
		csi.Controller_ListVolumes_FullMethodName:                true,
		csi.Controller_GetCapacity_FullMethodName:                true,
		csi.Controller_ControllerGetVolumeHealth_FullMethodName:  true,
		csi.Controller_ValidateVolumeCapabilities_FullMethodName: true,
	} {
		t.Run(method, func(t *testing.T) {
			if got := readOnlyRPC.MatchString(method); got != want {
				t.Errorf("read-only %t; want %t", got, want)
			}
		})
	}
}

func TestRequestLogValues(t *testing.T) {
	for name, c := range map[string]struct {
		req  any
		want string
	}{
		"publish": {
			goodPublish(), "[volume csi-1 pod namespace/pod target /var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/view/mount]",
		},
		"create":            {goodCreate(), "[volume pvc-1]"},
		"snapshot":          {&csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: "pvc-1"}, "[volume pvc-1 snapshot s]"},
		"delete a snapshot": {&csi.DeleteSnapshotRequest{SnapshotId: "s@a"}, "[snapshot s@a]"},
		"probe":             {&csi.ProbeRequest{}, "[]"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := fmt.Sprint(requestLogValues(c.req)); got != c.want {
				t.Errorf("%s; want %s", got, c.want)
			}
		})
	}
}
