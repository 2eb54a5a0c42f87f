package volume

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
)

// written makes the claim "v", writes a file to it as a pod would, and unpublishes it.
func (n *fakeNode) written(file string) {
	n.t.Helper()
	n.create()
	n.writeTo(file)
}

// writeTo publishes the claim "v", writes a file, and unpublishes it.
func (n *fakeNode) writeTo(file string) {
	n.t.Helper()
	req := n.publish(n.request("p-"+file, rwo))
	check(n.t, os.WriteFile(filepath.Join(n.records.Dir("v"), "upper", file), nil, 0o600))
	check(n.t, n.manager.Unpublish(n.t.Context(), "v", req.Target))
}

func (n *fakeNode) snapshot(name string) (Snapshot, error) {
	return n.manager.CreateSnapshot(n.t.Context(), SnapshotRequest{Name: name, Volume: "v"})
}

// frozen are the frozen uppers on the disk.
func (n *fakeNode) frozen() []string {
	n.t.Helper()
	ids, err := fakeBackends{n}.ListFrozen()
	check(n.t, err)
	return ids
}

// filesOf are the files of each frozen upper in a list.
func (n *fakeNode) filesOf(list []record.Frozen) (files []string) {
	n.t.Helper()
	for _, frozen := range list {
		entries, err := os.ReadDir(filepath.Join(fakeBackends{n}.frozenDir(frozen.ID), "upper"))
		check(n.t, err)
		for _, entry := range entries {
			files = append(files, entry.Name())
		}
	}
	return files
}

func (n *fakeNode) loaded(id string) *record.Record {
	n.t.Helper()
	r, err := n.records.Load(id)
	check(n.t, err)
	return r
}

func wantEqual[T any](t *testing.T, what string, got, want []T, equal func(a, b T) bool) {
	t.Helper()
	same := len(got) == len(want)
	for i := 0; same && i < len(got); i++ {
		same = equal(got[i], want[i])
	}
	if !same {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func wantNames(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	wantEqual(t, what, got, want, func(a, b string) bool { return a == b })
}

func TestSnapshotAtRest(t *testing.T) {
	n := newFakeNode(t)
	n.written("one")
	made, err := n.snapshot("s1")
	check(t, err)
	if made.ID != "s1" || made.Volume != "v" || !made.Ready || made.Created.IsZero() {
		t.Errorf("got %+v", made)
	}
	r := n.loaded("v")
	if r.Made || r.Freezing || exists(filepath.Join(n.records.Dir("v"), "upper")) {
		t.Errorf("the upper is still there: %+v", r)
	}
	wantNames(t, "frozen", n.filesOf(r.Frozen), "one")

	again, err := n.snapshot("s1")
	check(t, err)
	if again != made {
		t.Errorf("repeated: got %+v, want %+v", again, made)
	}
	// Nothing was written since.
	_, err = n.snapshot("s2")
	check(t, err)
	if len(n.frozen()) != 1 {
		t.Errorf("an upper that is absent was frozen: %v", n.frozen())
	}
	n.writeTo("two")
	_, err = n.snapshot("s3")
	check(t, err)
	wantNames(t, "frozen", n.filesOf(n.loaded("v").Frozen), "two", "one")

	list, more, err := n.manager.ListSnapshots("", 2, "")
	if err != nil || !more || len(list) != 2 || list[0].ID != "s1" {
		t.Errorf("listed %v, %v, %v", list, more, err)
	}
	if list, more, err := n.manager.ListSnapshots("s2", 0, "v"); err != nil || more || len(list) != 1 || list[0].ID != "s3" {
		t.Errorf("listed %v, %v, %v", list, more, err)
	}
	if list, _, err := n.manager.ListSnapshots("", 0, "other"); err != nil || len(list) != 0 {
		t.Errorf("listed of another volume: %v, %v", list, err)
	}
	if got, err := n.manager.GetSnapshot(t.Context(), "s1", nil); err != nil || got != made {
		t.Errorf("got %+v, %v", got, err)
	}
	// The volume keeps what its snapshots have.
	for _, id := range []string{"s1", "s2", "s3", "s3", "never", "../v"} {
		check(t, n.manager.DeleteSnapshot(t.Context(), id, nil))
	}
	wantNames(t, "after deleting the snapshots", n.filesOf(n.loaded("v").Frozen), "two", "one")
	check(t, n.manager.Delete(t.Context(), "v"))
	if left := n.frozen(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestSnapshotRefused(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(n *fakeNode)
		want    error
	}{
		"unknown volume": {func(*fakeNode) {}, errdefs.ErrNotFound},
		"an upper for each pod": {
			func(n *fakeNode) { n.publish(n.request("p", rwx, spec.KeyUpper, "pod")) }, errdefs.ErrInvalidArgument,
		},
		"name of another volume's": {func(n *fakeNode) {
			n.create()
			check(n.t, n.records.Snapshots().Save(&record.Snapshot{ID: "s", Name: "s", Volume: "other"}))
		}, errdefs.ErrAlreadyExists},
		"in use, and the backend cannot copy": {func(n *fakeNode) {
			n.create()
			n.publish(n.request("p", rwo))
			n.fail["copy in use"] = errdefs.ErrFailedPrecondition
		}, errdefs.ErrFailedPrecondition},
		"in use by a container that has not ended": {func(n *fakeNode) {
			n.written("file")
			n.busyUpper = true
		}, errdefs.ErrUnavailable},
		"the upper is gone": {func(n *fakeNode) {
			n.written("file")
			check(n.t, os.RemoveAll(filepath.Join(n.records.Dir("v"), "upper")))
		}, errdefs.ErrDataLoss},
		"too many": {func(n *fakeNode) {
			n.written("file")
			r := n.loaded("v")
			for range maxFrozen {
				r.Frozen = append(r.Frozen, record.Frozen{ID: upper.NewFrozenID(), Backend: r.Backend})
			}
			check(n.t, n.records.Save(r))
		}, errdefs.ErrFailedPrecondition},
		"a damaged snapshot of that name": {func(n *fakeNode) {
			n.create()
			check(n.t, n.records.Snapshots().Save(&record.Snapshot{ID: "s"}))
			check(n.t, os.WriteFile(filepath.Join(n.records.Snapshots().Dir("s"), dataroot.SnapshotRecord), []byte("x"), 0o600))
		}, errdefs.ErrDataLoss},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			c.prepare(n)
			before := n.state()
			_, err := n.snapshot("s")
			wantKind(t, err, c.want)
			if after := n.state(); after != before {
				t.Errorf("what was refused left\n%s\nwant\n%s", after, before)
			}
			if left := n.frozen(); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// TestSnapshotInUse: the volume does not change.
func TestSnapshotInUse(t *testing.T) {
	n := newFakeNode(t)
	n.create()
	n.publish(n.request("p", rwo))
	check(t, os.WriteFile(filepath.Join(n.records.Dir("v"), "upper", "one"), nil, 0o600))
	before := n.state()
	_, err := n.snapshot("s")
	check(t, err)
	if after := n.state(); after != before {
		t.Errorf("the volume has changed:\n%s\nwas\n%s", after, before)
	}
	check(t, os.WriteFile(filepath.Join(n.records.Dir("v"), "upper", "two"), nil, 0o600))
	made, err := n.records.Snapshots().Load("s")
	check(t, err)
	wantNames(t, "copied", n.filesOf(made.Frozen), "one")
	check(t, n.manager.DeleteSnapshot(t.Context(), "s", nil))
	if left := n.frozen(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func (n *fakeNode) copyingSnapshot(name string) error {
	_, err := n.manager.CreateSnapshot(n.t.Context(), SnapshotRequest{Name: name, Volume: "v", CopyInUse: true})
	return err
}

// TestSnapshotCopiesFiles: what cannot be copied at one moment is copied file by file, if that was asked for.
func TestSnapshotCopiesFiles(t *testing.T) {
	n := newFakeNode(t)
	n.written("one")
	check(t, n.copyingSnapshot("at rest"))
	req := n.publish(n.request("p", rwo))
	check(t, os.WriteFile(filepath.Join(n.records.Dir("v"), "upper", "two"), nil, 0o600))
	n.fail["copy in use"] = errdefs.ErrFailedPrecondition
	_, err := n.snapshot("at one moment")
	wantKind(t, err, errdefs.ErrFailedPrecondition)
	before := n.state()
	n.whileCopying = func() { check(t, n.manager.sweep(t.Context())) }
	check(t, n.copyingSnapshot("s"))
	if after := n.state(); after != before {
		t.Errorf("the volume has changed:\n%s\nwas\n%s", after, before)
	}
	made, err := n.records.Snapshots().Load("s")
	check(t, err)
	wantNames(t, "copied", n.filesOf(made.Frozen), "two", "one")

	left := n.frozen()
	n.fail["copy files"] = errForced
	wantKind(t, n.copyingSnapshot("fails"), errForced)
	clear(n.fail)
	n.measured = math.MaxInt64 / 2
	wantKind(t, n.copyingSnapshot("no room"), errdefs.ErrResourceExhausted)
	n.measured = 0
	// A pod does not wait until the copy is complete.
	unpublished := make(chan error, 1)
	n.copyUntilRevoked = true
	n.whileCopying = func() {
		go func() { unpublished <- n.manager.Unpublish(t.Context(), "v", req.Target) }()
	}
	wantKind(t, n.copyingSnapshot("unpublished"), errdefs.ErrAborted)
	check(t, <-unpublished)
	wantNames(t, "left by copies that failed", n.frozen(), left...)
	n.whileCopying, n.copyUntilRevoked = nil, false
	check(t, n.copyingSnapshot("unpublished"))
	for _, id := range []string{"at rest", "s", "unpublished"} {
		check(t, n.manager.DeleteSnapshot(t.Context(), HandleFor(id), nil))
	}
	check(t, n.manager.Delete(t.Context(), "v"))
	wantNames(t, "left in the end", n.frozen())
}

// TestSnapshotCopyOutlivesItsRequest: a repeated request waits for the copy that goes on.
func TestSnapshotCopyOutlivesItsRequest(t *testing.T) {
	n := newFakeNode(t)
	n.create()
	n.publish(n.request("p", rwo))
	begun, goOn := make(chan struct{}), make(chan struct{})
	n.whileCopying = func() { begun <- struct{}{}; <-goOn }
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error)
	request := SnapshotRequest{Name: "s", Volume: "v", CopyInUse: true}
	go func() {
		_, err := n.manager.CreateSnapshot(ctx, request)
		first <- err
	}()
	<-begun
	cancel()
	wantKind(t, <-first, context.Canceled)
	go func() {
		_, err := n.manager.CreateSnapshot(t.Context(), request)
		first <- err
	}()
	// Nobody else begins a copy.
	goOn <- struct{}{}
	check(t, <-first)
	if made, err := n.records.Snapshots().Load("s"); err != nil || len(made.Frozen) != 1 || len(n.frozen()) != 1 {
		t.Errorf("got %+v, %v, frozen %v", made, err, n.frozen())
	}
}

// TestSnapshotCrash: after each step at which the driver can end, the next one goes on, by whichever operation comes first, and nothing
// is left in the end.
func TestSnapshotCrash(t *testing.T) {
	crashes := map[string]func(n *fakeNode){
		"before the record": func(n *fakeNode) { n.fail["prepare freeze"] = errForced },
		"directory made, record not saved": func(n *fakeNode) {
			check(n.t, os.MkdirAll(fakeBackends{n}.frozenDir("0123"), 0o700))
		},
		"record saved, not renamed": func(n *fakeNode) { n.fail["freeze"] = errForced },
		"renamed, record not saved": func(n *fakeNode) {
			n.fail["freeze"] = errForced
			_, _ = n.snapshot("s")
			delete(n.fail, "freeze")
			r := n.loaded("v")
			check(n.t, fakeBackends{n}.Freeze(upper.Location{Base: dataroot.Volumes + "/v"}, r.Frozen[0].ID))
		},
		"frozen, snapshot not saved": func(n *fakeNode) {
			_, err := n.snapshot("s")
			check(n.t, err)
			check(n.t, os.RemoveAll(n.records.Snapshots().Dir("s")))
		},
		"snapshot's directory made": func(n *fakeNode) {
			_, err := n.snapshot("s")
			check(n.t, err)
			check(n.t, os.Remove(filepath.Join(n.records.Snapshots().Dir("s"), dataroot.SnapshotRecord)))
		},
	}
	next := map[string]func(n *fakeNode) error{
		"the same again": func(n *fakeNode) error { _, err := n.snapshot("s"); return err },
		"publish": func(n *fakeNode) error {
			req := n.request("p2", rwo)
			if err := n.manager.Publish(n.t.Context(), req); err != nil {
				return err
			}
			return n.manager.Unpublish(n.t.Context(), "v", req.Target)
		},
		"clone": func(n *fakeNode) error {
			_, err := n.clone("c", Source{Volume: "v"})
			if err != nil {
				return err
			}
			return n.manager.Delete(n.t.Context(), "c")
		},
		"reconcile": func(n *fakeNode) error { n.manager.reconcile(n.t.Context()); return nil },
		"delete":    func(n *fakeNode) error { return nil },
	}
	for crash, prepare := range crashes {
		for name, do := range next {
			t.Run(crash+", "+name, func(t *testing.T) {
				n := newFakeNode(t)
				n.written("file")
				prepare(n)
				_, _ = n.snapshot("s")
				clear(n.fail)
				n.boot(testBoot)
				check(t, do(n))
				if name != "delete" {
					r := n.loaded("v")
					if !r.Freezing {
						files := n.filesOf(r.Frozen)
						if entries, err := os.ReadDir(filepath.Join(n.records.Dir("v"), "upper")); err == nil {
							for _, entry := range entries {
								files = append(files, entry.Name())
							}
						}
						wantNames(t, "what was written", files, "file")
					} else {
						t.Error("it is still being frozen")
					}
				}
				check(t, n.manager.Delete(t.Context(), "v"))
				check(t, n.manager.DeleteSnapshot(t.Context(), "s", nil))
				n.manager.reconcile(t.Context())
				if left := n.frozen(); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
				if left, err := n.records.Snapshots().List(); err != nil || len(left) > 0 {
					t.Errorf("left behind: %v, %v", left, err)
				}
			})
		}
	}
}

// clone makes a volume of a source.
func (n *fakeNode) clone(name string, source Source, change ...func(*CreateRequest)) (Volume, error) {
	req := CreateRequest{Name: name, Spec: parsed(n.t, rwo), Access: rwo.Access, Source: source}
	for _, change := range change {
		change(&req)
	}
	return n.manager.Create(n.t.Context(), req)
}

func TestClone(t *testing.T) {
	for name, source := range map[string]Source{"of a snapshot": {Snapshot: "s"}, "of a volume": {Volume: "v"}} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			n.written("one")
			_, err := n.snapshot("s")
			check(t, err)
			made, err := n.clone("c", source)
			check(t, err)
			again, err := n.clone("c", source)
			check(t, err)
			if made.ID != "c" || again.ID != "c" {
				t.Errorf("got %+v, %+v", made, again)
			}
			_, err = n.clone("c", Source{Snapshot: "another"})
			wantKind(t, err, errdefs.ErrAlreadyExists)
			_, err = n.clone("c", Source{})
			wantKind(t, err, errdefs.ErrAlreadyExists)
			wantNames(t, "of the clone", n.filesOf(n.loaded("c").Frozen), "one")

			_, err = n.clone("c2", Source{Volume: "c"})
			check(t, err)
			check(t, n.manager.Delete(t.Context(), "v"))
			check(t, n.manager.DeleteSnapshot(t.Context(), "s", nil))
			check(t, n.manager.Delete(t.Context(), "c"))
			wantNames(t, "of the clone of the clone", n.filesOf(n.loaded("c2").Frozen), "one")
			check(t, n.manager.Delete(t.Context(), "c2"))
			if left := n.frozen(); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// TestCloneOfAVolumeInUseFails: the copy does not stay until the next reconciliation. A provisioner tries again and again.
func TestCloneOfAVolumeInUseFails(t *testing.T) {
	n := newFakeNode(t)
	n.create()
	n.publish(n.request("p", rwo))
	n.fail["choose"] = errForced
	_, err := n.clone("c", Source{Volume: "v"})
	wantKind(t, err, errForced)
	if left := n.frozen(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestCloneRefused(t *testing.T) {
	const gib = 1 << 30
	size := func(required, limit int64) func(*CreateRequest) {
		return func(req *CreateRequest) {
			req.Required, req.Limit, req.Spec.Size = required, limit, max(required, limit)
		}
	}
	for name, c := range map[string]struct {
		source Source
		change func(*CreateRequest)
		want   error
	}{
		"unknown snapshot": {Source{Snapshot: "never"}, nil, errdefs.ErrNotFound},
		"unknown volume":   {Source{Volume: "never"}, nil, errdefs.ErrNotFound},
		"itself":           {Source{Volume: "c"}, nil, errdefs.ErrNotFound},
		"a path":           {Source{Snapshot: "../volumes/v"}, nil, errdefs.ErrNotFound},
		"two sources":      {Source{Snapshot: "s", Volume: "v"}, nil, errdefs.ErrInvalidArgument},
		"smaller":          {Source{Snapshot: "s"}, size(gib/2, 0), errdefs.ErrOutOfRange},
		"limited to less":  {Source{Volume: "v"}, size(0, gib/2), errdefs.ErrOutOfRange},
		"another upper":    {Source{Snapshot: "s"}, func(req *CreateRequest) { req.Spec.Upper = spec.UpperPod }, errdefs.ErrInvalidArgument},
		"another ownership": {Source{Snapshot: "s"}, func(req *CreateRequest) {
			req.Spec.Ownership = spec.OwnershipChown
		}, errdefs.ErrInvalidArgument},
		"another layerOwner": {Source{Volume: "v"}, func(req *CreateRequest) {
			req.Spec.LayerOwner = &spec.IDs{UID: 1}
		}, errdefs.ErrInvalidArgument},
		"no size":                  {Source{Snapshot: "s"}, nil, nil},
		"less than any volume has": {Source{Volume: "v"}, func(req *CreateRequest) { req.Required, req.Spec.Size = 1, gib }, nil},
		"as large":                 {Source{Snapshot: "s"}, size(gib, gib), nil},
		"larger":                   {Source{Volume: "v"}, size(2*gib, 0), nil},
		"at most 2Gi":              {Source{Volume: "v"}, size(0, 2*gib), nil},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			n.create(spec.KeySizeLimit, "1Gi")
			r := n.loaded("v")
			r.Size = gib
			check(t, n.records.Save(r))
			_, err := n.snapshot("s")
			check(t, err)
			before := n.state()
			var changes []func(*CreateRequest)
			if c.change != nil {
				changes = append(changes, c.change)
			}
			made, err := n.clone("c", c.source, changes...)
			wantKind(t, err, c.want)
			if err == nil && made.Capacity < gib {
				t.Errorf("it has %d bytes", made.Capacity)
			}
			if after := n.state(); err != nil && after != before {
				t.Errorf("what was refused left\n%s\nwant\n%s", after, before)
			}
		})
	}
}

// TestCloneOfResolvedLayers: of a volume that a central controller had made, the node knows the digests alone.
func TestCloneOfResolvedLayers(t *testing.T) {
	digests := []string{"@sha256:" + strings.Repeat("a", 64), "@sha256:" + strings.Repeat("b", 64)}
	const image = "oci://registry.example.com/image:"
	layers := func(text string) []reference.Reference {
		list, err := reference.ParseList(text)
		check(t, err)
		return list
	}
	for requested, want := range map[string]error{
		image + "1": nil, image + "1" + digests[0]: nil,
		image + "2": errdefs.ErrInvalidArgument, image + "1" + digests[1]: errdefs.ErrInvalidArgument,
	} {
		source := &record.Snapshot{Spec: spec.Spec{Upper: spec.UpperClaim, Layers: layers(image + "1" + digests[0])}}
		req := CreateRequest{Spec: spec.Spec{Upper: spec.UpperClaim, Layers: layers(requested)}}
		if has := hasLayers(source, req.Spec.Layers); has != (want == nil) {
			t.Errorf("%s: has the layers of the source: %t", requested, has)
		}
		created := &record.Record{
			Spec: source.Spec, Provisioned: &record.Provisioned{Name: "c", Source: &Source{Volume: "v"}},
		}
		req.Name, req.Source = "c", Source{Volume: "v"}
		if err := checkCreated(created, req); (err == nil) != (want == nil) {
			t.Errorf("%s again: %v", requested, err)
		}
	}
}

// TestSweepWhileRecordsCannotBeRead: they may list any frozen upper.
func TestSweepWhileRecordsCannotBeRead(t *testing.T) {
	n := newFakeNode(t)
	n.written("file")
	_, err := n.snapshot("s")
	check(t, err)
	path := filepath.Join(n.records.Dir("v"), dataroot.Record)
	data, err := os.ReadFile(path)
	check(t, errors.Join(err, os.WriteFile(path, nil, 0o600)))
	check(t, n.manager.DeleteSnapshot(t.Context(), "s", nil))
	n.manager.reconcile(t.Context())
	if left := n.frozen(); len(left) != 1 {
		t.Fatalf("left of one: %v", left)
	}
	check(t, os.WriteFile(path, data, 0o600))
	wantNames(t, "after the record was restored", n.filesOf(n.loaded("v").Frozen), "file")
	check(t, n.manager.Delete(t.Context(), "v"))
	if left := n.frozen(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestSweepWhileChangesAreRead keeps what a push reads of a volume that is deleted, and discards what nobody reads.
func TestSweepWhileChangesAreRead(t *testing.T) {
	n := newFakeNode(t)
	n.written("read")
	changes, err := n.manager.CaptureChanges(t.Context(), "v")
	check(t, err)
	read := n.loaded("v").Frozen
	n.writeTo("not read")
	_, err = n.snapshot("s")
	check(t, err)
	check(t, n.manager.Delete(t.Context(), "v"))
	check(t, n.manager.DeleteSnapshot(t.Context(), "s", nil))
	wantNames(t, "left while it is read", n.frozen(), read[0].ID)
	changes.Close()
	n.manager.reconcile(t.Context())
	wantNames(t, "left afterwards", n.frozen())
}

// pushed asks for a snapshot of the claim "v" that is to be in a registry.
func (n *fakeNode) pushed(name string) (Snapshot, error) {
	n.t.Helper()
	h, err := portable.New("registry.example.com/team/snapshots", name, "node-1")
	check(n.t, err)
	return n.manager.CreateSnapshot(n.t.Context(), SnapshotRequest{Name: name, Volume: "v", Push: h})
}

// TestSweepWhileASnapshotIsPushed keeps what a push reads, and discards what nobody reads: a push may take hours.
func TestSweepWhileASnapshotIsPushed(t *testing.T) {
	n := newFakeNode(t)
	n.manager.snapshots.portable.Pushes = portable.NewPushes(t.Context(), 1)
	defer n.manager.snapshots.portable.Pushes.Close()
	n.manager.snapshots.send = func(context.Context, string, map[string]string) error { return nil }
	n.written("read")
	made, err := n.pushed("s")
	check(t, err)
	h, err := portable.Parse(made.ID)
	check(t, err)
	_, changes, err := n.manager.openSnapshot(t.Context(), h.RecordID())
	check(t, err)
	read := n.loaded("v").Frozen
	n.writeTo("not read")
	_, err = n.snapshot("other")
	check(t, err)
	check(t, n.manager.Delete(t.Context(), "v"))
	check(t, n.manager.DeleteSnapshot(t.Context(), "other", nil))
	wantNames(t, "left while it is pushed", n.frozen(), read[0].ID)
	check(t, n.manager.DeleteUnpushed(t.Context(), made.ID))
	wantNames(t, "left of a snapshot that was deleted", n.frozen(), read[0].ID)
	changes.Close()
	n.manager.reconcile(t.Context())
	wantNames(t, "left afterwards", n.frozen())
}

// TestErrorOfAPush: the snapshot is there, so that no error of its push is final to external-snapshotter.
func TestErrorOfAPush(t *testing.T) {
	n := newFakeNode(t)
	n.manager.snapshots.portable.Pushes = portable.NewPushes(t.Context(), 1)
	defer n.manager.snapshots.portable.Pushes.Close()
	refused := fmt.Errorf("%w: registry.example.com refuses", errdefs.ErrPermissionDenied)
	n.manager.snapshots.send = func(context.Context, string, map[string]string) error { return refused }
	n.written("file")
	var err error
	for err == nil {
		_, err = n.pushed("s")
	}
	if !errdefs.IsUnavailable(err) || errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), refused.Error()) {
		t.Errorf("the error is %v", err)
	}
}
