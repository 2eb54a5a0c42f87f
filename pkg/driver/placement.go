package driver

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// maxNodesTried is how many nodes a request may be given to, one after the other, while none has room for the volume.
const maxNodesTried = 3

// candidate is a node that a volume may be on.
type candidate struct {
	segment string
	object  *overlaynode.OverlayNode
}

// candidates returns the nodes that meet a topology requirement and have a driver, in the order of preference. Those whose drivers do not
// seem to run are the last.
func (c *Central) candidates(requirement *csi.TopologyRequirement) []candidate {
	var found, silent []candidate
	seen := map[string]bool{}
	for _, topology := range slices.Concat(requirement.GetPreferred(), requirement.GetRequisite()) {
		segment := topology.GetSegments()[c.topologyKey]
		if segment == "" || seen[segment] {
			continue
		}
		seen[segment] = true
		object, err := c.node(segment)
		switch {
		case err != nil:
		case object.IsSilent():
			silent = append(silent, candidate{segment, object})
		default:
			found = append(found, candidate{segment, object})
		}
	}
	return append(found, silent...)
}

// node returns the object of the node with a topology segment.
func (c *Central) node(segment string) (*overlaynode.OverlayNode, error) {
	object, err := c.Nodes.Get(segment)
	if err == nil || !digestSegment.MatchString(segment) {
		return object, err
	}
	for _, object := range c.Nodes.All() {
		if segmentOf(object.Spec.Node) == segment {
			return c.Nodes.Get(object.Spec.Node)
		}
	}
	return nil, err
}

// begun is a creation that an earlier request has begun.
type begun struct {
	candidate
	layers layers
}

// findBegun returns the creation of a volume that an earlier request of that name has begun on one of the nodes, nil if there is none. It
// goes on there, and with the layers that the tags meant then. One that expired without an answer does not go on: the volume can be made
// elsewhere. The nodes of these are returned too, since they may have made it.
func (c *Central) findBegun(name string, candidates []candidate) (found *begun, expired []candidate) {
	for _, candidate := range candidates {
		handle := handleOn(name, candidate.segment)
		earlier, asked := candidate.object.Spec.Requests[handle]
		result, answered := candidate.object.Answer(handle)
		if !asked || earlier.Method != methodCreate || answered && result.Code != 0 {
			continue
		}
		if !answered && earlier.IsExpired() {
			expired = append(expired, candidate)
			continue
		}
		request := &csi.CreateVolumeRequest{}
		if found != nil || unmarshal(earlier.Body, request) != nil {
			continue
		}
		parameters := request.GetParameters()
		requested, err := reference.ParseList(parameters[spec.KeyLayers])
		resolved, resolvedErr := reference.ParseList(cmp.Or(parameters[keyResolved], parameters[spec.KeyLayers]))
		if err == nil && resolvedErr == nil {
			found = &begun{candidate, layers{requested, resolved}}
		}
	}
	return found, expired
}

// takeBack has the nodes on which the creation of a volume expired delete what they may have made, unless the volume is to be on the node
// after all. What a node has made, and could not say, nobody else would find.
func (c *Central) takeBack(ctx context.Context, name string, expired, candidates []candidate) error {
	for _, left := range expired {
		if len(candidates) == 1 && candidates[0].segment == left.segment {
			continue
		}
		handle := handleOn(name, left.segment)
		used, err := c.Cluster.VolumeTopology(ctx, c.DriverName, handle, c.topologyKey)
		if err != nil {
			return err
		}
		if len(used) > 0 {
			return fmt.Errorf("%w: a PersistentVolume has volume %s", errdefs.ErrAborted, handle)
		}
		if err := c.deleteLater(ctx, left.object, handle); err != nil {
			return err
		}
	}
	return nil
}

// deleteLater has a node that does not answer delete a volume when it does.
func (c *Central) deleteLater(ctx context.Context, object *overlaynode.OverlayNode, handle string) error {
	ctx, cancel := context.WithTimeout(ctx, silentWait)
	defer cancel()
	err := forward(ctx, c.Nodes, object.Spec.Node, handle, methodDelete,
		&csi.DeleteVolumeRequest{VolumeId: handle}, &csi.DeleteVolumeResponse{})
	if errors.Is(err, overlaynode.ErrUnanswered) {
		err = c.Nodes.Keep(ctx, object.Spec.Node, handle)
	}
	return err
}

// createOnFirst has the first node that has room create the volume.
func (c *Central) createOnFirst(
	ctx context.Context, candidates []candidate, req *csi.CreateVolumeRequest, request volume.CreateRequest,
) (*csi.CreateVolumeResponse, error) {
	err := fmt.Errorf("%w: the accessibility requirements include no node that has the driver and %d bytes for volumes; see what nodes have "+
		"reported: kubectl get overlaynodes --all-namespaces",
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

// segmentsOf returns the topology segments of the nodes that a volume is on. A handle that no central controller made does not say it,
// and its PersistentVolume does.
func (c *Central) segmentsOf(ctx context.Context, handle string) ([]string, error) {
	if err := record.CheckID(handle); err != nil {
		return nil, err
	}
	if err := c.Nodes.Await(ctx); err != nil {
		return nil, err
	}
	segment := segmentIn(handle)
	if segment != "" {
		if _, err := c.node(segment); err == nil {
			return []string{segment}, nil
		}
	}
	segments, err := c.Cluster.VolumeTopology(ctx, c.DriverName, handle, c.topologyKey)
	if err == nil && segment != "" && len(segments) == 0 {
		segments = []string{segment}
	}
	return segments, err
}

// handleSeparator is between the name and the topology segment of the node, in the handle of a snapshot and of a volume that a central
// controller created.
const handleSeparator = "@"

// handleOn returns the handle of the volume or snapshot of that name on the node with a topology segment.
func handleOn(name, segment string) string {
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
