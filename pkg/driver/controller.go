package driver

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
	"github.com/overlay-csi/overlay-csi/pkg/rebase"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// provisioner is the part of volume.Manager that the controller service calls.
type provisioner interface {
	Create(ctx context.Context, req volume.CreateRequest) (volume.Volume, error)
	Delete(ctx context.Context, id string) error
	Get(id string) (volume.Volume, error)
	List(after string, limit int) (volumes []volume.Volume, more bool, err error)
	Capacity(ctx context.Context) (int64, error)
	Health(ctx context.Context, id, target string) ([]volume.Condition, error)
}

// Controller is the CSI Controller service (CSI spec, "Controller Service RPC"). It runs on every node, for
// external-provisioner's --node-deployment, and creates volumes on that node alone.
type Controller struct {
	csi.UnimplementedControllerServer
	driverName  string
	volumes     provisioner
	snapshots   snapshotter
	cluster     cluster
	claimLayers claimLayers
	rebases     rebases
	segment     string
	topology    *csi.Topology
	key         *overlaynode.Key
	health      bool
}

// ControllerConfig is what a [Controller] consists of.
type ControllerConfig struct {
	DriverName string
	NodeID     string
	Volumes    provisioner
	Snapshots  snapshotter
	Cluster    cluster
	// Key opens the secrets in the requests of a central controller. It may be nil if there is none.
	Key *overlaynode.Key
	// Events may be nil: there is no API server then.
	Events events
	// Health enables the health RPCs.
	Health bool
}

// NewController returns the service of a node.
func NewController(config ControllerConfig) *Controller {
	return &Controller{
		driverName:  config.DriverName,
		volumes:     config.Volumes,
		snapshots:   config.Snapshots,
		cluster:     config.Cluster,
		claimLayers: newClaimLayers(config.Cluster, config.DriverName),
		rebases:     rebases{config.Cluster, config.Events, config.DriverName + "/" + spec.KeyOnConflict},
		segment:     segmentOf(config.NodeID),
		topology:    nodeTopology(config.DriverName, config.NodeID),
		key:         config.Key,
		health:      config.Health,
	}
}

// CreateVolume creates a volume on this node, an empty one or one with the content of a snapshot or volume of this node.
func (c *Controller) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	request, err := createRequest(req)
	if err != nil {
		return nil, err
	}
	if req.GetParameters()[spec.KeyLayersFrom] == spec.LayersFromClaim {
		request.ClaimLayers = func(ctx context.Context) ([]reference.Reference, error) {
			return c.claimLayers.readOf(ctx, req)
		}
	}
	if request.OnConflict, err = c.rebases.policy(ctx, req, request.OnConflict); err != nil {
		return nil, err
	}
	answer, report, err := c.create(ctx, req, request)
	if report != nil && report.Conflicts > 0 {
		c.rebases.report(ctx, req, rebaseMessage(report))
	}
	return answer, err
}

func (c *Controller) create(
	ctx context.Context, req *csi.CreateVolumeRequest, request volume.CreateRequest,
) (*csi.CreateVolumeResponse, *rebase.Report, error) {
	if request.Spec.Upper == spec.UpperClaim && !c.servesTopology(req.GetAccessibilityRequirements()) {
		return nil, nil, fmt.Errorf("%w: the accessibility requirements do not include this node (%v)",
			errdefs.ErrResourceExhausted, c.topology.GetSegments())
	}
	created, err := c.volumes.Create(ctx, request)
	if errdefs.IsNotFound(err) && request.Source != (volume.Source{}) {
		err = c.unlessElsewhere(ctx, request.Source, err)
	}
	if err != nil {
		return nil, nil, err
	}
	answer := c.toCSIVolume(created)
	answer.ContentSource = req.GetVolumeContentSource()
	return &csi.CreateVolumeResponse{Volume: answer}, created.Rebased, nil
}

// servesTopology reports whether this node meets a volume's topology requirement.
func (c *Controller) servesTopology(requirement *csi.TopologyRequirement) bool {
	requisite := requirement.GetRequisite()
	return len(requisite) == 0 || slices.ContainsFunc(requisite, c.matchesNode)
}

// matchesNode reports whether a topology includes this node. It ignores segments that the driver did not define.
func (c *Controller) matchesNode(topology *csi.Topology) bool {
	for key, value := range c.topology.GetSegments() {
		if required, ok := topology.GetSegments()[key]; ok && required != value {
			return false
		}
	}
	return true
}

// toCSIVolume converts a volume into its CSI form.
func (c *Controller) toCSIVolume(v volume.Volume) *csi.Volume {
	converted := &csi.Volume{VolumeId: v.ID, CapacityBytes: v.Capacity, VolumeContext: v.Spec.Parameters()}
	if v.OnThisNode {
		converted.AccessibleTopology = []*csi.Topology{c.topology}
	}
	return converted
}

// DeleteVolume deletes a volume and the data written to it.
func (c *Controller) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if err := record.CheckID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := c.volumes.Delete(ctx, req.GetVolumeId()); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// ValidateVolumeCapabilities reports whether a volume supports the requested capabilities.
func (c *Controller) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest,
) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := record.CheckID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, fmt.Errorf("%w: the volume capabilities are missing", errdefs.ErrInvalidArgument)
	}
	v, err := c.volumes.Get(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if _, _, err := parseCapabilities(v.Spec.Parameters(), spec.Scope{}, req.GetVolumeCapabilities()); err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	if given := userKeys(req.GetVolumeContext()); len(given) > 0 && !maps.Equal(given, v.Spec.Parameters()) {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: "the volume context differs from the volume's"}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext:      req.GetVolumeContext(),
		VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters:         req.GetParameters(),
	}}, nil
}

// tokenPrefix begins a pagination token. The ID of the last volume or snapshot on the page follows.
const tokenPrefix = "after:"

// pageRequest is a request for one page of a list.
type pageRequest interface {
	GetMaxEntries() int32
	GetStartingToken() string
}

// parsePage returns the ID of the volume or snapshot that the page begins after. It returns ErrAborted if the token is not one of this
// driver's.
func parsePage(req pageRequest) (after string, err error) {
	if req.GetMaxEntries() < 0 {
		return "", fmt.Errorf("%w: max_entries is %d; it must not be negative", errdefs.ErrInvalidArgument, req.GetMaxEntries())
	}
	after, isToken := strings.CutPrefix(req.GetStartingToken(), tokenPrefix)
	if req.GetStartingToken() != "" && !isToken {
		return "", badToken(req)
	}
	return after, nil
}

func badToken(req pageRequest) error {
	return fmt.Errorf("%w: starting token %q was not issued by this driver; list again from the beginning",
		errdefs.ErrAborted, req.GetStartingToken())
}

// ListVolumes lists the volumes of this node, by ID.
func (c *Controller) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	after, err := parsePage(req)
	if err != nil {
		return nil, err
	}
	volumes, more, err := c.volumes.List(after, int(req.GetMaxEntries()))
	if err != nil {
		return nil, err
	}
	response := &csi.ListVolumesResponse{}
	for _, v := range volumes {
		response.Entries = append(response.Entries, &csi.ListVolumesResponse_Entry{Volume: c.toCSIVolume(v)})
	}
	if more {
		response.NextToken = tokenPrefix + volumes[len(volumes)-1].ID
	}
	return response, nil
}

// GetCapacity returns how many bytes this node can still reserve for uppers.
func (c *Controller) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if topology := req.GetAccessibleTopology(); topology != nil && !c.matchesNode(topology) {
		return &csi.GetCapacityResponse{}, nil
	}
	available, err := c.volumes.Capacity(ctx)
	if err != nil {
		return nil, err
	}
	return &csi.GetCapacityResponse{AvailableCapacity: available, MinimumVolumeSize: wrapperspb.Int64(spec.MinPersistentSize)}, nil
}

// ControllerGetCapabilities returns the capabilities of the service.
func (c *Controller) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest,
) (*csi.ControllerGetCapabilitiesResponse, error) {
	rpcs := []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
	}
	if c.health {
		rpcs = append(rpcs, csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH, csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH)
	}
	return controllerCapabilities(rpcs...), nil
}

// controllerCapabilities returns an answer with the capabilities of a controller service.
func controllerCapabilities(rpcs ...csi.ControllerServiceCapability_RPC_Type) *csi.ControllerGetCapabilitiesResponse {
	response := &csi.ControllerGetCapabilitiesResponse{}
	for _, rpc := range rpcs {
		response.Capabilities = append(response.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: rpc}},
		})
	}
	return response
}
