package driver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/wrapperspb"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

const (
	// maxNodesTried is how many nodes a request may be given to, one after the other, while none has room for the volume.
	maxNodesTried = 3
	// answerBefore is the time between the answer to an RPC and its deadline, for what follows when a node does not answer.
	answerBefore = 5 * time.Second
	// goneWait is how long a deletion waits for a node that seems to be gone.
	goneWait = 2 * time.Second
)

// nodes has the drivers of the nodes. It is an overlaynode.Dispatcher.
type nodes interface {
	Await(ctx context.Context) error
	Get(node string) (*overlaynode.OverlayNode, error)
	All() []*overlaynode.OverlayNode
	Call(ctx context.Context, node, handle, method string, body []byte) (overlaynode.Result, error)
}

// goneNodes knows which nodes are gone. It is an overlaynode.GoneNodes.
type goneNodes interface {
	Check(ctx context.Context, object *overlaynode.OverlayNode) (bool, error)
	Ensure(ctx context.Context, node string) error
}

// tags resolves the tags of layers. It is a layer.Tags.
type tags interface {
	ResolveTags(ctx context.Context, refs []reference.Reference, secrets map[string]string, namespace string) ([]reference.Reference, error)
}

// cluster is what a central controller asks of the API server.
type cluster interface {
	claims
	VolumeTopology(ctx context.Context, driver, handle, label string) ([]string, error)
}

// events writes events. It is a record.EventRecorder of client-go.
type events interface {
	Eventf(object runtime.Object, eventType, reason, message string, args ...any)
}

// CentralConfig is what a [Central] consists of.
type CentralConfig struct {
	DriverName string
	Nodes      nodes
	Gone       goneNodes
	Cluster    cluster
	Tags       tags
	Events     events
}

// Central is the CSI Controller service (CSI spec, "Controller Service RPC") for all nodes. The drivers of the nodes carry out its
// requests, and store what is to be stored. Several may be active at the same time.
type Central struct {
	csi.UnimplementedControllerServer
	CentralConfig
	claimLayers claimLayers
	segment     string
}

// NewCentral returns the service.
func NewCentral(config CentralConfig) *Central {
	return &Central{
		CentralConfig: config,
		claimLayers:   newClaimLayers(config.Cluster, config.DriverName),
		segment:       topologyKey(config.DriverName),
	}
}

// CreateVolume has the node that the topology asks for create the volume. A volume without a persistent upper is on no node, and needs no
// more than an answer.
func (c *Central) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	request, err := createRequest(req)
	if err != nil {
		return nil, err
	}
	if !request.Spec.Persistent() {
		if request.Spec.Layers, err = c.resolveLayers(ctx, req, request); err != nil {
			return nil, err
		}
		return &csi.CreateVolumeResponse{Volume: &csi.Volume{
			VolumeId: nodelessHandle(req.GetName()), CapacityBytes: max(request.Spec.Size, request.Required),
			VolumeContext: request.Spec.Parameters(),
		}}, nil
	}
	if err := c.Nodes.Await(ctx); err != nil {
		return nil, err
	}
	candidates := c.candidates(req.GetAccessibilityRequirements())
	if begun := c.findBegun(req.GetName(), candidates); begun != nil {
		request.Spec.Layers, candidates = begun.layers, []candidate{begun.candidate}
	} else if request.Spec.Layers, err = c.resolveLayers(ctx, req, request); err != nil {
		return nil, err
	}
	return c.createOnFirst(ctx, candidates, req, request)
}

// resolveLayers returns the layers of a request with digests for tags.
func (c *Central) resolveLayers(
	ctx context.Context, req *csi.CreateVolumeRequest, request volume.CreateRequest,
) ([]reference.Reference, error) {
	layers := request.Spec.Layers
	if parameters := req.GetParameters(); parameters[spec.KeyLayersFrom] == spec.LayersFromClaim {
		var err error
		if layers, err = c.claimLayers.read(ctx, parameters[keyClaimNamespace], parameters[keyClaimName]); err != nil {
			return nil, err
		}
	}
	return c.Tags.ResolveTags(ctx, layers, req.GetSecrets(), request.Namespace)
}

// candidate is a node that a volume may be on.
type candidate struct {
	segment string
	object  *overlaynode.OverlayNode
}

// candidates returns the nodes that meet a topology requirement and have a driver, in the order of preference.
func (c *Central) candidates(requirement *csi.TopologyRequirement) []candidate {
	var found []candidate
	seen := map[string]bool{}
	for _, topology := range slices.Concat(requirement.GetPreferred(), requirement.GetRequisite()) {
		segment := topology.GetSegments()[c.segment]
		if segment == "" || seen[segment] {
			continue
		}
		seen[segment] = true
		if object, err := c.node(segment); err == nil {
			found = append(found, candidate{segment, object})
		}
	}
	return found
}

// node returns the object of the node with a topology segment.
func (c *Central) node(segment string) (*overlaynode.OverlayNode, error) {
	object, err := c.Nodes.Get(segment)
	if err == nil || !digestSegment.MatchString(segment) {
		return object, err
	}
	for _, object := range c.Nodes.All() {
		if segmentOf(object.Spec.Node) == segment {
			return object, nil
		}
	}
	return nil, err
}

// begun is a creation that an earlier request has begun.
type begun struct {
	candidate
	layers []reference.Reference
}

// findBegun returns the creation of a volume that an earlier request of that name has begun on one of the nodes, nil if there is none. It
// goes on there, and with the layers that the tags meant then.
func (c *Central) findBegun(name string, candidates []candidate) *begun {
	for _, candidate := range candidates {
		handle := centralHandle(name, candidate.segment)
		earlier, requested := candidate.object.Spec.Requests[handle]
		result := candidate.object.Status.Results[handle]
		if !requested || earlier.Method != methodCreate || result.ID == earlier.ID && result.Code != 0 {
			continue
		}
		request := &csi.CreateVolumeRequest{}
		if protojson.Unmarshal(earlier.Body, request) != nil {
			continue
		}
		if layers, err := reference.ParseList(request.GetParameters()[spec.KeyLayers]); err == nil {
			return &begun{candidate, layers}
		}
	}
	return nil
}

// createOnFirst has the first node that has room create the volume.
func (c *Central) createOnFirst(
	ctx context.Context, candidates []candidate, req *csi.CreateVolumeRequest, request volume.CreateRequest,
) (*csi.CreateVolumeResponse, error) {
	err := fmt.Errorf("%w: the accessibility requirements include no node that has the driver and %d bytes for volumes",
		errdefs.ErrResourceExhausted, request.Spec.Size)
	tried := 0
	for _, candidate := range candidates {
		if len(candidates) > 1 && candidate.object.Status.CapacityBytes < request.Spec.Size {
			continue
		}
		if tried++; tried > maxNodesTried {
			break
		}
		var response *csi.CreateVolumeResponse
		if response, err = c.createOn(ctx, candidate, req, request); !isResourceExhausted(err) {
			return response, err
		}
	}
	return nil, err
}

// createOn has a node create the volume. What it answers is believed as far as the size goes.
func (c *Central) createOn(
	ctx context.Context, on candidate, req *csi.CreateVolumeRequest, request volume.CreateRequest,
) (*csi.CreateVolumeResponse, error) {
	handle := centralHandle(req.GetName(), on.segment)
	topology := &csi.Topology{Segments: map[string]string{c.segment: on.segment}}
	parameters := userKeys(req.GetParameters())
	delete(parameters, spec.KeyLayersFrom)
	parameters[spec.KeyLayers] = strings.Join(request.Spec.LayerNames(), "\n")
	answer := &csi.CreateVolumeResponse{}
	ctx, cancel := beforeDeadline(ctx)
	defer cancel()
	err := forward(ctx, c.Nodes, on.object.Spec.Node, handle, methodCreate, &csi.CreateVolumeRequest{
		Name: handle, CapacityRange: req.GetCapacityRange(), VolumeCapabilities: req.GetVolumeCapabilities(), Parameters: parameters,
		AccessibilityRequirements: &csi.TopologyRequirement{Requisite: []*csi.Topology{topology}},
	}, answer)
	if err != nil {
		return nil, err
	}
	size := answer.GetVolume().GetCapacityBytes()
	if size < request.Required || request.Limit > 0 && size > request.Limit {
		return nil, fmt.Errorf("%w: node %s made a volume of %d bytes, and the request is for %d to %d",
			errdefs.ErrInternal, on.object.Spec.Node, size, request.Required, request.Limit)
	}
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId: handle, CapacityBytes: size, VolumeContext: request.Spec.Parameters(), AccessibleTopology: []*csi.Topology{topology},
	}}, nil
}

// DeleteVolume has the node of the volume delete it. Where that node is gone for good, it answers OK with an event. The request stays, and
// the node deletes the volume if it comes back.
func (c *Central) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	handle := req.GetVolumeId()
	if err := record.CheckID(handle); err != nil {
		return nil, err
	}
	segments, err := c.segmentsOf(ctx, handle)
	if err != nil {
		return nil, err
	}
	if err := c.Nodes.Await(ctx); err != nil {
		return nil, err
	}
	for _, segment := range segments {
		object, err := c.node(segment)
		if errdefs.IsNotFound(err) {
			// Whether the node is gone is noted in its object.
			err = errors.Join(fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err), c.Gone.Ensure(ctx, segment))
		}
		if err != nil {
			return nil, err
		}
		if err := c.deleteOn(ctx, object, handle); err != nil {
			return nil, err
		}
	}
	return &csi.DeleteVolumeResponse{}, nil
}

func (c *Central) deleteOn(ctx context.Context, object *overlaynode.OverlayNode, handle string) error {
	limited, cancel := beforeDeadline(ctx)
	if object.Spec.NodeGoneSince != nil {
		cancel()
		limited, cancel = context.WithTimeout(ctx, goneWait)
	}
	defer cancel()
	request, response := &csi.DeleteVolumeRequest{VolumeId: handle}, &csi.DeleteVolumeResponse{}
	err := forward(limited, c.Nodes, object.Spec.Node, handle, methodDelete, request, response)
	if !errdefs.IsUnavailable(err) {
		return err
	}
	gone, checkErr := c.Gone.Check(ctx, object)
	if checkErr != nil || !gone {
		return errors.Join(err, checkErr)
	}
	klog.FromContext(ctx).Info("Volume given up, its node is gone", logVolume, handle, logNode, object.Spec.Node)
	c.Events.Eventf(&corev1.ObjectReference{
		APIVersion: overlaynode.APIVersion, Kind: overlaynode.Kind, Namespace: object.Namespace, Name: object.Name, UID: object.UID,
	}, corev1.EventTypeWarning, "VolumeGivenUp",
		"Node %s is gone: volume %s counts as deleted. If the node comes back, its driver deletes what is left of it", object.Spec.Node, handle)
	return nil
}

// segmentsOf returns the topology segments of the nodes that a volume is on. A handle from before there was a central controller does not
// say it, and its PersistentVolume does.
func (c *Central) segmentsOf(ctx context.Context, handle string) ([]string, error) {
	if _, segment, ok := strings.Cut(handle, handleSeparator); ok {
		return []string{segment}, nil
	}
	return c.Cluster.VolumeTopology(ctx, c.DriverName, handle, c.segment)
}

// ValidateVolumeCapabilities has the node of the volume compare the capabilities with its record.
func (c *Central) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest,
) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	handle := req.GetVolumeId()
	if err := record.CheckID(handle); err != nil {
		return nil, err
	}
	segments, err := c.segmentsOf(ctx, handle)
	if err != nil {
		return nil, err
	}
	if len(segments) != 1 {
		return nil, fmt.Errorf("%w: no node has a volume %s", errdefs.ErrNotFound, handle)
	}
	if err := c.Nodes.Await(ctx); err != nil {
		return nil, err
	}
	object, err := c.node(segments[0])
	if err != nil {
		return nil, err
	}
	if earlier := object.Spec.Requests[handle]; earlier.ID != "" && object.Status.Results[handle].ID != earlier.ID {
		return nil, fmt.Errorf("%w: volume %s is being created or deleted", errdefs.ErrAborted, handle)
	}
	response := &csi.ValidateVolumeCapabilitiesResponse{}
	return response, forward(ctx, c.Nodes, object.Spec.Node, handle, methodValidate, &csi.ValidateVolumeCapabilitiesRequest{
		VolumeId: handle, VolumeContext: req.GetVolumeContext(), VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters: req.GetParameters(),
	}, response)
}

// GetCapacity returns what the nodes of a topology reported that they can reserve, of all nodes without one.
func (c *Central) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if err := c.Nodes.Await(ctx); err != nil {
		return nil, err
	}
	response := &csi.GetCapacityResponse{MinimumVolumeSize: wrapperspb.Int64(spec.MinPersistentSize)}
	if segment := req.GetAccessibleTopology().GetSegments()[c.segment]; segment != "" {
		if object, err := c.node(segment); err == nil {
			response.AvailableCapacity = object.Status.CapacityBytes
		}
		return response, nil
	}
	for _, object := range c.Nodes.All() {
		response.AvailableCapacity += object.Status.CapacityBytes
	}
	return response, nil
}

// ControllerGetCapabilities returns the capabilities of the service.
func (c *Central) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest,
) (*csi.ControllerGetCapabilitiesResponse, error) {
	return controllerCapabilities(
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	), nil
}

// handleSeparator is between the name of a volume and the topology segment of its node, in the handle of a volume that a central
// controller created.
const handleSeparator = "@"

// centralHandle returns the handle of the volume of that name on the node with a topology segment.
func centralHandle(name, segment string) string {
	handle := name + handleSeparator + segment
	if record.CheckID(handle) == nil && !strings.Contains(name, handleSeparator) {
		return handle
	}
	return digestName(name) + handleSeparator + segment
}

// nodelessHandle returns the handle of the volume of that name that is on no node.
func nodelessHandle(name string) string {
	if strings.Contains(name, handleSeparator) {
		return digestName(name)
	}
	return volume.HandleFor(name)
}

func digestName(name string) string {
	sum := sha256.Sum256([]byte(name))
	return "sha256-" + hex.EncodeToString(sum[:20])
}

// beforeDeadline returns a context that ends answerBefore earlier.
func beforeDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, deadline.Add(-answerBefore))
}
