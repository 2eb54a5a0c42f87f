package driver

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/overlay-csi/overlay-csi/pkg/volume"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
)

// portables has the snapshots in registries. It is a portable.Registry.
type portables interface {
	Read(ctx context.Context, h portable.Handle, secrets map[string]string, namespace string) (portable.Image, error)
	Get(ctx context.Context, h portable.Handle, secrets map[string]string) (portable.Image, error)
	Delete(ctx context.Context, h portable.Handle, id digest.Digest, secrets map[string]string) error
}

// isPortable reports whether a volume is made from a snapshot in a registry.
func isPortable(source volume.Source) bool { return portable.IsHandle(source.Snapshot) }

// readPortable returns the layers of a volume that is made from a snapshot in a registry, and the request for a volume that is large
// enough.
func (c *Central) readPortable(
	ctx context.Context, req *csi.CreateVolumeRequest, request *volume.CreateRequest,
) (*csi.CreateVolumeRequest, layers, error) {
	h, err := portable.Parse(request.Source.Snapshot)
	if err != nil {
		return nil, layers{}, err
	}
	requested, err := c.requestedLayers(ctx, req, *request)
	if err != nil {
		return nil, layers{}, err
	}
	image, err := c.Portable.Read(ctx, h, req.GetSecrets(), request.Namespace)
	if err != nil {
		return nil, layers{}, err
	}
	resolved, err := image.LayersFor(requested)
	if err != nil {
		return nil, layers{}, err
	}
	if request.Spec.Size, err = image.SizeFor(request.Spec.Size, request.Limit); err != nil {
		return nil, layers{}, err
	}
	if len(requested) == 0 {
		requested = image.Requested()
	}
	if request.Required == 0 && request.Spec.Size > 0 {
		req = proto.CloneOf(req)
		req.CapacityRange = &csi.CapacityRange{RequiredBytes: request.Spec.Size, LimitBytes: request.Limit}
	}
	return req, layers{requested, resolved}, nil
}

// deletePortable has the node of a snapshot in a registry delete what it has of it, which ends its push, and then deletes its image. A
// node that is gone for good has nothing any more.
func (c *Central) deletePortable(ctx context.Context, handle string, secrets map[string]string) error {
	h, err := portable.Parse(handle)
	if err != nil {
		return err
	}
	segments, err := c.segmentsOfPortable(ctx, h)
	if err != nil {
		return err
	}
	for _, segment := range segments {
		if err := c.deleteSnapshotOn(ctx, segment, handle); err != nil {
			return err
		}
	}
	return c.Portable.Delete(ctx, h, "", secrets)
}

// segmentsOfPortable returns the topology segments of the nodes that may have pushed a snapshot, which is nearly always one or none.
func (c *Central) segmentsOfPortable(ctx context.Context, h portable.Handle) ([]string, error) {
	if err := c.Nodes.Await(ctx); err != nil {
		return nil, err
	}
	var segments []string
	for _, object := range c.Nodes.All() {
		if segment := segmentOf(object.Spec.Node); h.MayBeOf(segment) {
			segments = append(segments, segment)
		}
	}
	return segments, nil
}

// getPortable returns a snapshot in a registry. One that is not there yet may be under way.
func (c *Central) getPortable(ctx context.Context, handle string, secrets map[string]string) (*csi.GetSnapshotResponse, error) {
	h, err := portable.Parse(handle)
	if err != nil {
		return nil, err
	}
	image, err := c.Portable.Get(ctx, h, secrets)
	if err == nil {
		return &csi.GetSnapshotResponse{Snapshot: &csi.Snapshot{
			SnapshotId: handle, SourceVolumeId: image.Volume, SizeBytes: image.Size, CreationTime: timestamppb.New(image.Created), ReadyToUse: true,
		}}, nil
	}
	if !errdefs.IsNotFound(err) {
		return nil, err
	}
	segments, failed := c.segmentsOfPortable(ctx, h)
	if failed != nil {
		return nil, failed
	}
	for _, segment := range segments {
		answer := &csi.GetSnapshotResponse{}
		failed := c.ask(ctx, segment, snapshotKey(handle), methodGetSnapshot, &csi.GetSnapshotRequest{SnapshotId: handle}, answer)
		if s := answer.GetSnapshot(); failed == nil && s.GetSnapshotId() == handle {
			return &csi.GetSnapshotResponse{Snapshot: c.believed(s, handle, s.GetSourceVolumeId(), segment)}, nil
		}
		if failed != nil && !isNotFound(failed) {
			return nil, failed
		}
	}
	return nil, err
}

// isPortableOf reports whether a handle is that of a snapshot in a registry that the node with a segment may have pushed.
func isPortableOf(handle, segment string) bool {
	h, err := portable.Parse(handle)
	return err == nil && h.MayBeOf(segment)
}
