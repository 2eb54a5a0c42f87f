package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// severities maps the severity of a condition to its CSI error type. The health RPCs are alpha in CSI 1.13, and disabled by
// default.
var severities = map[volume.Severity]csi.VolumeHealthErrorType{
	volume.Degraded:     csi.VolumeHealthErrorType_DEGRADED,
	volume.Inaccessible: csi.VolumeHealthErrorType_INACCESSIBLE,
	volume.Lost:         csi.VolumeHealthErrorType_DATA_LOSS,
}

func volumeHealth(id string, conditions []volume.Condition) *csi.VolumeHealth {
	health := &csi.VolumeHealth{VolumeId: id}
	for _, c := range conditions {
		health.HealthStatuses = append(
			health.HealthStatuses,
			&csi.VolumeHealth_VolumeHealthEntry{Status: severities[c.Severity], Reason: c.Reason, Message: c.Message},
		)
	}
	return health
}

// NodeGetVolumeHealth reports the problems of a volume on this node (CSI spec, "NodeGetVolumeHealth").
func (n *Node) NodeGetVolumeHealth(ctx context.Context, req *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	if !n.health {
		return n.UnimplementedNodeServer.NodeGetVolumeHealth(ctx, req)
	}
	if err := record.CheckID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if path := req.GetVolumePublishPath(); path != "" {
		if err := volume.CheckTarget(path); err != nil {
			return nil, err
		}
	}
	conditions, err := n.volumes.Health(ctx, req.GetVolumeId(), req.GetVolumePublishPath())
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: volumeHealth(req.GetVolumeId(), conditions)}, nil
}

// NodeGetStorageHealth reports the problems that concern all volumes of this node, and whether kubelet has the driver (CSI spec,
// "NodeGetStorageHealth").
func (n *Node) NodeGetStorageHealth(ctx context.Context, req *csi.NodeGetStorageHealthRequest) (*csi.NodeGetStorageHealthResponse, error) {
	if !n.health {
		return n.UnimplementedNodeServer.NodeGetStorageHealth(ctx, req)
	}
	conditions, err := n.volumes.StorageHealth(ctx)
	if err != nil {
		return nil, err
	}
	response := &csi.NodeGetStorageHealthResponse{}
	for _, c := range conditions {
		status := csi.StorageHealthErrorType_STORAGE_DEGRADED
		if c.Severity == volume.Inaccessible {
			status = csi.StorageHealthErrorType_STORAGE_UNREACHABLE
		}
		response.BackendHealth = append(
			response.BackendHealth,
			&csi.NodeGetStorageHealthResponse_StorageBackendHealth{Status: status, Reason: c.Reason, Message: c.Message},
		)
	}
	if err := n.registered(); err != nil {
		// Volumes that are mounted can be used as before.
		response.BackendHealth = append(response.BackendHealth, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{
			Status: csi.StorageHealthErrorType_STORAGE_DEGRADED, Reason: "NotRegistered", Message: err.Error(),
		})
	}
	return response, nil
}

// ControllerGetVolumeHealth reports the problems of a volume whose persistent upper is on this node (CSI spec,
// "ControllerGetVolumeHealth"). Such a volume cannot be used on another node.
func (c *Controller) ControllerGetVolumeHealth(ctx context.Context, req *csi.ControllerGetVolumeHealthRequest,
) (*csi.ControllerGetVolumeHealthResponse, error) {
	if !c.health {
		return c.UnimplementedControllerServer.ControllerGetVolumeHealth(ctx, req)
	}
	if err := record.CheckID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	conditions, err := c.volumes.Health(ctx, req.GetVolumeId(), "")
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: volumeHealth(req.GetVolumeId(), conditions)}, nil
}

// ControllerListVolumeHealth lists the volumes that have problems and whose persistent upper is on this node (CSI spec,
// "ControllerListVolumeHealth").
func (c *Controller) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest,
) (*csi.ControllerListVolumeHealthResponse, error) {
	if !c.health {
		return c.UnimplementedControllerServer.ControllerListVolumeHealth(ctx, req)
	}
	after, err := parsePage(req)
	if err != nil {
		return nil, err
	}
	volumes, _, err := c.volumes.List(after, 0)
	if err != nil {
		return nil, err
	}
	conditions, err := c.healthOf(ctx, volumes)
	if err != nil {
		return nil, err
	}
	response := &csi.ControllerListVolumeHealthResponse{}
	for i, v := range volumes {
		if len(conditions[i]) == 0 {
			continue
		}
		if limit := int(req.GetMaxEntries()); limit > 0 && len(response.Entries) == limit {
			response.NextToken = tokenPrefix + response.Entries[limit-1].GetVolumeId()
			break
		}
		response.Entries = append(response.Entries, volumeHealth(v.ID, conditions[i]))
	}
	return response, nil
}

// parallelChecks is the maximum number of volumes of a list that are checked at the same time. Those on a file system that does not
// answer delay the others.
const parallelChecks = 32

// healthOf returns the conditions of each of the volumes.
func (c *Controller) healthOf(ctx context.Context, volumes []volume.Volume) ([][]volume.Condition, error) {
	conditions := make([][]volume.Condition, len(volumes))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallelChecks)
	for i, v := range volumes {
		group.Go(func() (err error) {
			conditions[i], err = c.volumes.Health(ctx, v.ID, "")
			if errdefs.IsNotFound(err) {
				// It was deleted after the list was made.
				return nil
			}
			if err != nil {
				return fmt.Errorf("check the health of volume %s: %w", v.ID, err)
			}
			return nil
		})
	}
	return conditions, group.Wait()
}
