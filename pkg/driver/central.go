package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
	"github.com/overlay-csi/overlay-csi/pkg/rebase"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

const (
	// answerBefore is the time between the answer to an RPC and its deadline, for what follows when a node does not answer.
	answerBefore = 5 * time.Second
	// maxPatient is how many RPCs at a time wait to their ends for nodes that do not seem to answer. Others wait silentWait: their requests
	// stay in the node's object, and the threads of the provisioner are for the volumes of other nodes too.
	maxPatient = 50
	silentWait = 2 * time.Second
	// deletedAgain is after how long a volume that was deleted is looked for again.
	deletedAgain = time.Minute
)

// nodes has the drivers of the nodes. It is an overlaynode.Dispatcher.
type nodes interface {
	Await(ctx context.Context) error
	Get(node string) (*overlaynode.OverlayNode, error)
	All() []*overlaynode.OverlayNode
	Call(ctx context.Context, node, handle, method string, body []byte) (overlaynode.Result, error)
	Keep(ctx context.Context, node, handle string) error
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
	Portable   portables
	Events     events
}

// Central is the CSI Controller service (CSI spec, "Controller Service RPC") for all nodes. The drivers of the nodes carry out its
// requests, and store what is to be stored. Several may be active at the same time.
type Central struct {
	csi.UnimplementedControllerServer
	CentralConfig
	claimLayers claimLayers
	rebases     rebases
	topologyKey string
	patient     *semaphore.Weighted
}

// NewCentral returns the service.
func NewCentral(config CentralConfig) *Central {
	return &Central{
		CentralConfig: config,
		claimLayers:   newClaimLayers(config.Cluster, config.DriverName),
		rebases:       rebases{config.Cluster, config.Events, config.DriverName + "/" + spec.KeyOnConflict},
		topologyKey:   topologyKey(config.DriverName),
		patient:       semaphore.NewWeighted(maxPatient),
	}
}

// CreateVolume has the node that the topology asks for create the volume, or the node of the content that it is to have. A volume
// without a persistent upper is on no node, and needs no more than an answer.
func (c *Central) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	request, err := createRequest(req)
	if err != nil {
		return nil, err
	}
	if request.Source != (volume.Source{}) && !isPortable(request.Source) {
		return c.createFromSource(ctx, req, request)
	}
	if !request.Spec.Persistent() {
		layers, err := c.resolveLayers(ctx, req, request)
		if err != nil {
			return nil, err
		}
		request.Spec.Layers = layers.resolved
		return &csi.CreateVolumeResponse{Volume: &csi.Volume{
			VolumeId: nodelessHandle(req.GetName()), CapacityBytes: max(request.Spec.Size, request.Required),
			VolumeContext: request.Spec.Parameters(),
		}}, nil
	}
	if err := c.Nodes.Await(ctx); err != nil {
		return nil, err
	}
	candidates := c.candidates(req.GetAccessibilityRequirements())
	var layers layers
	if isPortable(request.Source) {
		if req, layers, err = c.readPortable(ctx, req, &request); err != nil {
			return nil, err
		}
	}
	begun, expired := c.findBegun(req.GetName(), candidates)
	if begun != nil {
		layers, candidates = begun.layers, []candidate{begun.candidate}
	} else if !isPortable(request.Source) {
		if layers, err = c.resolveLayers(ctx, req, request); err != nil {
			return nil, err
		}
	}
	request.Spec.Layers, request.Resolved = layers.requested, layers.resolved
	if err := c.takeBack(ctx, req.GetName(), expired, candidates); err != nil {
		return nil, err
	}
	return c.createOnFirst(ctx, candidates, req, request)
}

// layers are the layers of a request as requested, and with digests for tags.
type layers struct{ requested, resolved []reference.Reference }

// requestedLayers returns the layers of a request: those of the claim if it is to name them.
func (c *Central) requestedLayers(
	ctx context.Context, req *csi.CreateVolumeRequest, request volume.CreateRequest,
) ([]reference.Reference, error) {
	if req.GetParameters()[spec.KeyLayersFrom] == spec.LayersFromClaim {
		return c.claimLayers.readOf(ctx, req)
	}
	return request.Spec.Layers, nil
}

func (c *Central) resolveLayers(ctx context.Context, req *csi.CreateVolumeRequest, request volume.CreateRequest) (layers, error) {
	requested, err := c.requestedLayers(ctx, req, request)
	if err != nil {
		return layers{}, err
	}
	resolved, err := c.Tags.ResolveTags(ctx, requested, req.GetSecrets(), request.Namespace)
	return layers{requested, resolved}, err
}

// createOn has a node create the volume. Of what it answers, the size is believed within the limits, and the layers: they are mounted on
// that node alone.
func (c *Central) createOn(
	ctx context.Context, on candidate, req *csi.CreateVolumeRequest, request volume.CreateRequest,
) (*csi.CreateVolumeResponse, error) {
	handle := handleOn(req.GetName(), on.segment)
	topology := c.topology(on.segment)
	parameters := userKeys(req.GetParameters())
	if len(request.Spec.Layers) > 0 {
		parameters[spec.KeyLayers] = strings.Join(request.Spec.LayerNames(), "\n")
	}
	if request.OnConflict != rebase.Fail {
		parameters[spec.KeyOnConflict] = string(request.OnConflict)
	}
	created, isOnNode := request.Spec, request.Source != (volume.Source{}) && !isPortable(request.Source)
	if !isOnNode {
		created.Layers = request.Resolved
	}
	if resolved := strings.Join(created.LayerNames(), "\n"); resolved != parameters[spec.KeyLayers] {
		parameters[keyResolved] = resolved
	}
	answer := &csi.CreateVolumeResponse{}
	limited, cancel := c.patience(ctx, on.object)
	defer cancel()
	err := forward(limited, c.Nodes, on.object.Spec.Node, handle, methodCreate, &csi.CreateVolumeRequest{
		Name: handle, CapacityRange: req.GetCapacityRange(), VolumeCapabilities: req.GetVolumeCapabilities(), Parameters: parameters,
		AccessibilityRequirements: &csi.TopologyRequirement{Requisite: []*csi.Topology{topology}},
		VolumeContentSource:       req.GetVolumeContentSource(),
	}, answer)
	if isOnNode {
		err = c.unlessLost(ctx, on.object, err)
	} else {
		err = c.unlessGone(ctx, on.object, handle, err)
	}
	if err != nil {
		return nil, err
	}
	if made, ok := answer.GetVolume().GetVolumeContext()[spec.KeyLayers]; ok {
		// An earlier request made the volume, when the tags had another meaning, or its source has the digests.
		if created.Layers, err = layersOfAnswer(made, request); err != nil {
			return nil, fmt.Errorf("the answer of node %s: %w", on.object.Spec.Node, err)
		}
	}
	if message, ok := answer.GetVolume().GetVolumeContext()[keyRebased]; ok {
		c.rebases.report(ctx, req, message)
	}
	size := answer.GetVolume().GetCapacityBytes()
	if size < request.Required || request.Limit > 0 && size > request.Limit {
		return nil, fmt.Errorf("%w: node %s made a volume of %d bytes, and the request is for %d to %d",
			errdefs.ErrInternal, on.object.Spec.Node, size, request.Required, request.Limit)
	}
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId: handle, CapacityBytes: size, VolumeContext: created.Parameters(), AccessibleTopology: []*csi.Topology{topology},
		ContentSource: req.GetVolumeContentSource(),
	}}, nil
}

// unlessGone returns the error of a creation. Where the node is gone for good it is ErrResourceExhausted, so that the volume is made on
// another one. The node has it deleted if it comes back: it may have made it, and not answered.
func (c *Central) unlessGone(ctx context.Context, object *overlaynode.OverlayNode, handle string, err error) error {
	if !errors.Is(err, overlaynode.ErrUnanswered) {
		return err
	}
	gone, checkErr := c.Gone.Check(ctx, object)
	if checkErr == nil && gone {
		if err := c.deleteLater(ctx, object, handle); err != nil {
			return err
		}
		return fmt.Errorf("%w: node %s is gone; the volume has to be made on another one", errdefs.ErrResourceExhausted, object.Spec.Node)
	}
	return errors.Join(err, checkErr)
}

// DeleteVolume has the node of the volume delete it. Where that node is gone for good, it answers OK with an event. The request stays, and
// the node deletes the volume if it comes back.
func (c *Central) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	handle := req.GetVolumeId()
	segments, err := c.segmentsOf(ctx, handle)
	if err != nil {
		return nil, err
	}
	response := &csi.DeleteVolumeResponse{}
	name, _, _ := strings.Cut(handle, handleSeparator)
	for _, segment := range segments {
		err := c.deleteOn(ctx, segment, deletion{
			what: "volume " + handle, key: handle, method: methodDelete,
			request: &csi.DeleteVolumeRequest{VolumeId: handle}, response: response, log: []any{logVolume, handle},
			reason: "VolumeGivenUp", object: &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolume", Name: name},
		})
		if err != nil {
			return nil, err
		}
	}
	return response, nil
}

// deletion is what a node deletes: a volume or a snapshot.
type deletion struct {
	what              string
	key, method       string
	request, response proto.Message
	log               []any
	// reason and object are those of the event about a deletion that a node is too gone for. Without an object there is none.
	reason string
	object *corev1.ObjectReference
}

// deleteOn has the node with a topology segment delete something.
func (c *Central) deleteOn(ctx context.Context, segment string, d deletion) error {
	object, err := c.node(segment)
	if errdefs.IsNotFound(err) {
		err = fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
		if !digestSegment.MatchString(segment) {
			// Whether the node is gone is noted in its object.
			err = errors.Join(err, c.Gone.Ensure(ctx, segment))
		}
	}
	if err != nil {
		return err
	}
	if isDeleted(object, d) {
		return nil
	}
	limited, cancel := c.patience(ctx, object)
	defer cancel()
	err = forward(limited, c.Nodes, object.Spec.Node, d.key, d.method, d.request, d.response)
	if !errors.Is(err, overlaynode.ErrUnanswered) {
		return err
	}
	gone, checkErr := c.Gone.Check(ctx, object)
	if checkErr != nil || !gone {
		return errors.Join(err, checkErr)
	}
	if err := c.Nodes.Keep(ctx, object.Spec.Node, d.key); err != nil {
		return err
	}
	klog.FromContext(ctx).Info("Given up, its node is gone", append(d.log, logNode, object.Spec.Node)...)
	if d.object == nil {
		return nil
	}
	c.Events.Eventf(d.object, corev1.EventTypeWarning, d.reason,
		"Node %s is gone: %s counts as deleted. If the node comes back, its driver deletes what is left of it", object.Spec.Node, d.what)
	return nil
}

// isDeleted reports whether the node has deleted something a moment ago, and nothing was asked about it since: external-provisioner deletes
// many volumes twice.
func isDeleted(object *overlaynode.OverlayNode, d deletion) bool {
	request := object.Spec.Requests[d.key]
	result, answered := object.Answer(d.key)
	return answered && result.Code == 0 && request.Method == d.method && time.Since(request.PostedAt.Time) < deletedAgain
}

// patience returns a context for a request to a node, and a function to call when it ended. It leaves time for what follows if the node
// does not answer.
func (c *Central) patience(ctx context.Context, object *overlaynode.OverlayNode) (context.Context, context.CancelFunc) {
	release := func() {}
	if object.IsSilent() {
		if !c.patient.TryAcquire(1) {
			return context.WithTimeout(ctx, silentWait)
		}
		release = func() { c.patient.Release(1) }
	}
	cancel := func() {}
	if deadline, ok := ctx.Deadline(); ok {
		ctx, cancel = context.WithDeadline(ctx, deadline.Add(-min(answerBefore, time.Until(deadline)/10)))
	}
	return ctx, func() { cancel(); release() }
}

// ValidateVolumeCapabilities has the node of the volume compare the capabilities with its record.
func (c *Central) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest,
) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	handle := req.GetVolumeId()
	segments, err := c.segmentsOf(ctx, handle)
	if err != nil {
		return nil, err
	}
	if len(segments) != 1 {
		return nil, fmt.Errorf("%w: no node has a volume %s", errdefs.ErrNotFound, handle)
	}
	object, err := c.node(segments[0])
	if err != nil {
		return nil, err
	}
	_, requested := object.Spec.Requests[handle]
	if _, answered := object.Answer(handle); requested && !answered {
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
	if segment := req.GetAccessibleTopology().GetSegments()[c.topologyKey]; segment != "" {
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
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
	), nil
}
