package chaos

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// snapshot is a snapshot of a claim.
type snapshot struct {
	id string
	origin
	files *upper
}

func (s *snapshot) source() *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: s.id}}}
}

func (c *claim) source() *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: c.ID}}}
}

// persistent returns a claim with one upper, or nil.
func (w *world) persistent() *claim {
	found := slices.DeleteFunc(slices.Clone(w.claims), func(c *claim) bool { return c.upper == nil })
	if len(found) == 0 {
		return nil
	}
	return pick(w, found...)
}

// hasViews reports whether a pod has the claim. published is set if it is certain that a view of it is mounted.
func (w *world) hasViews(c *claim) (has, published bool) {
	for _, p := range w.pods {
		for _, v := range p.views {
			if v.claim == c {
				has, published = true, published || v.published
			}
		}
	}
	return has, published
}

// mayRefuseCopyOf says of which answers a snapshot or clone of a claim may be refused with: while pods have it, those that cannot be copied
// at one moment; ones that there is no room for; and lists of frozen uppers that are too long.
func (w *world) mayRefuseCopyOf(c *claim) func(error) bool {
	has, _ := w.hasViews(c)
	return func(err error) bool {
		message := status.Convert(err).Message()
		return status.Code(err) == codes.ResourceExhausted || status.Code(err) == codes.FailedPrecondition &&
			(strings.Contains(message, "frozen uppers") || has && strings.Contains(message, "while pods write") && !w.canCopyInUse(c))
	}
}

// canCopyInUse reports whether the backend of a claim can be copied at one moment.
func (w *world) canCopyInUse(c *claim) bool {
	description, err := w.node.Admin().Volume(w.t.Context(), c.ID)
	return err == nil && (description.Backend == "disk-image" || description.Backend == "btrfs-qgroup")
}

// snapshotSomething makes a snapshot of a claim, at rest or in use.
func (w *world) snapshotSomething() {
	if c := w.persistent(); c != nil && len(w.snapshots) < 8 {
		w.snapshot(c)
	}
}

// snapshot makes a snapshot of a claim. It returns nil where it was refused.
func (w *world) snapshot(c *claim) *snapshot {
	w.t.Helper()
	name := w.name("snapshot-" + filepath.Base(w.node.Dir))
	w.tell("%s of %s", name, c.Name)
	var made atomic.Pointer[csi.Snapshot]
	take := func() (refused, err error) {
		_, published := w.hasViews(c)
		refused, err = w.mayRefuse("CreateSnapshot", w.mayRefuseCopyOf(c), func(ctx context.Context) error {
			response, err := w.node.Controller().CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: c.ID})
			if err == nil {
				made.Store(response.GetSnapshot())
			}
			return err
		})
		if _, still := w.hasViews(c); !published || !still {
			c.made = false
		}
		return refused, err
	}
	refused, err := take()
	if err != nil {
		// The sidecar goes on until it knows.
		w.mend()
		refused, err = take()
	}
	must(w.t, err)
	w.checkViewsOf(c)
	if refused != nil {
		return nil
	}
	s := &snapshot{id: made.Load().GetSnapshotId(), origin: c.origin, files: c.upper.clone()}
	s.parameters = maps.Clone(c.parameters)
	s.size = max(made.Load().GetSizeBytes(), 16<<20)
	if made.Load().GetSizeBytes() > c.size || !made.Load().GetReadyToUse() || made.Load().GetSourceVolumeId() != c.ID {
		w.fatalf("made %v of a claim of %d bytes", made.Load(), c.size)
	}
	w.total.snapshots++
	w.snapshots = append(w.snapshots, s)
	return s
}

// checkViewsOf looks at what pods see of a claim.
func (w *world) checkViewsOf(c *claim) {
	w.t.Helper()
	for _, p := range w.pods {
		for _, v := range p.views {
			if v.claim == c && v.published {
				w.checkView(p, v)
			}
		}
	}
}

// restore makes a claim that begins with what a snapshot or another claim has.
func (w *world) restore() {
	if len(w.claims) > 10 {
		return
	}
	var made *claim
	if c := w.persistent(); c != nil && (w.oneIn(2) || len(w.snapshots) == 0) {
		_, published := w.hasViews(c)
		made = w.cloneOf(c.origin, c.upper, c.source(), c)
		if _, still := w.hasViews(c); !published || !still {
			c.made = false
		}
		w.checkViewsOf(c)
	} else if len(w.snapshots) > 0 {
		s := pick(w, w.snapshots...)
		made = w.cloneOf(s.origin, s.files, s.source())
	}
	if made != nil {
		w.claims = append(w.claims, made)
	}
}

// cloneOf makes a claim of a snapshot, or of a claim. It returns nil where that was refused.
func (w *world) cloneOf(from origin, files *upper, source *csi.VolumeContentSource, of ...*claim) *claim {
	w.t.Helper()
	name := w.name("clone-" + filepath.Base(w.node.Dir))
	c := &claim{origin: from, upper: files.clone()}
	c.parameters = maps.Clone(from.parameters)
	if from.parameters["ownership"] == "" && w.oneIn(3) {
		delete(c.parameters, "sizeEnforcement")
		if enforcement := pick(w, "", "none", "image"); enforcement != "" {
			c.parameters["sizeEnforcement"] = enforcement
		}
	}
	c.size = from.size + int64(w.random.IntN(3))<<20
	w.tell("%s of %v: %v, %d bytes", name, source, c.parameters, c.size)
	mayRefuse := func(err error) bool { return status.Code(err) == codes.ResourceExhausted }
	if len(of) > 0 {
		mayRefuse = w.mayRefuseCopyOf(of[0])
	}
	if !w.create(name, c, source, mayRefuse) {
		return nil
	}
	w.total.clones++
	return c
}

func (w *world) deleteSnapshot() {
	if len(w.snapshots) == 0 || w.fault != noFault {
		return
	}
	w.removeSnapshot(pick(w, w.snapshots...))
}

func (w *world) removeSnapshot(s *snapshot) {
	w.t.Helper()
	w.tell("delete snapshot %s", s.id)
	w.mustCall("DeleteSnapshot", func(ctx context.Context) error {
		_, err := w.node.Controller().DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: s.id})
		return err
	})
	w.snapshots = slices.DeleteFunc(w.snapshots, func(other *snapshot) bool { return other == s })
}

// chainLength is one more than the frozen uppers that are left alone (flatten.MaxFrozen).
const chainLength = 17

// chain makes so many snapshots of a claim, with something written between them, that frozen uppers are merged in the background. Most of
// the snapshots are deleted meanwhile.
func (w *world) chain() {
	c := w.unused()
	if c == nil || c.upper == nil || w.fault != noFault {
		return
	}
	w.tell("a chain of snapshots of %s", c.Name)
	for i := range chainLength {
		created, err := w.node.NewPod(w.name("link"))
		must(w.t, err)
		p := &pod{Pod: created}
		w.pods = append(w.pods, p)
		v := &view{Volume: c.Volume, claim: c, layers: c.layers, upper: c.upper}
		p.views = []*view{v}
		w.publish(p, v)
		for range 3 {
			w.changeView(p, v)
		}
		w.endPod(p)
		if w.hasStarted {
			w.publishAgain()
		}
		s := w.snapshot(c)
		if s == nil {
			return
		}
		if len(w.snapshots) > 8 || i%4 > 0 {
			w.removeSnapshot(s)
		}
	}
}

// list looks at the lists of volumes and snapshots, page by page.
func (w *world) list() {
	if w.fault != noFault {
		return
	}
	w.tell("list")
	var volumes, snapshots []string
	var token string
	for next := true; next; next = token != "" {
		must(w.t, w.once(func(ctx context.Context) error {
			response, err := w.node.Controller().ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: 3, StartingToken: token})
			for _, entry := range response.GetEntries() {
				volumes = append(volumes, entry.GetVolume().GetVolumeId())
			}
			token = response.GetNextToken()
			return err
		}))
	}
	for next := true; next; next = token != "" {
		must(w.t, w.once(func(ctx context.Context) error {
			response, err := w.node.Controller().ListSnapshots(ctx, &csi.ListSnapshotsRequest{MaxEntries: 2, StartingToken: token})
			for _, entry := range response.GetEntries() {
				snapshots = append(snapshots, entry.GetSnapshot().GetSnapshotId())
			}
			token = response.GetNextToken()
			return err
		}))
	}
	var wantVolumes, wantSnapshots []string
	for _, c := range w.claims {
		if c.upper != nil {
			wantVolumes = append(wantVolumes, c.ID)
		}
	}
	for _, s := range w.snapshots {
		wantSnapshots = append(wantSnapshots, s.id)
	}
	for _, ids := range []*[]string{&volumes, &wantVolumes, &snapshots, &wantSnapshots} {
		slices.Sort(*ids)
	}
	if !slices.Equal(volumes, wantVolumes) || !slices.Equal(snapshots, wantSnapshots) {
		w.fatalf("listed are the volumes %v and the snapshots %v, and there are %v and %v", volumes, snapshots, wantVolumes, wantSnapshots)
	}
}

// badSnapshot makes requests that must be refused, and must change nothing.
func (w *world) badSnapshot() {
	if w.fault != noFault {
		return
	}
	refuse := func(do func(ctx context.Context) error, want ...codes.Code) {
		w.t.Helper()
		if err := w.once(do); !slices.Contains(want, status.Code(err)) {
			w.fatalf("answered with %v, want %s", err, want)
		}
	}
	snapshotOf := func(name, volume string) func(ctx context.Context) error {
		return func(ctx context.Context) error {
			_, err := w.node.Controller().CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume})
			return err
		}
	}
	w.tell("bad snapshots")
	name := w.name("bad-" + filepath.Base(w.node.Dir))
	refuse(snapshotOf(name, "missing"), codes.NotFound)
	for _, c := range w.claims {
		if c.upper == nil {
			// Before the first pod, the node does not know of it.
			refuse(snapshotOf(name, c.ID), codes.InvalidArgument, codes.NotFound)
		}
	}
	if len(w.snapshots) == 0 {
		return
	}
	s := pick(w, w.snapshots...)
	createFrom := func(size int64, parameters map[string]string) func(ctx context.Context) error {
		return func(ctx context.Context) error {
			_, err := w.node.Controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
				Name: name, Parameters: parameters, VolumeContentSource: s.source(), CapacityRange: &csi.CapacityRange{RequiredBytes: size},
				VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)},
			})
			return err
		}
	}
	if s.size > 16<<20 {
		refuse(createFrom(16<<20-1, s.parameters), codes.OutOfRange)
	}
	other := maps.Clone(s.parameters)
	other["upper"] = "pod"
	refuse(createFrom(s.size, other), codes.InvalidArgument)
}

// publishBesideUnpublish publishes a volume of a claim and unpublishes it at once, as when kubelet was restarted. Whatever came first, the
// next publish must work, and show what was written.
func (w *world) publishBesideUnpublish() {
	p, v := w.published()
	if v == nil || v.claim == nil || v.claim.upper == nil || w.fault != noFault {
		return
	}
	w.tell("publish beside unpublish: %s of %s", v.Name, p.Name)
	must(w.t, os.MkdirAll(filepath.Dir(p.Target(v.Name)), 0o750))
	request := p.Request(v.Volume)
	var results []<-chan error
	for i := range 4 {
		results = append(results, w.start(func(ctx context.Context) (err error) {
			if i%2 == 0 {
				_, err = w.node.NodeService().NodePublishVolume(ctx, request)
			} else {
				_, err = w.node.NodeService().NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{
					VolumeId: request.GetVolumeId(), TargetPath: request.GetTargetPath()})
			}
			return err
		}))
	}
	for i, result := range results {
		if err := <-result; err != nil {
			w.judge(fmt.Sprint("RPC ", i, " of them"), err)
		}
	}
	w.publish(p, v)
}
