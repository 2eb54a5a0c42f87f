package driver

import (
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestPortableSnapshot: the node of a volume pushes the snapshot, with a secret that nobody else can read. The controller asks the registry
// for all else, and the volume is made on any node.
func TestPortableSnapshot(t *testing.T) {
	r, err := registrytest.Start(registrytest.Options{User: "u", Password: "hunter2"})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	certs := t.TempDir()
	if err := r.Configure(certs); err != nil {
		t.Fatal(err)
	}
	registries := portable.NewRegistry(
		registry.NewClient(registry.Config{CertsDir: certs, StallTimeout: time.Minute, Backoff: time.Millisecond}), image.NewDocuments())
	c, central := newTestCluster(t, map[string]int64{"a": 1 << 40, "b": 1 << 40})
	central.Portable = registries
	created, err := central.CreateVolume(t.Context(), createOf(1<<30, dirLayers, "a"))
	if err != nil {
		t.Fatal(err)
	}
	of := created.GetVolume().GetVolumeId()
	c.affinity[of] = "a"
	c.nodes["a"].push = func(req volume.SnapshotRequest) error {
		layers := c.nodes["a"].volumes[req.Volume].Spec.Layers
		_, err := registries.Push(t.Context(), portable.Snapshot{
			Handle: req.Push, Name: req.Name, Volume: req.Volume, Size: 1 << 30, Layers: layers, Requested: layers, WriteTar: portable.EmptyTar,
		}, req.Secrets)
		return err
	}
	req := &csi.CreateSnapshotRequest{
		Name: "snapshot-1", SourceVolumeId: of, Parameters: map[string]string{"push": r.Host + "/team/snapshots"},
		Secrets: map[string]string{".dockerconfigjson": r.DockerConfig("u", "hunter2")},
	}
	if _, err := central.CreateSnapshot(t.Context(), req); status.Code(toStatus(err)) != codes.Unavailable {
		t.Errorf("a node without a key: %v", err)
	}
	if c.key, err = overlaynode.NewKey(); err != nil {
		t.Fatal(err)
	}
	c.objects["a"].Status.PublicKey = c.key.Public()
	handle := ""
	for i, ready := range []bool{false, true} {
		answer, err := central.CreateSnapshot(t.Context(), req)
		s := answer.GetSnapshot()
		if err != nil || !strings.HasPrefix(s.GetSnapshotId(), "push:"+r.Host+"/team/snapshots:snap-") || s.GetReadyToUse() != ready ||
			len(s.GetAccessibleTopology()) > 0 || i > 0 && s.GetSnapshotId() != handle {
			t.Fatalf("got %v, %v", answer, err)
		}
		handle = s.GetSnapshotId()
	}
	for _, object := range c.objects {
		for _, request := range object.Spec.Requests {
			if strings.Contains(request.Body, "hunter2") || strings.Contains(request.Body, "auths") {
				t.Errorf("a secret is in the API server: %s", request.Body)
			}
		}
	}
	got, err := central.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: handle, Secrets: req.GetSecrets()})
	if s := got.GetSnapshot(); err != nil || s.GetSourceVolumeId() != of || !s.GetReadyToUse() || s.GetSizeBytes() != 1<<30 {
		t.Errorf("got %v, %v", got, err)
	}
	list, err := central.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{SourceVolumeId: of})
	if err != nil || len(list.GetEntries()) != 1 || list.GetEntries()[0].GetSnapshot().GetSnapshotId() != handle {
		t.Errorf("got %v, %v", list, err)
	}

	restore := restoreOf("pvc-2", volume.Source{Snapshot: handle}, "b")
	restore.Secrets = req.GetSecrets()
	for range 2 {
		restored, err := central.CreateVolume(t.Context(), restore)
		v := restored.GetVolume()
		if err != nil || v.GetVolumeId() != "pvc-2@b" || v.GetContentSource().GetSnapshot().GetSnapshotId() != handle ||
			v.GetAccessibleTopology()[0].GetSegments()[testDriver+"/node"] != "b" ||
			!strings.HasPrefix(v.GetVolumeContext()["layers"], "oci://"+strings.TrimPrefix(handle, "push:")+"@sha256:") ||
			!strings.HasSuffix(v.GetVolumeContext()["layers"], "\ndir://models/base") {
			t.Fatalf("got %v, %v", restored, err)
		}
	}
	small := restoreOf("pvc-3", volume.Source{Snapshot: handle}, "b")
	small.Secrets, small.CapacityRange.RequiredBytes = req.GetSecrets(), 1<<29
	if _, err := central.CreateVolume(t.Context(), small); status.Code(toStatus(err)) != codes.OutOfRange {
		t.Errorf("a volume that is too small: %v", err)
	}

	_, err = central.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: handle})
	if status.Code(toStatus(err)) != codes.Unauthenticated || !strings.Contains(err.Error(), r.Host) {
		t.Errorf("deleted without a secret: %v", err)
	}
	for range 2 {
		if _, err := central.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: handle, Secrets: req.GetSecrets()}); err != nil {
			t.Fatal(err)
		}
	}
	// Of one that is in the registry, nothing is lost with its node.
	other, err := portable.New(r.Host+"/team/snapshots", "snapshot-2", "a")
	if err != nil {
		t.Fatal(err)
	}
	c.away, c.gone = []string{"a"}, []string{"a"}
	_, err = central.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: other.String(), Secrets: req.GetSecrets()})
	if err != nil || len(c.events) > 0 {
		t.Errorf("deleted after its node: %v, events %q", err, c.events)
	}
	restore.Name = "pvc-4"
	if _, err := central.CreateVolume(t.Context(), restore); !isNotFound(err) || !strings.Contains(err.Error(), r.Host) {
		t.Errorf("a volume of a snapshot that was deleted: %v", err)
	}
}
