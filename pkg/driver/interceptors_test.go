package driver

import (
	"context"
	"fmt"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
)

func TestPanicBecomesAnError(t *testing.T) {
	_, err := withStatus(t.Context(), nil, nil, func(context.Context, any) (any, error) { panic("out of cheese") })
	wantStatus(t, err, codes.Internal, "internal error: handler panicked: out of cheese (see driver log)")
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
