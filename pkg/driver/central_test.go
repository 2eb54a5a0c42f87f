package driver

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/klog/v2"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// testNode is a node whose volumes are in memory. Its controller service is the real one.
type testNode struct {
	provisioner
	room      int64
	volumes   map[string]volume.CreateRequest
	snapshots map[string]volume.Snapshot
	// pushed has the requests for snapshots in registries, which push pushes.
	pushed []volume.SnapshotRequest
	push   func(volume.SnapshotRequest) error
	// made are the layers that a restored volume has, "" for those of the request.
	made string
}

func (n *testNode) Create(ctx context.Context, req volume.CreateRequest) (volume.Volume, error) {
	if req.ClaimLayers != nil {
		var err error
		if req.Spec.Layers, err = req.ClaimLayers(ctx); err != nil {
			return volume.Volume{}, err
		}
	}
	if source := req.Source; source != (volume.Source{}) && !isPortable(source) {
		_, isSnapshot := n.snapshots[source.Snapshot]
		if _, isVolume := n.volumes[source.Volume]; !isSnapshot && !isVolume {
			return volume.Volume{}, fmt.Errorf("%w: source %v", errdefs.ErrNotFound, source)
		}
		req.Resolved = req.Spec.Layers
		switch {
		case n.made == "none":
			req.Resolved = nil
		case n.made != "":
			var err error
			if req.Resolved, err = reference.ParseList(n.made); err != nil {
				return volume.Volume{}, err
			}
		}
	}
	earlier, ok := n.volumes[req.Name]
	switch {
	case ok && req.ClaimLayers == nil && !earlier.Spec.Equal(req.Spec):
		return volume.Volume{}, fmt.Errorf("%w: another volume", errdefs.ErrAlreadyExists)
	case ok:
		req = earlier
	case n.room < req.Spec.Size:
		return volume.Volume{}, fmt.Errorf("%w: no room", errdefs.ErrResourceExhausted)
	default:
		n.room -= req.Spec.Size
		n.volumes[req.Name] = req
	}
	created := req.Spec
	created.Layers = req.Resolved
	return volume.Volume{ID: req.Name, Capacity: req.Spec.Size, Spec: created, OnThisNode: true}, nil
}

func (n *testNode) Get(id string) (volume.Volume, error) {
	if _, ok := n.volumes[id]; !ok {
		return volume.Volume{}, fmt.Errorf("%w: volume %s", errdefs.ErrNotFound, id)
	}
	return volume.Volume{ID: id}, nil
}

func (n *testNode) Delete(_ context.Context, id string) error {
	delete(n.volumes, id)
	return nil
}

// testCluster has nodes, and answers requests to them at once. A node in away does not answer.
type testCluster struct {
	t       *testing.T
	nodes   map[string]*testNode
	objects map[string]*overlaynode.OverlayNode
	away    []string
	gone    []string
	events  []string
	// latest is the digest that every tag has.
	latest string
	// affinity has the node of PersistentVolumes by their names.
	affinity map[string]string
	ensured  []string
	kept     []string
	// key is that of all nodes.
	key *overlaynode.Key
	// deletions are the handles of the DeleteVolume requests that were given to nodes.
	deletions []string
}

const testDriver = "overlay-csi.github.io"

func newTestCluster(t *testing.T, rooms map[string]int64) (*testCluster, *Central) {
	t.Helper()
	c := &testCluster{
		t: t, nodes: map[string]*testNode{}, objects: map[string]*overlaynode.OverlayNode{}, affinity: map[string]string{},
		latest: "sha256:" + strings.Repeat("a", 64),
	}
	for name, room := range rooms {
		c.nodes[name] = &testNode{room: room, volumes: map[string]volume.CreateRequest{}, snapshots: map[string]volume.Snapshot{}}
		c.objects[name] = &overlaynode.OverlayNode{
			Spec:   overlaynode.Spec{Node: name, Requests: map[string]overlaynode.Request{}},
			Status: overlaynode.Status{CapacityBytes: room, ReportedAt: metav1.Now(), Results: map[string]overlaynode.Result{}},
		}
	}
	return c, NewCentral(CentralConfig{DriverName: testDriver, Nodes: c, Gone: c, Cluster: c, Tags: c, Events: c})
}

func (c *testCluster) Await(context.Context) error { return nil }

func (c *testCluster) Get(node string) (*overlaynode.OverlayNode, error) {
	if object := c.objects[node]; object != nil {
		return object, nil
	}
	return nil, fmt.Errorf("%w: OverlayNode %s", errdefs.ErrNotFound, node)
}

func (c *testCluster) All() (all []*overlaynode.OverlayNode) {
	for _, object := range c.objects {
		all = append(all, object)
	}
	return all
}

func (c *testCluster) Call(ctx context.Context, node, handle, method string, body []byte) (overlaynode.Result, error) {
	object := c.objects[node]
	if method == methodDelete {
		c.deletions = append(c.deletions, handle)
	}
	object.Spec.Requests[handle] = overlaynode.Request{ID: method, Method: method, Body: string(body), PostedAt: metav1.Now()}
	if slices.Contains(c.away, node) {
		return overlaynode.Result{}, fmt.Errorf("%w: node %s", overlaynode.ErrUnanswered, node)
	}
	result := ForwardedTo(c.controller(node), klog.Background(), unobserved{})(ctx, method, body)
	result.ID = method
	object.Status.Results[handle] = result
	object.Status.CapacityBytes = c.nodes[node].room
	return result, nil
}

// controller returns the controller service of a node.
func (c *testCluster) controller(node string) *Controller {
	return NewController(ControllerConfig{
		DriverName: testDriver, NodeID: node, Volumes: c.nodes[node], Snapshots: c.nodes[node], Cluster: c, Key: c.key,
	})
}

func (c *testCluster) Keep(_ context.Context, _, handle string) error {
	c.kept = append(c.kept, handle)
	return nil
}

func (c *testCluster) Check(_ context.Context, object *overlaynode.OverlayNode) (bool, error) {
	return slices.Contains(c.gone, object.Spec.Node), nil
}

func (c *testCluster) Ensure(_ context.Context, node string) error {
	c.ensured = append(c.ensured, node)
	return nil
}

func (c *testCluster) ClaimAnnotations(_ context.Context, _, name string) (map[string]string, error) {
	if name == "silent" {
		return map[string]string{}, nil
	}
	return map[string]string{testDriver + "/layers": "oci://registry.example.com/" + name + ":latest"}, nil
}

func (c *testCluster) ClaimReference(_ context.Context, namespace, name string) (*corev1.ObjectReference, error) {
	return &corev1.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: namespace, Name: name, UID: "uid"}, nil
}

func (c *testCluster) VolumeTopology(_ context.Context, _, handle, _ string) ([]string, error) {
	if node := c.affinity[handle]; node != "" {
		return []string{node}, nil
	}
	return nil, nil
}

func (c *testCluster) ResolveTags(
	_ context.Context, refs []reference.Reference, _ map[string]string, _ string,
) ([]reference.Reference, error) {
	resolved := slices.Clone(refs)
	for i, ref := range refs {
		if ref.Scheme() == reference.OCI && strings.HasSuffix(ref.String(), ":latest") {
			parsed, err := reference.Parse(strings.TrimSuffix(ref.String(), ":latest") + "@" + c.latest)
			if err != nil {
				c.t.Fatal(err)
			}
			resolved[i] = parsed
		}
	}
	return resolved, nil
}

func (c *testCluster) Eventf(_ runtime.Object, _, reason, message string, args ...any) {
	c.events = append(c.events, reason+": "+fmt.Sprintf(message, args...))
}

// createOf returns a request for a claim that may be on some nodes, in this order.
func createOf(size int64, parameters map[string]string, nodes ...string) *csi.CreateVolumeRequest {
	req := &csi.CreateVolumeRequest{
		Name: "pvc-1", CapacityRange: &csi.CapacityRange{RequiredBytes: size}, Parameters: parameters,
		Secrets: map[string]string{"password": "secret"},
		VolumeCapabilities: []*csi.VolumeCapability{{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		}},
		AccessibilityRequirements: &csi.TopologyRequirement{},
	}
	for _, node := range nodes {
		topology := nodeTopology(testDriver, node)
		req.AccessibilityRequirements.Preferred = append(req.AccessibilityRequirements.Preferred, topology)
	}
	return req
}

var dirLayers = map[string]string{"layers": "dir://models/base"}

func TestCentralCreatesWhereThereIsRoom(t *testing.T) {
	const gib = 1 << 30
	long := strings.Repeat("n", 70)
	for name, c := range map[string]struct {
		rooms map[string]int64
		away  string
		nodes []string
		want  string
		code  codes.Code
	}{
		"the first":                    {rooms: map[string]int64{"a": 2 * gib, "b": 2 * gib}, nodes: []string{"b", "a"}, want: "pvc-1@b"},
		"the second, which has room":   {rooms: map[string]int64{"a": 2 * gib, "b": 1}, nodes: []string{"b", "a"}, want: "pvc-1@a"},
		"none has room":                {rooms: map[string]int64{"a": 1, "b": 1}, nodes: []string{"b", "a"}, code: codes.ResourceExhausted},
		"the one that was asked for":   {rooms: map[string]int64{"a": 1}, nodes: []string{"a"}, code: codes.ResourceExhausted},
		"no driver there":              {rooms: map[string]int64{"a": 2 * gib}, nodes: []string{"other"}, code: codes.ResourceExhausted},
		"the node does not answer":     {rooms: map[string]int64{"a": 2 * gib}, away: "a", nodes: []string{"a"}, code: codes.Unavailable},
		"a name that is no label":      {rooms: map[string]int64{long: 2 * gib}, nodes: []string{long}, want: "pvc-1@" + segmentOf(long)},
		"no accessibility requirement": {rooms: map[string]int64{"a": 2 * gib}, code: codes.ResourceExhausted},
	} {
		t.Run(name, func(t *testing.T) {
			cluster, central := newTestCluster(t, c.rooms)
			cluster.away = []string{c.away}
			response, err := central.CreateVolume(t.Context(), createOf(gib, dirLayers, c.nodes...))
			if status.Code(toStatus(err)) != c.code || response.GetVolume().GetVolumeId() != c.want {
				t.Fatalf("got %v, %v; want %q, %s", response, err, c.want, c.code)
			}
			if err != nil {
				return
			}
			segment := response.GetVolume().GetAccessibleTopology()[0].GetSegments()[testDriver+"/node"]
			if !strings.HasSuffix(c.want, "@"+segment) || response.GetVolume().GetCapacityBytes() != gib {
				t.Errorf("got %v", response)
			}
			for _, object := range cluster.objects {
				for _, request := range object.Spec.Requests {
					if strings.Contains(request.Body, "secret") {
						t.Errorf("a secret is in the API server: %s", request.Body)
					}
				}
			}
		})
	}
}

// TestCentralTagsAreResolvedOnce: a creation that is repeated after the tag has moved has the layers of the first try, on the node of the
// first try.
func TestCentralTagsAreResolvedOnce(t *testing.T) {
	cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40, "b": 1 << 40})
	cluster.away = []string{"a"}
	fromClaim := map[string]string{"layersFrom": "claim", keyClaimNamespace: "default", keyClaimName: "model"}
	if _, err := central.CreateVolume(t.Context(), createOf(1<<30, fromClaim, "a", "b")); !errdefs.IsUnavailable(err) {
		t.Fatalf("got %v", err)
	}
	first := cluster.latest
	cluster.away, cluster.latest = nil, "sha256:"+strings.Repeat("b", 64)
	for _, order := range [][]string{{"b", "a"}, {"a", "b"}} {
		response, err := central.CreateVolume(t.Context(), createOf(1<<30, fromClaim, order...))
		if err != nil || response.GetVolume().GetVolumeId() != "pvc-1@a" ||
			response.GetVolume().GetVolumeContext()["layers"] != "oci://registry.example.com/model@"+first {
			t.Errorf("got %v, %v", response, err)
		}
	}
	if len(cluster.nodes["b"].volumes) > 0 {
		t.Error("there is a second volume on node b")
	}
}

// TestCentralTagMoves: a creation that is repeated when the first one is forgotten, and the tag has moved, returns the volume as it is.
func TestCentralTagMoves(t *testing.T) {
	for name, parameters := range map[string]map[string]string{
		"of the claim":        {"layersFrom": "claim", keyClaimNamespace: "default", keyClaimName: "model"},
		"of the StorageClass": {"layers": "oci://registry.example.com/model:latest"},
	} {
		t.Run(name, func(t *testing.T) {
			cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40})
			var first map[string]string
			for range 2 {
				response, err := central.CreateVolume(t.Context(), createOf(1<<30, parameters, "a"))
				if err != nil {
					t.Fatal(err)
				}
				if first == nil {
					first = response.GetVolume().GetVolumeContext()
				} else if second := response.GetVolume().GetVolumeContext(); !maps.Equal(first, second) {
					t.Errorf("got %v; want %v", second, first)
				}
				cluster.latest = "sha256:" + strings.Repeat("b", 64)
				clear(cluster.objects["a"].Spec.Requests)
			}
			if want := "oci://registry.example.com/model@sha256:" + strings.Repeat("a", 64); first["layers"] != want {
				t.Errorf("got %v; want the layer %s", first, want)
			}
		})
	}
}

// TestCentralCreationExpires: a claim for any node does not wait for one that did not answer in time. That node may have made the volume,
// and deletes it, also when it comes back later.
func TestCentralCreationExpires(t *testing.T) {
	for name, c := range map[string]struct {
		away, used bool
		nodes      []string
		want       string
	}{
		"elsewhere, the node answers again":        {nodes: []string{"b", "a"}, want: "pvc-1@b"},
		"elsewhere, the node is still away":        {away: true, nodes: []string{"b", "a"}, want: "pvc-1@b"},
		"on the same node, which is the only one":  {nodes: []string{"a"}, want: "pvc-1@a"},
		"on the same node, which is the first one": {nodes: []string{"a", "b"}, want: "pvc-1@a"},
		"nowhere: there is a PersistentVolume":     {used: true, nodes: []string{"b", "a"}},
	} {
		t.Run(name, func(t *testing.T) {
			cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40, "b": 1 << 40})
			cluster.away = []string{"a"}
			if _, err := central.CreateVolume(t.Context(), createOf(1<<30, dirLayers, "a", "b")); !errdefs.IsUnavailable(err) {
				t.Fatalf("got %v", err)
			}
			// It made the volume before it went away.
			request := cluster.objects["a"].Spec.Requests["pvc-1@a"]
			result := ForwardedTo(cluster.controller("a"), klog.Background(), unobserved{})(t.Context(), request.Method, []byte(request.Body))
			if result.Code != 0 || len(cluster.nodes["a"].volumes) != 1 {
				t.Fatalf("node a: %+v", result)
			}
			past := metav1.NewTime(time.Now().Add(-time.Minute))
			request.PostedAt, request.ExpiresAt = past, &past
			cluster.objects["a"].Spec.Requests["pvc-1@a"] = request
			if !c.away {
				cluster.away = nil
			}
			if c.used {
				cluster.affinity["pvc-1@a"] = "a"
			}
			response, err := central.CreateVolume(t.Context(), createOf(1<<30, dirLayers, c.nodes...))
			if got := response.GetVolume().GetVolumeId(); got != c.want || c.used != errdefs.IsAborted(err) {
				t.Fatalf("got %q, %v; want %q", got, err, c.want)
			}
			if c.away {
				left := cluster.objects["a"].Spec.Requests["pvc-1@a"]
				if left.Method != methodDelete || !slices.Equal(cluster.kept, []string{"pvc-1@a"}) {
					t.Errorf("the node that is away is asked for %q, and %q are kept", left.Method, cluster.kept)
				}
				return
			}
			if _, ok := cluster.nodes["a"].volumes["pvc-1@a"]; ok != (c.used || c.want == "pvc-1@a") {
				t.Errorf("node a has the volume: %t", ok)
			}
		})
	}
}

// TestCentralCreationOnGoneNode: a claim does not wait for a node that is gone for good, which deletes what it may have made if it comes
// back.
func TestCentralCreationOnGoneNode(t *testing.T) {
	cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40, "b": 1 << 40})
	cluster.away = []string{"a"}
	if _, err := central.CreateVolume(t.Context(), createOf(1<<30, dirLayers, "a", "b")); !errdefs.IsUnavailable(err) {
		t.Fatalf("got %v", err)
	}
	now := metav1.Now()
	cluster.gone, cluster.objects["a"].Spec.NodeGoneSince = []string{"a"}, &now
	if _, err := central.CreateVolume(t.Context(), createOf(1<<30, dirLayers, "a", "b")); !errdefs.IsResourceExhausted(err) {
		t.Fatalf("got %v", err)
	}
	response, err := central.CreateVolume(t.Context(), createOf(1<<30, dirLayers, "a", "b"))
	if err != nil || response.GetVolume().GetVolumeId() != "pvc-1@b" {
		t.Errorf("got %v, %v", response, err)
	}
	if left := cluster.objects["a"].Spec.Requests["pvc-1@a"]; left.Method != methodDelete || !slices.Equal(cluster.kept, []string{"pvc-1@a"}) {
		t.Errorf("the node that is gone is asked for %q, and %q are kept", left.Method, cluster.kept)
	}
}

// TestCentralDeletesOnce: a deletion that is repeated at once is answered without the node, and one after another creation is not.
func TestCentralDeletesOnce(t *testing.T) {
	cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40})
	for want := 1; want <= 2; want++ {
		if _, err := central.CreateVolume(t.Context(), createOf(1<<30, dirLayers, "a")); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := central.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "pvc-1@a"}); err != nil {
				t.Fatal(err)
			}
		}
		if len(cluster.deletions) != want || len(cluster.nodes["a"].volumes) > 0 {
			t.Errorf("the node was asked for %d deletions, and has %d volumes; want %d and none",
				len(cluster.deletions), len(cluster.nodes["a"].volumes), want)
		}
	}
	request := cluster.objects["a"].Spec.Requests["pvc-1@a"]
	request.PostedAt = metav1.NewTime(time.Now().Add(-2 * deletedAgain))
	cluster.objects["a"].Spec.Requests["pvc-1@a"] = request
	if _, err := central.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "pvc-1@a"}); err != nil || len(cluster.deletions) != 3 {
		t.Errorf("a later deletion: %v, %d deletions", err, len(cluster.deletions))
	}
}

func TestCentralVolumeOnNoNode(t *testing.T) {
	cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40})
	response, err := central.CreateVolume(t.Context(), createOf(0, map[string]string{"layers": "dir://models/base", "upper": "pod"}, "a"))
	if err != nil || response.GetVolume().GetVolumeId() != "pvc-1" || len(response.GetVolume().GetAccessibleTopology()) > 0 {
		t.Fatalf("got %v, %v", response, err)
	}
	if _, err := central.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "pvc-1"}); err != nil {
		t.Error(err)
	}
	if len(cluster.objects["a"].Spec.Requests) > 0 {
		t.Errorf("the node was asked for %v", cluster.objects["a"].Spec.Requests)
	}
}

func TestCentralDelete(t *testing.T) {
	for name, c := range map[string]struct {
		handle     string
		away, gone bool
		code       codes.Code
		events     int
		ensured    []string
	}{
		"there":                           {handle: "pvc-1@a"},
		"of the other mode":               {handle: "pvc-2"},
		"that never was":                  {handle: "pvc-3@a"},
		"of no PersistentVolume":          {handle: "pvc-4"},
		"node does not answer":            {handle: "pvc-1@a", away: true, code: codes.Unavailable},
		"node is gone":                    {handle: "pvc-1@a", away: true, gone: true, events: 1},
		"node never had a driver":         {handle: "pvc-1@c", code: codes.Unavailable, ensured: []string{"c"}},
		"a static one with @":             {handle: "team@data"},
		"a handle that cannot be":         {handle: "../pvc-1@a", code: codes.InvalidArgument},
		"node answers although it's gone": {handle: "pvc-1@a", gone: true},
	} {
		t.Run(name, func(t *testing.T) {
			cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40})
			cluster.affinity["pvc-2"], cluster.affinity["team@data"] = "a", "a"
			for _, volumes := range []string{"pvc-1@a", "pvc-2", "team@data"} {
				cluster.nodes["a"].volumes[volumes] = volume.CreateRequest{}
			}
			if c.away {
				cluster.away = []string{"a"}
			}
			if c.gone {
				now := metav1.Now()
				cluster.gone, cluster.objects["a"].Spec.NodeGoneSince = []string{"a"}, &now
			}
			_, err := central.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: c.handle})
			if status.Code(toStatus(err)) != c.code || len(cluster.events) != c.events || len(cluster.kept) != c.events ||
				!slices.Equal(cluster.ensured, c.ensured) {
				t.Errorf("got %v, events %q, ensured %q; want %s", err, cluster.events, cluster.ensured, c.code)
			}
			_, left := cluster.nodes["a"].volumes[c.handle]
			if want := c.away; left != want {
				t.Errorf("volume left: %v; want %v", left, want)
			}
		})
	}
}

// TestForwardedErrors: a node's error has the code that it has without a controller in between.
func TestForwardedErrors(t *testing.T) {
	cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40})
	if _, err := central.CreateVolume(t.Context(), createOf(1<<30, dirLayers, "a")); err != nil {
		t.Fatal(err)
	}
	clear(cluster.objects["a"].Spec.Requests)
	_, err := central.CreateVolume(t.Context(), createOf(1<<30, map[string]string{"layers": "dir://models/other"}, "a"))
	if status.Code(toStatus(err)) != codes.AlreadyExists || !strings.Contains(err.Error(), "node a: ") {
		t.Errorf("got %v", err)
	}
	result := ForwardedTo(NewController(ControllerConfig{}), klog.Background(), unobserved{})(t.Context(), "ForkVolume", []byte(`{}`))
	if codes.Code(result.Code) != codes.Unavailable || !strings.Contains(result.Message, "older than the controller") {
		t.Errorf("a method of a newer controller: %+v", result)
	}
	result = ForwardedTo(NewController(ControllerConfig{}), klog.Background(), unobserved{})(t.Context(), methodDelete, []byte(`[]`))
	if codes.Code(result.Code) != codes.InvalidArgument {
		t.Errorf("a body that is no request: %+v", result)
	}
}
