package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// createFromSource has the node of a snapshot or of another volume make a volume from it. The tags of the layers are not resolved: that
// was done for the source, and the node has the result. Where the layers are other ones, the node resolves them.
func (c *Central) createFromSource(
	ctx context.Context, req *csi.CreateVolumeRequest, request volume.CreateRequest,
) (*csi.CreateVolumeResponse, error) {
	var err error
	if request.Spec.Layers, err = c.requestedLayers(ctx, req, request); err != nil {
		return nil, err
	}
	if request.OnConflict, err = c.rebases.policy(ctx, req, request.OnConflict); err != nil {
		return nil, err
	}
	segment, err := c.segmentOfSource(ctx, request.Source)
	if err != nil {
		return nil, err
	}
	if !c.includes(req.GetAccessibilityRequirements(), segment) {
		return nil, elsewhere(request.Source, segment, "the claim is to be on another one")
	}
	object, err := c.nodeWith(segment, describeSource(request.Source))
	if err != nil {
		return nil, err
	}
	return c.createOn(ctx, candidate{segment, object}, req, request)
}

// segmentOfSource returns the topology segment of the node that the source of a volume is on. It returns ErrNotFound if there is none.
func (c *Central) segmentOfSource(ctx context.Context, source volume.Source) (string, error) {
	if err := c.Nodes.Await(ctx); err != nil {
		return "", err
	}
	if source.Snapshot != "" {
		if segment := segmentIn(source.Snapshot); segment != "" {
			return segment, nil
		}
		return "", fmt.Errorf("%w: no node has a snapshot %s", errdefs.ErrNotFound, source.Snapshot)
	}
	segments, err := c.segmentsOf(ctx, source.Volume)
	if err == nil && len(segments) != 1 {
		err = fmt.Errorf("%w: no node has a volume %s with an upper of its own", errdefs.ErrNotFound, source.Volume)
	}
	if err != nil {
		return "", err
	}
	return segments[0], nil
}

// includes reports whether a topology requirement includes the node with a segment.
func (c *Central) includes(requirement *csi.TopologyRequirement, segment string) bool {
	requisite := requirement.GetRequisite()
	for _, topology := range requisite {
		if required, ok := topology.GetSegments()[c.topologyKey]; !ok || required == segment {
			return true
		}
	}
	return len(requisite) == 0
}

// topology returns that of the node with a segment.
func (c *Central) topology(segment string) *csi.Topology {
	return &csi.Topology{Segments: map[string]string{c.topologyKey: segment}}
}

// layersOfAnswer returns the layers that a node says a volume has. Those of a volume with a source are the ones of the request, with the
// digests that the source has for their tags. A request without any leaves them to the source.
func layersOfAnswer(text string, request volume.CreateRequest) ([]reference.Reference, error) {
	made, err := reference.ParseList(text)
	requested := request.Spec.Layers
	isOnNode := request.Source != (volume.Source{}) && !isPortable(request.Source)
	if err != nil || isOnNode && len(requested) > 0 && !reference.AreResolved(requested, made) {
		return nil, fmt.Errorf("%w: the volume was made with other layers than the claim has", errdefs.ErrInternal)
	}
	return made, nil
}
