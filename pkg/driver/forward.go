package driver

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
)

// The methods that a central controller forwards to nodes.
const (
	methodCreate   = "CreateVolume"
	methodDelete   = "DeleteVolume"
	methodValidate = "ValidateVolumeCapabilities"

	methodCreateSnapshot = "CreateSnapshot"
	methodDeleteSnapshot = "DeleteSnapshot"
	methodGetSnapshot    = "GetSnapshot"
	methodListSnapshots  = "ListSnapshots"
)

// keyResolved is a parameter of a forwarded CreateVolume: the layers with digests for tags, if there are tags. The parameter layers has
// them as requested, and layersFrom is beside it if the claim names them. Nobody else can give it: elsewhere the driver knows no such key.
const keyResolved = "resolvedLayers"

// keyRebased is in the answer to it if the volume has other layers than its source: what the controller writes into an event.
const keyRebased = "rebased"

// ForwardedTo returns a handler that hands the requests of a central controller to the controller service of this node. It logs to logger,
// and observer learns of each, as with a server.
func ForwardedTo(controller *Controller, logger klog.Logger, observer rpcObserver) overlaynode.Handler {
	return func(ctx context.Context, method string, body []byte) overlaynode.Result {
		request, call := controller.forwarded(method)
		if call == nil {
			return failed(fmt.Errorf("%w: the driver of this node is older than the controller: it does not know %s; upgrade it",
				errdefs.ErrUnavailable, method))
		}
		if err := unmarshal(string(body), request); err != nil {
			return failed(fmt.Errorf("%w: the body of %s: %w", errdefs.ErrInvalidArgument, method, err))
		}
		info := &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Controller/" + method}
		response, err := withLog(logger, observer)(ctx, request, info, func(ctx context.Context, request any) (any, error) {
			return withStatus(ctx, request, info, call)
		})
		if err != nil {
			return failed(err)
		}
		if created, ok := response.(*csi.CreateVolumeResponse); ok {
			response = briefly(request.(*csi.CreateVolumeRequest), created)
		}
		answer, err := protojson.Marshal(response.(proto.Message))
		if err != nil {
			return failed(err)
		}
		return overlaynode.Result{Body: string(answer)}
	}
}

// forwarded returns an empty request of a method, and what carries it out. Both are nil if the driver does not know the method.
func (c *Controller) forwarded(method string) (proto.Message, grpc.UnaryHandler) {
	switch method {
	case methodCreate:
		return &csi.CreateVolumeRequest{}, unary(c.createForwarded)
	case methodDelete:
		return &csi.DeleteVolumeRequest{}, unary(c.DeleteVolume)
	case methodValidate:
		return &csi.ValidateVolumeCapabilitiesRequest{}, unary(c.ValidateVolumeCapabilities)
	case methodCreateSnapshot:
		return &csi.CreateSnapshotRequest{}, unary(c.createNamedSnapshot)
	case methodDeleteSnapshot:
		return &csi.DeleteSnapshotRequest{}, unary(c.deleteForwardedSnapshot)
	case methodGetSnapshot:
		return &csi.GetSnapshotRequest{}, unary(c.GetSnapshot)
	case methodListSnapshots:
		return &csi.ListSnapshotsRequest{}, unary(c.ListSnapshots)
	}
	return nil, nil
}

// createNamedSnapshot takes a snapshot whose name is its handle: a central controller has put the node into it. The secrets of one that is
// pushed are sealed.
func (c *Controller) createNamedSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	sealed, ok := req.GetSecrets()[keySealed]
	if !ok {
		return c.createSnapshot(ctx, req, req.GetName())
	}
	if c.key == nil {
		return nil, fmt.Errorf("%w: this driver opens no secrets", errdefs.ErrFailedPrecondition)
	}
	opened, err := c.key.Open(sealPurpose(req), sealed)
	if err != nil {
		return nil, err
	}
	plain := proto.CloneOf(req)
	if err := json.Unmarshal(opened, &plain.Secrets); err != nil {
		return nil, fmt.Errorf("%w: a sealed secret is not one of a central controller", errdefs.ErrInvalidArgument)
	}
	delete(plain.GetSecrets(), keySealed)
	return c.createSnapshot(ctx, plain, plain.GetName())
}

// keySealed is the secret of a forwarded CreateSnapshot: all secrets of the request in JSON, sealed for the node.
const keySealed = "sealed"

// sealPurpose is what the secrets of a forwarded CreateSnapshot are sealed for: nothing else can be pushed with them.
func sealPurpose(req *csi.CreateSnapshotRequest) string {
	return fmt.Sprintf("%s %q of %q to %q", methodCreateSnapshot, req.GetName(), req.GetSourceVolumeId(), req.GetParameters()[keyPush])
}

// seal replaces the secrets of a CreateSnapshot by sealed ones for a node. What is in an OverlayNode can be read by others.
func seal(req *csi.CreateSnapshotRequest, secrets map[string]string, node *overlaynode.OverlayNode) error {
	if len(secrets) == 0 {
		return nil
	}
	data, err := json.Marshal(secrets)
	if err != nil {
		return err
	}
	sealed, err := node.Seal(sealPurpose(req), data)
	req.Secrets = map[string]string{keySealed: sealed}
	return err
}

// deleteForwardedSnapshot deletes a snapshot of this node. What is in a registry, a central controller deletes itself.
func (c *Controller) deleteForwardedSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if portable.IsHandle(req.GetSnapshotId()) {
		return &csi.DeleteSnapshotResponse{}, c.snapshots.DeleteUnpushed(ctx, req.GetSnapshotId())
	}
	return c.DeleteSnapshot(ctx, req)
}

// createForwarded creates a volume whose layers a central controller has read and resolved. Those of a volume with a source are resolved by
// the source, and may be missing.
func (c *Controller) createForwarded(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	plain := proto.CloneOf(req)
	delete(plain.GetParameters(), keyResolved)
	if plain.GetParameters()[spec.KeyLayers] != "" {
		delete(plain.GetParameters(), spec.KeyLayersFrom)
	}
	request, err := createRequest(plain)
	if err != nil {
		return nil, err
	}
	if request.Source == (volume.Source{}) {
		request.Resolved = request.Spec.Layers
	}
	if text, ok := req.GetParameters()[keyResolved]; ok {
		if request.Resolved, err = reference.ParseList(text); err != nil {
			return nil, fmt.Errorf("key %q: %w", keyResolved, err)
		}
	}
	if req.GetParameters()[spec.KeyLayersFrom] == spec.LayersFromClaim {
		request.ClaimLayers = func(context.Context) ([]reference.Reference, error) { return request.Spec.Layers, nil }
	}
	answer, report, err := c.create(ctx, plain, request)
	if report != nil && report.Conflicts > 0 {
		answer.Volume.VolumeContext[keyRebased] = rebaseMessage(report)
	}
	return answer, err
}

// briefly returns what a controller does not know of the answer to its request: the size, and the layers of a volume that was created
// earlier, when the tags had another meaning, or from a source.
func briefly(req *csi.CreateVolumeRequest, created *csi.CreateVolumeResponse) *csi.CreateVolumeResponse {
	answer := &csi.Volume{CapacityBytes: created.GetVolume().GetCapacityBytes()}
	parameters := req.GetParameters()
	layers, asked := created.GetVolume().GetVolumeContext()[spec.KeyLayers], cmp.Or(parameters[keyResolved], parameters[spec.KeyLayers])
	if layers != asked {
		answer.VolumeContext = map[string]string{spec.KeyLayers: layers}
	}
	if message, ok := created.GetVolume().GetVolumeContext()[keyRebased]; ok {
		if answer.VolumeContext == nil {
			answer.VolumeContext = map[string]string{}
		}
		answer.VolumeContext[keyRebased] = message
	}
	return &csi.CreateVolumeResponse{Volume: answer}
}

func unary[Q, A proto.Message](method func(context.Context, Q) (A, error)) grpc.UnaryHandler {
	return func(ctx context.Context, request any) (any, error) { return method(ctx, request.(Q)) }
}

func failed(err error) overlaynode.Result {
	s, _ := status.FromError(toStatus(err))
	return overlaynode.Result{Code: uint32(s.Code()), Message: s.Message()}
}

// isResourceExhausted reports whether an error gets the code ResourceExhausted, or is a status with it.
func isResourceExhausted(err error) bool {
	return status.Code(toStatus(err)) == codes.ResourceExhausted
}

// isNotFound reports whether an error gets the code NotFound, or is a status with it.
func isNotFound(err error) bool { return status.Code(toStatus(err)) == codes.NotFound }

// forward hands a request to the driver of a node and reads its answer into response. key is that of the request in the node's object. It
// returns the status of the node if that is not OK.
func forward(ctx context.Context, to nodes, node, key, method string, request, response proto.Message) error {
	body, err := protojson.Marshal(request)
	if err != nil {
		return err
	}
	result, err := to.Call(ctx, node, key, method, body)
	if errdefs.IsNotFound(err) {
		// That would be the answer about what the request is for.
		return fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	if err != nil {
		return err
	}
	if result.Code != 0 {
		return status.Error(codes.Code(min(result.Code, uint32(codes.Unauthenticated))), fmt.Sprintf("node %s: %s", node, result.Message))
	}
	if err := unmarshal(result.Body, response); err != nil {
		return fmt.Errorf("%w: the answer of node %s to %s cannot be read; see the log of its driver: %w", errdefs.ErrInternal, node, method, err)
	}
	return nil
}

// unmarshal reads a message from its JSON. It ignores fields that it does not know, which a newer driver or controller may send.
func unmarshal(text string, message proto.Message) error {
	return protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal([]byte(text), message)
}
