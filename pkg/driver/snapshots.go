package driver

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
)

// snapshotter is the part of package volume that takes and deletes snapshots.
type snapshotter interface {
	CreateSnapshot(ctx context.Context, req volume.SnapshotRequest) (volume.Snapshot, error)
	DeleteSnapshot(ctx context.Context, id string, secrets map[string]string) error
	DeleteUnpushed(ctx context.Context, id string) error
	GetSnapshot(ctx context.Context, id string, secrets map[string]string) (volume.Snapshot, error)
	ListSnapshots(after string, limit int, volume string) (snapshots []volume.Snapshot, more bool, err error)
}

// The keys of a VolumeSnapshotClass. keyInUse says what happens to volumes in use that cannot be copied at one moment: with inUseCopy they
// are copied file by file, without it their snapshots are refused. keyPush has the repository that snapshots are pushed to.
const (
	keyInUse  = "inUse"
	inUseCopy = "copy"
	keyPush   = "push"
)

// checkSnapshotRequest validates a request for a snapshot.
func checkSnapshotRequest(req *csi.CreateSnapshotRequest) error {
	keys := userKeys(req.GetParameters())
	inUse, isSet := keys[keyInUse]
	push, hasPush := keys[keyPush]
	delete(keys, keyInUse)
	delete(keys, keyPush)
	switch {
	case req.GetName() == "":
		return fmt.Errorf("%w: the snapshot name is missing", errdefs.ErrInvalidArgument)
	case len(req.GetName()) > 128:
		return fmt.Errorf("%w: the snapshot name has %d bytes, the maximum is 128", errdefs.ErrInvalidArgument, len(req.GetName()))
	case len(keys) > 0:
		return fmt.Errorf("%w: unknown key %q; a VolumeSnapshotClass of this driver has %s, %s and keys of the sidecar (csi.storage.k8s.io/…)",
			errdefs.ErrInvalidArgument, slices.Sorted(maps.Keys(keys))[0], keyInUse, keyPush)
	case isSet && inUse != inUseCopy:
		return fmt.Errorf("%w: %s is %q; the only value is %q: leave the key out, and volumes in use are copied at one moment or not at all",
			errdefs.ErrInvalidArgument, keyInUse, inUse, inUseCopy)
	case hasPush:
		if _, err := portable.New(push, req.GetName(), ""); err != nil {
			return fmt.Errorf("key %q: %w", keyPush, err)
		}
	}
	return record.CheckID(req.GetSourceVolumeId())
}

// pushHandle returns the handle of a snapshot in a registry, zero if the request is for one that stays on its node. segment is that of the
// node. The request has been checked.
func pushHandle(req *csi.CreateSnapshotRequest, segment string) (portable.Handle, error) {
	push, hasPush := req.GetParameters()[keyPush]
	if !hasPush {
		return portable.Handle{}, nil
	}
	return portable.New(push, req.GetName(), segment)
}

// checkSnapshotID returns ErrInvalidArgument if there can be no snapshot with that ID.
func checkSnapshotID(id string) error {
	if id == "" {
		return fmt.Errorf("%w: the snapshot ID is missing", errdefs.ErrInvalidArgument)
	}
	if portable.IsHandle(id) {
		_, err := portable.Parse(id)
		return err
	}
	if err := record.CheckID(id); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return nil
}

// CreateSnapshot takes a snapshot of a volume on this node. Its handle says which node that is, so that a claim that is to be restored on
// another one can be told.
func (c *Controller) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	return c.createSnapshot(ctx, req, handleOn(req.GetName(), c.segment))
}

// createSnapshot takes a snapshot with a handle.
func (c *Controller) createSnapshot(
	ctx context.Context, req *csi.CreateSnapshotRequest, handle string,
) (*csi.CreateSnapshotResponse, error) {
	if err := checkSnapshotRequest(req); err != nil {
		return nil, err
	}
	push, err := pushHandle(req, c.segment)
	if err != nil {
		return nil, err
	}
	if push.IsZero() && !c.servesTopology(req.GetAccessibilityRequirements()) {
		return nil, fmt.Errorf("%w: the accessibility requirements do not include this node (%s), which a snapshot stays on",
			errdefs.ErrResourceExhausted, c.segment)
	}
	request := volume.SnapshotRequest{
		Name: handle, Volume: req.GetSourceVolumeId(), CopyInUse: req.GetParameters()[keyInUse] == inUseCopy,
		Push: push, Secrets: req.GetSecrets(),
	}
	if !push.IsZero() {
		request.Name = req.GetName()
	}
	created, err := c.snapshots.CreateSnapshot(ctx, request)
	if err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: c.toCSISnapshot(created)}, nil
}

// toCSISnapshot converts a snapshot into its CSI form.
func (c *Controller) toCSISnapshot(s volume.Snapshot) *csi.Snapshot {
	converted := &csi.Snapshot{
		SnapshotId: s.ID, SourceVolumeId: s.Volume, SizeBytes: s.Size, CreationTime: timestamppb.New(s.Created), ReadyToUse: s.Ready,
	}
	if s.OnThisNode {
		converted.AccessibleTopology = []*csi.Topology{c.topology}
	}
	return converted
}

// DeleteSnapshot deletes a snapshot. Volumes that were made from it stay.
func (c *Controller) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if err := checkSnapshotID(req.GetSnapshotId()); err != nil {
		return nil, err
	}
	if err := c.snapshots.DeleteSnapshot(ctx, req.GetSnapshotId(), req.GetSecrets()); err != nil {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

// GetSnapshot returns a snapshot on this node.
func (c *Controller) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if err := checkSnapshotID(req.GetSnapshotId()); err != nil {
		return nil, err
	}
	s, err := c.snapshots.GetSnapshot(ctx, req.GetSnapshotId(), req.GetSecrets())
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: c.toCSISnapshot(s)}, nil
}

// ListSnapshots lists the snapshots of this node, by ID: all of them, those of a volume, or one.
func (c *Controller) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	after, err := parsePage(req)
	if err != nil {
		return nil, err
	}
	if req.GetSnapshotId() != "" {
		return listOne(ctx, c, req)
	}
	snapshots, more, err := c.snapshots.ListSnapshots(after, int(req.GetMaxEntries()), req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	response := &csi.ListSnapshotsResponse{}
	for _, s := range snapshots {
		response.Entries = append(response.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: c.toCSISnapshot(s)})
	}
	if more {
		response.NextToken = tokenPrefix + snapshots[len(snapshots)-1].ID
	}
	return response, nil
}

// snapshotGetter has snapshots by their handles.
type snapshotGetter interface {
	GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error)
}

// listOne answers a request for the list of the one snapshot with an ID. The list is empty if there is none, or if it is of another volume
// than the request names.
func listOne(ctx context.Context, from snapshotGetter, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	response := &csi.ListSnapshotsResponse{}
	found, err := from.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: req.GetSnapshotId(), Secrets: req.GetSecrets()})
	switch s := found.GetSnapshot(); {
	case isNotFound(err):
	case err != nil:
		return nil, err
	case req.GetSourceVolumeId() == "" || req.GetSourceVolumeId() == s.GetSourceVolumeId():
		response.Entries = []*csi.ListSnapshotsResponse_Entry{{Snapshot: s}}
	}
	return response, nil
}

// parseSource returns what a volume is made from.
func parseSource(source *csi.VolumeContentSource) (volume.Source, error) {
	switch {
	case source.GetSnapshot() != nil:
		id := source.GetSnapshot().GetSnapshotId()
		return volume.Source{Snapshot: id}, checkSnapshotID(id)
	case source.GetVolume() != nil:
		id := source.GetVolume().GetVolumeId()
		return volume.Source{Volume: id}, record.CheckID(id)
	}
	return volume.Source{}, fmt.Errorf("%w: the volume content source is neither a snapshot nor a volume", errdefs.ErrInvalidArgument)
}

// nodeOfSource returns the topology segment of the node that the source of a volume is on, "" where it is on none or nobody knows. The
// handle of a snapshot has it, and that of a volume if a central controller made it. Otherwise the volume's PersistentVolume says it.
func (c *Controller) nodeOfSource(ctx context.Context, source volume.Source) (string, error) {
	if source.Snapshot != "" {
		return segmentIn(source.Snapshot), nil
	}
	segments, err := c.cluster.VolumeTopology(ctx, c.driverName, source.Volume, topologyKey(c.driverName))
	switch {
	case errdefs.IsFailedPrecondition(err):
		// The driver has no API server, or may not ask it.
		return segmentIn(source.Volume), nil
	case err != nil || len(segments) != 1:
		return segmentIn(source.Volume), err
	}
	return segments[0], nil
}

// unlessElsewhere returns the error of a creation that found no source. It is ErrResourceExhausted if the source is on another node:
// external-provisioner then tries another one.
func (c *Controller) unlessElsewhere(ctx context.Context, source volume.Source, notFound error) error {
	if portable.IsHandle(source.Snapshot) {
		return notFound
	}
	var err error
	if source.Snapshot != "" {
		_, err = c.snapshots.GetSnapshot(ctx, source.Snapshot, nil)
	} else {
		_, err = c.volumes.Get(source.Volume)
	}
	if !errdefs.IsNotFound(err) {
		return notFound
	}
	segment, err := c.nodeOfSource(ctx, source)
	switch {
	case err != nil:
		return err
	case segment == "":
		return fmt.Errorf("%w; a source is a snapshot, or a volume with upper: claim", notFound)
	case segment == c.segment:
		return notFound
	}
	return elsewhere(source, segment, "this is node "+c.segment)
}

// elsewhere returns the error of a volume that would have to be on another node than the request permits.
func elsewhere(source volume.Source, segment, asked string) error {
	return fmt.Errorf("%w: %s is on node %s, and %s: a claim that is made from it has to be on the same node; use a StorageClass with "+
		"volumeBindingMode Immediate, which its pods follow, or have the scheduler choose that node",
		errdefs.ErrResourceExhausted, describeSource(source), segment, asked)
}

func describeSource(source volume.Source) string {
	if source.Snapshot != "" {
		return "snapshot " + source.Snapshot
	}
	return "volume " + source.Volume
}

// segmentIn returns the topology segment in the handle of a volume or snapshot, "" if there is none.
func segmentIn(handle string) string {
	if _, segment, found := strings.Cut(handle, handleSeparator); found && labelValue.MatchString(segment) {
		return segment
	}
	return ""
}
