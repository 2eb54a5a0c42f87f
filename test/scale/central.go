package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// centralMode is one external-provisioner and one external-resizer for the cluster, and the driver alone on the nodes. The sidecars are
// the real programs, and talk to a controller service that is played: it knows every node by an object that the node keeps.
type centralMode struct{ provisioner, resizer string }

const (
	reportsPath = "/apis/scale.overlay-csi.github.io/v1/nodereports"
	mergePatch  = "application/merge-patch+json"
)

// start starts the central programs, and returns once they run.
func (m *centralMode) start(ctx context.Context, c *cluster) error {
	if err := c.waitServed(ctx, "scale.overlay-csi.github.io/v1/nodereports"); err != nil {
		return err
	}
	socket := filepath.Join(c.dir, "csi.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	controller := &controller{process: newProcess(c.url, c.token, "overlay-csi-controller/played (linux/amd64)", 1000, 2000, c.counters)}
	server := grpc.NewServer()
	csi.RegisterIdentityServer(server, controller)
	csi.RegisterControllerServer(server, controller)
	go func() { _ = server.Serve(listener) }()
	context.AfterFunc(ctx, server.Stop)
	go controller.process.inform(ctx, informer{path: reportsPath, contentType: jsonType}, func() {})

	// With their default of 5 requests a second, one provisioner for the cluster would make one claim a second.
	common := []string{
		"--kubeconfig", filepath.Join(c.dir, "kubeconfig"), "--csi-address", socket, "--kube-api-qps", "1000", "--kube-api-burst", "2000",
	}
	provisioner := append([]string{
		"--strict-topology", "--extra-create-metadata", "--timeout=60s", "--enable-capacity", "--capacity-ownerref-level=-1",
		"--kube-api-capacity-qps", "500", "--kube-api-capacity-burst", "1000", "--capacity-threads", "10",
	}, common...)
	first, err := c.startWith(ctx, []string{"NAMESPACE=" + namespace}, m.provisioner, provisioner...)
	if err != nil {
		return err
	}
	second, err := c.startWith(ctx, nil, m.resizer, append([]string{"--handle-volume-inuse-error=false"}, common...)...)
	c.sidecars = append(c.sidecars, first, second)
	return err
}

func (m *centralMode) node(c *cluster, i int) player {
	return &centralNode{name: nodeName(i), driver: newProcess(c.url, c.token, "overlay-csi/played (linux/amd64)", 5, 10, c.counters)}
}

// find finds the sidecars as the servers are found.
func (m *centralMode) find(ctx context.Context) error {
	return findAll(ctx, []program{
		{&m.provisioner, "csi-provisioner", "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner", provisionerModule},
		{&m.resizer, "csi-resizer", "github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer", serversModule},
	})
}

// centralNode plays a node that has the driver alone. It watches its own object, and writes its status once a minute.
type centralNode struct {
	name   string
	driver *process
	free   atomic.Int64
}

func (n *centralNode) run(ctx context.Context, ready func()) {
	object := fmt.Appendf(nil, `{"apiVersion":"scale.overlay-csi.github.io/v1","kind":"NodeReport","metadata":{"name":%q}}`, n.name)
	n.driver.report(n.driver.do(ctx, http.MethodPost, reportsPath, jsonType, object, nil))
	n.free.Store(1 << 40)
	n.write(ctx)
	go n.driver.inform(ctx, informer{
		path: reportsPath, contentType: jsonType, selector: url.Values{"fieldSelector": {"metadata.name=" + n.name}},
	}, ready)
	// The jitter keeps nodes apart that have started together.
	for sleep(ctx, time.Duration((0.5+rand.Float64())*float64(time.Minute))) {
		n.free.Add(-1 << 20)
		n.write(ctx)
	}
}

func (n *centralNode) write(ctx context.Context) {
	patch, err := json.Marshal(map[string]any{"status": map[string]any{
		"free": n.free.Load(), "seen": time.Now().UTC().Format(time.RFC3339), "topology": map[string]string{topologyKey: n.name},
	}})
	n.driver.report(err)
	n.driver.report(n.driver.do(ctx, http.MethodPatch, reportsPath+"/"+n.name+"/status", mergePatch, patch, nil))
}

// controller plays the driver's controller service. Each volume that it makes or deletes is one write to the object of its node, which
// the node sees.
type controller struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	process *process
	free    atomic.Int64
}

func (*controller) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: driverName, VendorVersion: "played"}, nil
}

func (*controller) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

func (*controller) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	var response csi.GetPluginCapabilitiesResponse
	for _, service := range []csi.PluginCapability_Service_Type{
		csi.PluginCapability_Service_CONTROLLER_SERVICE, csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS,
	} {
		response.Capabilities = append(response.Capabilities, &csi.PluginCapability{
			Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: service}},
		})
	}
	response.Capabilities = append(response.Capabilities, &csi.PluginCapability{Type: &csi.PluginCapability_VolumeExpansion_{
		VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: csi.PluginCapability_VolumeExpansion_ONLINE},
	}})
	return &response, nil
}

func (*controller) ControllerGetCapabilities(
	context.Context, *csi.ControllerGetCapabilitiesRequest,
) (*csi.ControllerGetCapabilitiesResponse, error) {
	var response csi.ControllerGetCapabilitiesResponse
	for _, rpc := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME, csi.ControllerServiceCapability_RPC_GET_CAPACITY,
	} {
		response.Capabilities = append(response.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: rpc}},
		})
	}
	return &response, nil
}

// GetCapacity has another answer each time, like the free space of disks that are in use.
func (c *controller) GetCapacity(context.Context, *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	free := 1<<40 - c.free.Add(1<<12)
	return &csi.GetCapacityResponse{AvailableCapacity: free, MaximumVolumeSize: wrapperspb.Int64(free)}, nil
}

func (c *controller) CreateVolume(ctx context.Context, request *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	parameters := request.GetParameters()
	path := fmt.Sprintf("/api/v1/namespaces/%s/persistentvolumeclaims/%s",
		parameters["csi.storage.k8s.io/pvc/namespace"], parameters["csi.storage.k8s.io/pvc/name"])
	c.process.report(c.process.do(ctx, http.MethodGet, path, jsonType, nil, nil))
	topology := request.GetAccessibilityRequirements().GetPreferred()[0]
	node := topology.GetSegments()[topologyKey]
	c.tell(ctx, node, request.GetName())
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId: node + "." + request.GetName(), CapacityBytes: request.GetCapacityRange().GetRequiredBytes(),
		VolumeContext:      map[string]string{"layers": "oci://registry.example.com/team/model:7b", "upper": "claim"},
		AccessibleTopology: []*csi.Topology{topology},
	}}, nil
}

func (c *controller) DeleteVolume(ctx context.Context, request *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	c.tell(ctx, request.GetVolumeId()[:len(nodeName(0))], request.GetVolumeId())
	return &csi.DeleteVolumeResponse{}, nil
}

// tell writes the name of a volume into the object of a node.
func (c *controller) tell(ctx context.Context, node, volume string) {
	patch := fmt.Appendf(nil, `{"spec":{"latest":%q}}`, volume)
	c.process.report(c.process.do(ctx, http.MethodPatch, reportsPath+"/"+node, mergePatch, patch, nil))
}
