package driver

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

func (n *testNode) CreateSnapshot(_ context.Context, req volume.SnapshotRequest) (volume.Snapshot, error) {
	if _, ok := n.volumes[req.Volume]; !ok {
		return volume.Snapshot{}, fmt.Errorf("%w: volume %s", errdefs.ErrNotFound, req.Volume)
	}
	if earlier, ok := n.snapshots[req.Name]; ok && earlier.Volume != req.Volume {
		return volume.Snapshot{}, fmt.Errorf("%w: snapshot %s is of volume %s", errdefs.ErrAlreadyExists, req.Name, earlier.Volume)
	}
	s := volume.Snapshot{
		ID: req.Name, Volume: req.Volume, Size: n.volumes[req.Volume].Spec.Size, Created: time.Unix(1, 0), Ready: true, OnThisNode: true,
	}
	if !req.Push.IsZero() {
		s.ID, s.Ready, s.OnThisNode = req.Push.String(), len(n.pushed) > 0, false
		n.pushed = append(n.pushed, req)
		if err := n.push(req); err != nil {
			return volume.Snapshot{}, err
		}
	}
	n.snapshots[s.ID] = s
	return s, nil
}

func (n *testNode) DeleteSnapshot(_ context.Context, id string, _ map[string]string) error {
	delete(n.snapshots, id)
	return nil
}

func (n *testNode) DeleteUnpushed(_ context.Context, id string) error {
	delete(n.snapshots, id)
	return nil
}

func (n *testNode) GetSnapshot(_ context.Context, id string, _ map[string]string) (volume.Snapshot, error) {
	if s, ok := n.snapshots[id]; ok {
		return s, nil
	}
	return volume.Snapshot{}, fmt.Errorf("%w: snapshot %s", errdefs.ErrNotFound, id)
}

func (n *testNode) ListSnapshots(after string, limit int, of string) (found []volume.Snapshot, more bool, err error) {
	for _, id := range slices.Sorted(maps.Keys(n.snapshots)) {
		switch s := n.snapshots[id]; {
		case id <= after || of != "" && s.Volume != of:
		case limit > 0 && len(found) == limit:
			return found, true, nil
		default:
			found = append(found, s)
		}
	}
	return found, false, nil
}

// restoreOf returns a request for a volume of a snapshot, or of another volume, that may be on these nodes.
func restoreOf(name string, source volume.Source, nodes ...string) *csi.CreateVolumeRequest {
	req := createOf(1<<30, dirLayers, nodes...)
	req.Name, req.VolumeContentSource = name, sourceOf(source)
	req.AccessibilityRequirements.Requisite = req.AccessibilityRequirements.GetPreferred()
	return req
}

func sourceOf(source volume.Source) *csi.VolumeContentSource {
	if source.Snapshot != "" {
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: source.Snapshot},
		}}
	}
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: source.Volume},
	}}
}

// controllers are the controller service of node a alone, and a central one. Both have nodes a and b.
func controllers(t *testing.T) map[string]struct {
	csi.ControllerServer
	*testCluster
} {
	t.Helper()
	all := map[string]struct {
		csi.ControllerServer
		*testCluster
	}{}
	for _, name := range []string{"node", "central"} {
		cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40, "b": 1 << 40})
		var server csi.ControllerServer = central
		if name == "node" {
			server = cluster.controller("a")
		}
		all[name] = struct {
			csi.ControllerServer
			*testCluster
		}{server, cluster}
	}
	return all
}

func TestSnapshot(t *testing.T) {
	for name, c := range controllers(t) {
		t.Run(name, func(t *testing.T) {
			created, err := c.CreateVolume(t.Context(), createOf(1<<30, dirLayers, "a"))
			if err != nil {
				t.Fatal(err)
			}
			of := created.GetVolume().GetVolumeId()
			c.affinity[of] = "a"
			req := &csi.CreateSnapshotRequest{
				Name: "snapshot-1", SourceVolumeId: of, Secrets: map[string]string{"password": "secret"},
				Parameters: map[string]string{"csi.storage.k8s.io/volumesnapshot/name": "mine"},
			}
			for range 2 {
				answer, err := c.CreateSnapshot(t.Context(), req)
				s := answer.GetSnapshot()
				if err != nil || s.GetSnapshotId() != "snapshot-1@a" || s.GetSourceVolumeId() != of || s.GetSizeBytes() != 1<<30 ||
					!s.GetReadyToUse() || s.GetCreationTime().GetSeconds() != 1 ||
					s.GetAccessibleTopology()[0].GetSegments()[testDriver+"/node"] != "a" {
					t.Fatalf("got %v, %v", answer, err)
				}
			}
			for _, object := range c.objects {
				for _, request := range object.Spec.Requests {
					if strings.Contains(request.Body, "secret") {
						t.Errorf("a secret is in the API server: %s", request.Body)
					}
				}
			}
			got, err := c.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: "snapshot-1@a"})
			if err != nil || got.GetSnapshot().GetSourceVolumeId() != of || !got.GetSnapshot().GetReadyToUse() {
				t.Errorf("got %v, %v", got, err)
			}
			if _, err := c.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: "snapshot-2@a"}); !isNotFound(err) {
				t.Errorf("a snapshot that there is none of: %v", err)
			}

			restored, err := c.CreateVolume(t.Context(), restoreOf("pvc-2", volume.Source{Snapshot: "snapshot-1@a"}, "b", "a"))
			if v := restored.GetVolume(); err != nil || v.GetContentSource().GetSnapshot().GetSnapshotId() != "snapshot-1@a" ||
				v.GetAccessibleTopology()[0].GetSegments()[testDriver+"/node"] != "a" || v.GetVolumeContext()["layers"] != "dir://models/base" {
				t.Errorf("restored: %v, %v", restored, err)
			}
			cloned, err := c.CreateVolume(t.Context(), restoreOf("pvc-3", volume.Source{Volume: of}, "a"))
			if err != nil || cloned.GetVolume().GetContentSource().GetVolume().GetVolumeId() != of {
				t.Errorf("cloned: %v, %v", cloned, err)
			}
			if _, err := c.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: "snapshot-1@a"}); err != nil {
				t.Error(err)
			}
			if len(c.nodes["a"].snapshots) > 0 {
				t.Errorf("left: %v", c.nodes["a"].snapshots)
			}
			if _, err := c.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: "none"}); err != nil {
				t.Errorf("a snapshot that never was: %v", err)
			}
		})
	}
}

func TestSnapshotRefuses(t *testing.T) {
	for name, c := range controllers(t) {
		c.nodes["a"].volumes["pvc-1@a"], c.nodes["a"].volumes["pvc-2@a"] = volume.CreateRequest{}, volume.CreateRequest{}
		for what, r := range map[string]struct {
			req  *csi.CreateSnapshotRequest
			code codes.Code
			word string
		}{
			"no name":   {&csi.CreateSnapshotRequest{SourceVolumeId: "pvc-1@a"}, codes.InvalidArgument, "name is missing"},
			"no volume": {&csi.CreateSnapshotRequest{Name: "s"}, codes.InvalidArgument, "volume ID is missing"},
			"long name": {
				&csi.CreateSnapshotRequest{Name: strings.Repeat("n", 129), SourceVolumeId: "pvc-1@a"}, codes.InvalidArgument, "maximum is 128",
			},
			"a key": {&csi.CreateSnapshotRequest{
				Name: "s", SourceVolumeId: "pvc-1@a", Parameters: map[string]string{"pull": "x", "inUse": "copy"},
			}, codes.InvalidArgument, `unknown key "pull"`},
			"another value": {&csi.CreateSnapshotRequest{
				Name: "s", SourceVolumeId: "pvc-1@a", Parameters: map[string]string{"inUse": "freeze"},
			}, codes.InvalidArgument, `inUse is "freeze"; the only value is "copy"`},
			"another volume's": {&csi.CreateSnapshotRequest{Name: "taken", SourceVolumeId: "pvc-2@a"}, codes.AlreadyExists, "of volume pvc-1@a"},
			"no such volume":   {&csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: "pvc-9@a"}, codes.NotFound, "pvc-9@a"},
			"another node": {&csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: "pvc-1@a", AccessibilityRequirements: &csi.TopologyRequirement{
				Requisite: []*csi.Topology{nodeTopology(testDriver, "b")},
			}}, codes.ResourceExhausted, "accessibility requirements"},
		} {
			t.Run(name+"/"+what, func(t *testing.T) {
				if _, err := c.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "taken", SourceVolumeId: "pvc-1@a"}); err != nil {
					t.Fatal(err)
				}
				_, err := c.CreateSnapshot(t.Context(), r.req)
				wantStatus(t, err, r.code, r.word)
			})
		}
	}
}

// TestSourceElsewhere: external-provisioner is told to try another node where the source of a volume is on one, and which one that is.
func TestSourceElsewhere(t *testing.T) {
	for name, c := range controllers(t) {
		c.nodes["b"].volumes["pvc-1@b"], c.nodes["b"].volumes["pvc-1"] = volume.CreateRequest{}, volume.CreateRequest{}
		c.nodes["b"].snapshots["snapshot-1@b"] = volume.Snapshot{ID: "snapshot-1@b"}
		c.affinity["pvc-1"], c.affinity["pvc-1@b"] = "b", "b"
		for what, r := range map[string]struct {
			source volume.Source
			code   codes.Code
			word   string
		}{
			"snapshot":                     {volume.Source{Snapshot: "snapshot-1@b"}, codes.ResourceExhausted, "snapshot snapshot-1@b is on node b"},
			"volume":                       {volume.Source{Volume: "pvc-1"}, codes.ResourceExhausted, "volume pvc-1 is on node b"},
			"volume of the other mode":     {volume.Source{Volume: "pvc-1@b"}, codes.ResourceExhausted, "volume pvc-1@b is on node b"},
			"no such snapshot":             {volume.Source{Snapshot: "snapshot-2@a"}, codes.NotFound, "snapshot-2@a"},
			"no such snapshot on any node": {volume.Source{Snapshot: "snapshot-2"}, codes.NotFound, "snapshot-2"},
			"no such volume":               {volume.Source{Volume: "pvc-2"}, codes.NotFound, "pvc-2"},
		} {
			t.Run(name+"/"+what, func(t *testing.T) {
				_, err := c.CreateVolume(t.Context(), restoreOf("pvc-3", r.source, "a"))
				wantStatus(t, err, r.code, r.word)
			})
		}
	}
}

func TestListSnapshots(t *testing.T) {
	for name, c := range controllers(t) {
		t.Run(name, func(t *testing.T) {
			var want []string
			add := func(node string, count int) {
				for i := range count {
					s := volume.Snapshot{ID: fmt.Sprintf("s%d@%s", i, node), Volume: fmt.Sprintf("v%d@%s", i%2, node), Ready: true}
					c.nodes[node].snapshots[s.ID] = s
					want = append(want, s.ID)
				}
			}
			add("a", 5)
			if name == "central" {
				add("b", 3)
			}
			for _, limit := range []int32{0, 1, 2, 100} {
				if got := listAll(t, c, &csi.ListSnapshotsRequest{MaxEntries: limit}); !slices.Equal(got, want) {
					t.Errorf("with pages of %d: %q; want %q", limit, got, want)
				}
			}
			for volume, want := range map[string][]string{"v1@a": {"s1@a", "s3@a"}, "v9@a": nil} {
				if got := listAll(t, c, &csi.ListSnapshotsRequest{SourceVolumeId: volume, MaxEntries: 1}); !slices.Equal(got, want) {
					t.Errorf("of volume %s: %q; want %q", volume, got, want)
				}
			}
			for id, want := range map[string][]string{"s1@a": {"s1@a"}, "s9@a": nil, "none": nil} {
				if got := listAll(t, c, &csi.ListSnapshotsRequest{SnapshotId: id}); !slices.Equal(got, want) {
					t.Errorf("snapshot %s: %q; want %q", id, got, want)
				}
			}
			if got := listAll(t, c, &csi.ListSnapshotsRequest{SnapshotId: "s1@a", SourceVolumeId: "v0@a"}); got != nil {
				t.Errorf("a snapshot of another volume: %q", got)
			}
			_, err := c.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{MaxEntries: -1})
			wantStatus(t, err, codes.InvalidArgument, "max_entries")
			for _, token := range []string{"5", "node:", "node:../a/", "after"} {
				_, err := c.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{StartingToken: token})
				wantStatus(t, err, codes.Aborted, "list again")
			}
		})
	}
}

// listAll returns the snapshots on all pages of a list.
func listAll(t *testing.T, server csi.ControllerServer, req *csi.ListSnapshotsRequest) (ids []string) {
	t.Helper()
	for {
		page, err := server.ListSnapshots(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if req.GetMaxEntries() > 0 && len(page.GetEntries()) > int(req.GetMaxEntries()) {
			t.Errorf("a page has %d entries", len(page.GetEntries()))
		}
		for _, entry := range page.GetEntries() {
			ids = append(ids, entry.GetSnapshot().GetSnapshotId())
		}
		if req.StartingToken = page.GetNextToken(); req.StartingToken == "" {
			return ids
		}
	}
}

// TestCentralSnapshotOfALostNode: nobody waits for a node that is gone for good.
func TestCentralSnapshotOfALostNode(t *testing.T) {
	for name, c := range map[string]struct {
		gone   bool
		code   codes.Code
		delete codes.Code
		events int
	}{
		"does not answer": {code: codes.Unavailable, delete: codes.Unavailable},
		"gone":            {gone: true, code: codes.FailedPrecondition, events: 1},
	} {
		t.Run(name, func(t *testing.T) {
			cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40, "b": 1 << 40})
			cluster.away = []string{"a"}
			if c.gone {
				cluster.gone = cluster.away
			}
			_, err := central.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "snapshot-1", SourceVolumeId: "pvc-1@a"})
			wantStatus(t, err, c.code, "node a")
			_, err = central.CreateVolume(t.Context(), restoreOf("pvc-2", volume.Source{Snapshot: "snapshot-1@a"}, "a", "b"))
			wantStatus(t, err, c.code, "node a")
			_, err = central.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: "snapshot-1@a"})
			if status.Code(toStatus(err)) != c.delete || len(cluster.events) != c.events {
				t.Errorf("got %v, events %q; want %s", err, cluster.events, c.delete)
			}
			if c.events > 0 && (cluster.kept[0] != "snapshot/snapshot-1@a" ||
				!strings.Contains(cluster.events[0], "SnapshotGivenUp: Node a is gone")) {
				t.Errorf("kept %q, events %q", cluster.kept, cluster.events)
			}
		})
	}
	cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40})
	_, err := central.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "snapshot-1", SourceVolumeId: "pvc-1@c"})
	wantStatus(t, err, codes.FailedPrecondition, "node c")
	_, err = central.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: "snapshot-1@c"})
	if wantStatus(t, err, codes.Unavailable, "OverlayNode c"); !slices.Equal(cluster.ensured, []string{"c"}) {
		t.Errorf("made objects of %q", cluster.ensured)
	}
	_, err = central.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "snapshot-1", SourceVolumeId: "pvc-1"})
	wantStatus(t, err, codes.InvalidArgument, "only volumes with upper: claim")
}

// TestRestoreOfAClaimThatNamesNoLayers: they are those of the source.
func TestRestoreOfAClaimThatNamesNoLayers(t *testing.T) {
	for name, c := range controllers(t) {
		t.Run(name, func(t *testing.T) {
			c.nodes["a"].snapshots["snapshot-1@a"], c.nodes["a"].made = volume.Snapshot{ID: "snapshot-1@a"}, "dir://models/tuned"
			req := restoreOf("pvc-2", volume.Source{Snapshot: "snapshot-1@a"}, "a")
			req.Parameters = map[string]string{"layersFrom": "claim", keyClaimNamespace: "default", keyClaimName: "silent"}
			answer, err := c.CreateVolume(t.Context(), req)
			if err != nil || answer.GetVolume().GetVolumeContext()["layers"] != "dir://models/tuned" {
				t.Errorf("got %v, %v", answer, err)
			}
			req.Name, req.VolumeContentSource = "pvc-3", nil
			_, err = c.CreateVolume(t.Context(), req)
			wantStatus(t, err, codes.InvalidArgument, "has no annotation")
		})
	}
}

// TestCentralRestoreHasTheTagsOfItsSource: a tag that has moved since means what the source has.
func TestCentralRestoreHasTheTagsOfItsSource(t *testing.T) {
	const tagged, other = "oci://registry.example.com/model:v1", "oci://registry.example.com/model:v2"
	resolved := tagged + "@sha256:" + strings.Repeat("c", 64)
	for name, c := range map[string]struct {
		made, word string
		code       codes.Code
	}{
		"its digest":     {made: resolved},
		"another tag":    {made: other + "@sha256:" + strings.Repeat("c", 64), word: "other layers", code: codes.Internal},
		"another number": {made: resolved + "\ndir://models/a", word: "other layers", code: codes.Internal},
		"no layers":      {word: "other layers", code: codes.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			cluster, central := newTestCluster(t, map[string]int64{"a": 1 << 40})
			cluster.nodes["a"].made = cmp.Or(c.made, "none")
			req := restoreOf("pvc-2", volume.Source{Snapshot: "snapshot-1@a"}, "a")
			cluster.nodes["a"].snapshots["snapshot-1@a"] = volume.Snapshot{ID: "snapshot-1@a"}
			req.Parameters = map[string]string{"layers": tagged}
			answer, err := central.CreateVolume(t.Context(), req)
			wantStatus(t, err, c.code, c.word)
			if err == nil && answer.GetVolume().GetVolumeContext()["layers"] != resolved {
				t.Errorf("got %v", answer)
			}
			if body := cluster.objects["a"].Spec.Requests["pvc-2@a"].Body; !strings.Contains(body, `"`+tagged+`"`) {
				t.Errorf("the node was asked for %s", body)
			}
		})
	}
}
