package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"

	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
)

// maxListed is how many snapshots a node lists in one answer: that is stored in the API server.
const maxListed = 100

// snapshotKey returns the key of a request about a snapshot in an OverlayNode. No handle of a volume has a slash.
func snapshotKey(handle string) string { return "snapshot/" + handle }

// listKey is the key of a request for the snapshots of a volume, of all if its handle is "".
func listKey(volume string) string { return "snapshots/" + volume }

// CreateSnapshot has the node of a volume take a snapshot of it, which stays there.
func (c *Central) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if err := checkSnapshotRequest(req); err != nil {
		return nil, err
	}
	segments, err := c.segmentsOf(ctx, req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	if len(segments) != 1 {
		return nil, fmt.Errorf("%w: volume %s is on no node: only volumes with upper: claim have snapshots",
			errdefs.ErrInvalidArgument, req.GetSourceVolumeId())
	}
	segment := segments[0]
	push, err := pushHandle(req, segment)
	if err != nil {
		return nil, err
	}
	if push.IsZero() && !c.includes(req.GetAccessibilityRequirements(), segment) {
		return nil, fmt.Errorf("%w: the accessibility requirements do not include node %s, which has volume %s, and a snapshot stays there",
			errdefs.ErrResourceExhausted, segment, req.GetSourceVolumeId())
	}
	object, err := c.nodeWith(segment, "volume "+req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	handle := handleOn(req.GetName(), segment)
	forwarded := &csi.CreateSnapshotRequest{
		Name: handle, SourceVolumeId: req.GetSourceVolumeId(), Parameters: userKeys(req.GetParameters()),
	}
	if !push.IsZero() {
		handle, forwarded.Name = push.String(), req.GetName()
		if err := seal(forwarded, req.GetSecrets(), object); err != nil {
			return nil, err
		}
	}
	answer := &csi.CreateSnapshotResponse{}
	limited, cancel := c.patience(ctx, object)
	defer cancel()
	err = forward(limited, c.Nodes, object.Spec.Node, snapshotKey(handle), methodCreateSnapshot, forwarded, answer)
	if err := c.unlessLost(ctx, object, err); err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: c.believed(answer.GetSnapshot(), handle, req.GetSourceVolumeId(), segment)}, nil
}

// believed returns what a node answers of a snapshot, with what the controller knows better. The node has the snapshot, and so what it says
// of its size, its time and its state must be right for itself.
func (c *Central) believed(answer *csi.Snapshot, handle, volume, segment string) *csi.Snapshot {
	snapshot := &csi.Snapshot{
		SnapshotId: handle, SourceVolumeId: volume,
		SizeBytes: max(0, answer.GetSizeBytes()), CreationTime: answer.GetCreationTime(), ReadyToUse: answer.GetReadyToUse(),
	}
	if !portable.IsHandle(handle) {
		snapshot.AccessibleTopology = []*csi.Topology{c.topology(segment)}
	}
	return snapshot
}

// unlessLost returns the error of a request for what a node has. It is ErrFailedPrecondition if the node is gone for good, and what it has
// is lost.
func (c *Central) unlessLost(ctx context.Context, object *overlaynode.OverlayNode, err error) error {
	if !errors.Is(err, overlaynode.ErrUnanswered) {
		return err
	}
	gone, checkErr := c.Gone.Check(ctx, object)
	if checkErr == nil && gone {
		return fmt.Errorf("%w: node %s is gone, and what was on it with it", errdefs.ErrFailedPrecondition, object.Spec.Node)
	}
	return errors.Join(err, checkErr)
}

// nodeWith returns the object of the node that has something. It returns ErrFailedPrecondition if there is none: nothing was asked then.
func (c *Central) nodeWith(segment, what string) (*overlaynode.OverlayNode, error) {
	object, err := c.node(segment)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("%w: node %s, which has %s, is gone, or its driver does not run: %w",
			errdefs.ErrFailedPrecondition, segment, what, err)
	}
	return object, err
}

// DeleteSnapshot has the node of a snapshot delete it. Where that node is gone for good, it answers OK with an event, as for a volume. No
// snapshot has a handle without a node.
func (c *Central) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	handle := req.GetSnapshotId()
	if err := checkSnapshotID(handle); err != nil {
		return nil, err
	}
	if portable.IsHandle(handle) {
		return &csi.DeleteSnapshotResponse{}, c.deletePortable(ctx, handle, req.GetSecrets())
	}
	segment := segmentIn(handle)
	if segment == "" {
		return &csi.DeleteSnapshotResponse{}, nil
	}
	if err := c.Nodes.Await(ctx); err != nil {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, c.deleteSnapshotOn(ctx, segment, handle)
}

// deleteSnapshotOn has the node with a topology segment delete a snapshot.
func (c *Central) deleteSnapshotOn(ctx context.Context, segment, handle string) error {
	return c.deleteOn(ctx, segment, deletion{
		what: "snapshot " + handle, key: snapshotKey(handle), method: methodDeleteSnapshot,
		request: &csi.DeleteSnapshotRequest{SnapshotId: handle}, response: &csi.DeleteSnapshotResponse{}, log: []any{logSnapshot, handle},
		reason: "SnapshotGivenUp", object: contentOf(handle),
	})
}

// contentOf returns the VolumeSnapshotContent of a snapshot: external-snapshotter names both by the UID of the VolumeSnapshot. It returns
// nil for one in a registry, whose handle does not say it, and which does not go with its node.
func contentOf(handle string) *corev1.ObjectReference {
	if portable.IsHandle(handle) {
		return nil
	}
	name, _, _ := strings.Cut(handle, handleSeparator)
	return &corev1.ObjectReference{
		APIVersion: "snapshot.storage.k8s.io/v1", Kind: "VolumeSnapshotContent", Name: "snapcontent-" + strings.TrimPrefix(name, "snapshot-"),
	}
}

// GetSnapshot asks the node of a snapshot for it.
func (c *Central) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	handle := req.GetSnapshotId()
	if err := checkSnapshotID(handle); err != nil {
		return nil, err
	}
	if portable.IsHandle(handle) {
		return c.getPortable(ctx, handle, req.GetSecrets())
	}
	segment := segmentIn(handle)
	if segment == "" {
		return nil, fmt.Errorf("%w: no node has a snapshot %s", errdefs.ErrNotFound, handle)
	}
	answer := &csi.GetSnapshotResponse{}
	if err := c.ask(ctx, segment, snapshotKey(handle), methodGetSnapshot, &csi.GetSnapshotRequest{SnapshotId: handle}, answer); err != nil {
		return nil, err
	}
	s := answer.GetSnapshot()
	return &csi.GetSnapshotResponse{Snapshot: c.believed(s, handle, s.GetSourceVolumeId(), segment)}, nil
}

// ask hands a request that changes nothing to the node with a topology segment, unless one that changes something is under way.
func (c *Central) ask(ctx context.Context, segment, key, method string, request, response proto.Message) error {
	if err := c.Nodes.Await(ctx); err != nil {
		return err
	}
	object, err := c.nodeWith(segment, "it")
	if err != nil {
		return err
	}
	earlier, requested := object.Spec.Requests[key]
	if _, answered := object.Answer(key); requested && !answered && earlier.Method != method {
		return fmt.Errorf("%w: %s is being created or deleted", errdefs.ErrAborted, key)
	}
	limited, cancel := c.patience(ctx, object)
	defer cancel()
	return forward(limited, c.Nodes, object.Spec.Node, key, method, request, response)
}

// ListSnapshots lists one snapshot, those of a volume, or all, by their nodes. A page has the snapshots of one node, since the answers of
// nodes go through the API server: external-snapshotter asks for one snapshot alone.
func (c *Central) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	begin, err := parseNodePage(req)
	if err != nil {
		return nil, err
	}
	if req.GetSnapshotId() != "" {
		return listOne(ctx, c, req)
	}
	segments, err := c.segmentsWithSnapshots(ctx, req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	for i, segment := range segments {
		if segment < begin.segment {
			continue
		}
		token := ""
		if segment == begin.segment {
			token = begin.token
		}
		page, err := c.listOn(ctx, segment, req, token)
		if err != nil {
			return nil, err
		}
		switch {
		case page.GetNextToken() != "":
			page.NextToken = nodePage{segment, page.GetNextToken()}.String()
		case i+1 < len(segments):
			page.NextToken = nodePage{segments[i+1], ""}.String()
		}
		if len(page.GetEntries()) > 0 {
			return page, nil
		}
	}
	return &csi.ListSnapshotsResponse{}, nil
}

// segmentsWithSnapshots returns the topology segments of the nodes that may have snapshots of a volume, or any if its handle is "".
func (c *Central) segmentsWithSnapshots(ctx context.Context, volume string) ([]string, error) {
	if volume != "" {
		return c.segmentsOf(ctx, volume)
	}
	if err := c.Nodes.Await(ctx); err != nil {
		return nil, err
	}
	var segments []string
	for _, object := range c.Nodes.All() {
		segments = append(segments, segmentOf(object.Spec.Node))
	}
	slices.Sort(segments)
	return segments, nil
}

// listOn asks a node for a page of its snapshots.
func (c *Central) listOn(
	ctx context.Context, segment string, req *csi.ListSnapshotsRequest, token string,
) (*csi.ListSnapshotsResponse, error) {
	volume, limit := req.GetSourceVolumeId(), int32(maxListed)
	if req.GetMaxEntries() > 0 {
		limit = min(limit, req.GetMaxEntries())
	}
	answer := &csi.ListSnapshotsResponse{}
	err := c.ask(ctx, segment, listKey(volume), methodListSnapshots,
		&csi.ListSnapshotsRequest{MaxEntries: limit, SourceVolumeId: volume, StartingToken: token}, answer)
	if err != nil {
		return nil, err
	}
	if len(answer.GetEntries()) > int(limit) {
		return nil, fmt.Errorf("%w: node %s listed %d snapshots, and was asked for %d",
			errdefs.ErrInternal, segment, len(answer.GetEntries()), limit)
	}
	page := &csi.ListSnapshotsResponse{NextToken: answer.GetNextToken()}
	for _, entry := range answer.GetEntries() {
		// A node lists its own.
		if s := entry.GetSnapshot(); segmentIn(s.GetSnapshotId()) == segment || isPortableOf(s.GetSnapshotId(), segment) {
			s = c.believed(s, s.GetSnapshotId(), s.GetSourceVolumeId(), segment)
			page.Entries = append(page.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: s})
		}
	}
	return page, nil
}

// nodePagePrefix begins a pagination token of a central controller. The topology segment of a node follows, a slash, and the node's token.
const nodePagePrefix = "node:"

// nodePage is where a page of a list begins: at a node, with the token that the node has given, "" for its first page.
type nodePage struct{ segment, token string }

func (p nodePage) String() string { return nodePagePrefix + p.segment + "/" + p.token }

// parseNodePage returns where the page of a request begins. It returns ErrAborted if the token is not one of a central controller's.
func parseNodePage(req pageRequest) (nodePage, error) {
	if req.GetMaxEntries() < 0 || req.GetStartingToken() == "" {
		_, err := parsePage(req)
		return nodePage{}, err
	}
	rest, isToken := strings.CutPrefix(req.GetStartingToken(), nodePagePrefix)
	segment, token, found := strings.Cut(rest, "/")
	if !isToken || !found || !labelValue.MatchString(segment) {
		return nodePage{}, badToken(req)
	}
	return nodePage{segment, token}, nil
}
