package volume

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// TestUnpublish unpublishes every kind of volume.
func TestUnpublish(t *testing.T) {
	persistent := []string{
		"static claim", "static claim, first pod with an fsGroup", "provisioned claim, first pod", "provisioned claim, next pod",
		"claim, pods that share",
	}
	for name, prepare := range publishes {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			req := n.publish(prepare(n))
			others := len(n.mounts) - 1
			for range 2 {
				check(t, n.manager.Unpublish(t.Context(), "v", req.Target))
			}
			if len(n.mounts) != others || n.mounts[req.Target] != overlay.Nothing || exists(req.Target) {
				t.Errorf("mounts %v, target there: %t", n.mounts, exists(req.Target))
			}
			if len(n.inUse) != others {
				t.Errorf("in use %v beside %d other pods", slices.Collect(maps.Keys(n.inUse)), others)
			}
			_, err := n.records.Load("v")
			if wantGone := others == 0 && !slices.Contains(persistent, name); errdefs.IsNotFound(err) != wantGone {
				t.Errorf("the record is there: %v, want it gone: %t", err, wantGone)
			}
			if exists(filepath.Join(n.records.Dir("v"), dataroot.PodUppers, "p2")) {
				t.Error("the upper of the pod is still there")
			}
		})
	}
}

// TestUnpublishFails has each call that an unpublish makes fail. kubelet asks again, and the second time finds everything.
func TestUnpublishFails(t *testing.T) {
	for _, row := range []struct {
		name, volume, call string
		cause, want        error
		mounted            bool
	}{
		{"mount table unreadable", "inline", "at", errForced, errForced, true},
		{"files open", "inline", "unmount", syscall.EBUSY, errdefs.ErrUnavailable, true},
		{"unmount fails", "inline", "unmount", syscall.EIO, syscall.EIO, true},
		{"release fails", "inline", "release", errForced, errForced, false},
		{"release fails", "static claim", "release", errForced, errForced, false},
		{"release fails", "inline, in another volume", "release", errForced, errForced, false},
		{"discard fails", "inline", "discard", errForced, errForced, false},
		{"discard fails", "claim, an upper for each pod", "discard", errForced, errForced, false},
	} {
		t.Run(row.volume+"/"+row.name, func(t *testing.T) {
			n := newFakeNode(t)
			req := n.publish(publishes[row.volume](n))
			n.fail[row.call] = row.cause
			wantKind(t, n.manager.Unpublish(t.Context(), "v", req.Target), row.want)
			delete(n.fail, row.call)
			if mounted := n.mounts[req.Target] == overlay.Overlay; mounted != row.mounted {
				t.Errorf("mounted: %t, want %t", mounted, row.mounted)
			}
			r, err := n.records.Load("v")
			check(t, err)
			if r.Publication(req.Target) == nil {
				t.Error("the record has lost the publication, so that nobody finishes the unpublish")
			}
			check(t, n.manager.Unpublish(t.Context(), "v", req.Target))
			if _, err := n.records.Load("v"); err == nil && req.Inline {
				t.Error("the record is still there after the second try")
			}
			if n.mounts[req.Target] != overlay.Nothing {
				t.Error("the view is still mounted after the second try")
			}
		})
	}
}

// TestUnpublishOddStates unpublishes what the driver did not leave so.
func TestUnpublishOddStates(t *testing.T) {
	for name, row := range map[string]struct {
		prepare func(n *fakeNode, target string)
		want    error
	}{
		"no record and no mount": {func(n *fakeNode, _ string) { check(n.t, os.RemoveAll(n.records.Dir("v"))); clear(n.mounts) }, nil},
		"no record":              {func(n *fakeNode, _ string) { check(n.t, os.RemoveAll(n.records.Dir("v"))) }, nil},
		"another file system":    {func(n *fakeNode, target string) { n.mounts[target] = overlay.Other }, errdefs.ErrFailedPrecondition},
		"a file in the target": {func(n *fakeNode, target string) {
			check(n.t, os.WriteFile(filepath.Join(target, "file"), nil, 0o600))
		}, errdefs.ErrFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			req := n.publish(n.request("p1", inline))
			row.prepare(n, req.Target)
			wantKind(t, n.manager.Unpublish(t.Context(), "v", req.Target), row.want)
			if row.want == nil && n.mounts[req.Target] != overlay.Nothing {
				t.Error("still mounted")
			}
		})
	}
}

// TestUnpublishLeavesTheOtherPods unpublishes one of two pods that share an upper.
func TestUnpublishLeavesTheOtherPods(t *testing.T) {
	n := newFakeNode(t)
	req := n.publish(publishes["claim, pods that share"](n))
	check(t, n.manager.Unpublish(t.Context(), "v", req.Target))
	r, err := n.records.Load("v")
	check(t, err)
	if len(r.Publications) != 1 || r.Spec.Upper != spec.UpperClaim || len(n.inUse) != 1 || len(n.mounts) != 1 {
		t.Errorf("publications %v, in use %v, mounts %v", r.Publications, n.inUse, n.mounts)
	}
}

// TestBusyMountOfNobody: a view of the pod that has a busy mount of its own does not explain another busy mount, which may be that of the
// volume whose record is gone.
func TestBusyMountOfNobody(t *testing.T) {
	n := newFakeNode(t)
	live := n.publish(n.request("p1", inline, spec.KeyUpper, "volume://scratch"))
	r, err := n.records.Load(live.VolumeID)
	check(t, err)
	target := filepath.Join(filepath.Dir(live.Target), "without-record")
	unpublish := func(others ...upper.LockHolder) error {
		unknown := upper.PodVolumePath{Volume: r.Publications[0].PodVolume.Volume, Path: "renamed"}
		n.found = upper.FoundPodVolumes{Others: others, Unknown: []upper.PodVolumePath{unknown}}
		return n.manager.unrecorded.releasePodVolumes(t.Context(), "w", target)
	}
	check(t, unpublish())
	wantKind(t, unpublish(upper.LockHolder{VolumeID: live.VolumeID, Target: live.Target}), errdefs.ErrDataLoss)
	// Nor does a disk that cannot be read explain it.
	check(t, os.Rename(fakeRoot{n}.VolumesDir(), n.dir+"/moved"))
	wantKind(t, unpublish(), errdefs.ErrDataLoss)
}
