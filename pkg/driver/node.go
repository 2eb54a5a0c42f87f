package driver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// publisher is the part of volume.Manager that the node service calls.
type publisher interface {
	Publish(ctx context.Context, req volume.PublishRequest) error
	Unpublish(ctx context.Context, id, target string) error
	Stats(ctx context.Context, id, path string) (volume.Stats, error)
	Expand(ctx context.Context, id, path string, required, limit int64) (int64, error)
	Health(ctx context.Context, id, target string) ([]volume.Condition, error)
	StorageHealth(ctx context.Context) ([]volume.Condition, error)
}

// Node is the CSI Node service (CSI spec, "Node Service RPC").
type Node struct {
	csi.UnimplementedNodeServer
	volumes             publisher
	nodeID              string
	topology            *csi.Topology
	allowedMountOptions []string
	health              bool
	registered          func() error
}

// NodeConfig is what a [Node] consists of.
type NodeConfig struct {
	DriverName string
	NodeID     string
	Volumes    publisher
	// AllowedMountOptions are the mount options that volumes may use although they are not safe.
	AllowedMountOptions []string
	// Health enables the health RPCs.
	Health bool
	// Registered returns an error that says why kubelet does not have the driver, nil if it does.
	Registered func() error
}

// NewNode returns the service of a node.
func NewNode(config NodeConfig) *Node {
	return &Node{
		volumes:             config.Volumes,
		nodeID:              config.NodeID,
		topology:            nodeTopology(config.DriverName, config.NodeID),
		allowedMountOptions: config.AllowedMountOptions,
		health:              config.Health,
		registered:          config.Registered,
	}
}

// NodePublishVolume mounts a view of the volume at the target path.
func (n *Node) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	request, err := publishRequest(req, n.allowedMountOptions)
	if err != nil {
		return nil, err
	}
	if err := n.volumes.Publish(ctx, request); err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// NodeUnpublishVolume unmounts the view at the target path and removes the path.
func (n *Node) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := record.CheckID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := volume.CheckTarget(req.GetTargetPath()); err != nil {
		return nil, err
	}
	if err := n.volumes.Unpublish(ctx, req.GetVolumeId(), req.GetTargetPath()); err != nil {
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetVolumeStats returns the usage of the volume's upper, in bytes and inodes.
func (n *Node) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if err := record.CheckID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetVolumePath() == "" {
		return nil, fmt.Errorf("%w: the volume path is missing", errdefs.ErrInvalidArgument)
	}
	stats, err := n.volumes.Stats(ctx, req.GetVolumeId(), req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: stats.Bytes.Total, Used: stats.Bytes.Used, Available: stats.Bytes.Available},
		{Unit: csi.VolumeUsage_INODES, Total: stats.Inodes.Total, Used: stats.Inodes.Used, Available: stats.Inodes.Available},
	}}, nil
}

// NodeExpandVolume raises the size limit of a volume. Pods may write to the volume at the same time.
func (n *Node) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	if err := record.CheckID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetVolumePath() == "" {
		return nil, fmt.Errorf("%w: the volume path is missing", errdefs.ErrInvalidArgument)
	}
	if req.GetVolumeCapability() != nil {
		if _, err := accessModeOf(req.GetVolumeCapability()); err != nil {
			return nil, err
		}
	}
	required, limit, err := capacityRange(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	size, err := n.volumes.Expand(ctx, req.GetVolumeId(), req.GetVolumePath(), required, limit)
	if err != nil {
		return nil, err
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, nil
}

// NodeGetCapabilities returns the capabilities of the service. There is no staging: NodePublishVolume mounts a view in one
// step.
func (n *Node) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	response := &csi.NodeGetCapabilitiesResponse{}
	rpcs := []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	}
	if n.health {
		rpcs = append(rpcs, csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH, csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH)
	}
	for _, rpc := range rpcs {
		response.Capabilities = append(response.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: rpc}},
		})
	}
	return response, nil
}

// NodeGetInfo returns the node's ID and its topology. Every node is a topology segment of its own.
func (n *Node) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: n.nodeID, AccessibleTopology: n.topology}, nil
}

// labelValue matches what Kubernetes accepts as a label's value. A topology segment becomes a label.
var labelValue = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)

// nodeTopology returns the topology of one node.
func nodeTopology(driverName, nodeID string) *csi.Topology {
	return &csi.Topology{Segments: map[string]string{topologyKey(driverName): segmentOf(nodeID)}}
}

// topologyKey returns the key of the topology segments of a driver. Each node is a segment of its own.
func topologyKey(driverName string) string { return driverName + "/node" }

// segmentOf returns the topology segment of a node: its ID, or the digest of that if it is not a valid label value.
func segmentOf(nodeID string) string {
	if labelValue.MatchString(nodeID) {
		return nodeID
	}
	sum := sha256.Sum256([]byte(nodeID))
	return hex.EncodeToString(sum[:20])
}

// digestSegment matches the segment of a node whose ID is not a valid label value.
var digestSegment = regexp.MustCompile(`^[0-9a-f]{40}$`)
