package volume

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// TestReconcile compares what a node has with what is left after a reconciliation.
func TestReconcile(t *testing.T) {
	for name, row := range map[string]struct {
		prepare func(n *fakeNode)
		// record and mounted say what is left. held is how many uppers keep kubelet from unmounting the volume that holds them, and yielded how
		// many let it.
		record, mounted bool
		held, yielded   int
	}{
		"mounted view": {prepare: func(n *fakeNode) { n.publish(n.request("p1", inline)) }, record: true, mounted: true, held: 1},
		"mounted view of a pod that is gone": {prepare: func(n *fakeNode) {
			n.publish(n.request("p1", inline))
			n.gone["p1"] = true
		}, record: true, mounted: true, held: 1},
		"mounted view without an upper": {prepare: func(n *fakeNode) {
			n.publish(n.request("p1", inline, spec.KeyUpper, "none"))
		}, record: true, mounted: true},
		"ephemeral, pod gone": {prepare: func(n *fakeNode) {
			n.publish(n.request("p1", inline))
			clear(n.mounts)
			n.gone["p1"] = true
		}},
		"ephemeral, pod there": {prepare: func(n *fakeNode) {
			n.publish(n.request("p1", inline))
			clear(n.mounts)
		}, record: true, yielded: 1},
		"persistent, pod gone": {prepare: func(n *fakeNode) {
			n.publish(n.request("p1", rwo))
			clear(n.mounts)
			n.gone["p1"] = true
		}, record: true},
		"persistent, never published": {prepare: func(n *fakeNode) { n.create() }, record: true},
		"read-only, pod there": {prepare: func(n *fakeNode) {
			n.publish(n.request("p1", inline, spec.KeyUpper, "none"))
			clear(n.mounts)
		}, record: true},
		"in another volume, pod there": {prepare: func(n *fakeNode) {
			n.publish(n.request("p1", inline, spec.KeyUpper, "volume://scratch"))
			clear(n.mounts)
		}, record: true, yielded: 1},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			row.prepare(n)
			for range 2 {
				n.held, n.yielded = 0, 0
				n.manager.reconcile(t.Context())
			}
			if _, err := n.records.Load("v"); (err == nil) != row.record {
				t.Errorf("the record is left: %t (%v), want %t", err == nil, err, row.record)
			}
			if mounted := n.mounts[n.target("p1")] == overlay.Overlay; mounted != row.mounted {
				t.Errorf("mounted: %t, want %t", mounted, row.mounted)
			}
			if n.held != row.held || n.yielded != row.yielded {
				t.Errorf("%d uppers held and %d yielded, want %d and %d", n.held, n.yielded, row.held, row.yielded)
			}
			if !row.record && exists(n.records.Dir("v")) {
				t.Error("the directory of the volume is left")
			}
		})
	}
}

// TestReconcileLeavesOneBehind: a volume whose file system does not answer holds up neither the others nor the next reconciliation.
func TestReconcileLeavesOneBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t)
		n.publish(n.request("p1", inline))
		answer := make(chan struct{})
		n.onHold = func() { <-answer }
		other := n.records.Dir("w")
		for range 2 {
			check(t, os.Mkdir(other, 0o700))
			n.manager.reconcile(t.Context())
			if exists(other) {
				t.Error("the other volume was not reconciled")
			}
		}
		close(answer)
		synctest.Wait()
		unlock, ok := n.manager.locks.TryAcquire("v")
		if !ok {
			t.Fatal("the volume is still locked after its file system has answered")
		}
		unlock()
		if n.held != 1 {
			t.Errorf("the file system was asked %d times", n.held)
		}
	})
}

// TestReconcileGoesOnAfterAPublication: a publication that cannot be reconciled does not keep the others of its volume from it.
func TestReconcileGoesOnAfterAPublication(t *testing.T) {
	n := newFakeNode(t)
	n.publish(n.request("p1", rwx, spec.KeyUpper, "pod"))
	gone := n.publish(n.request("p2", rwx, spec.KeyUpper, "pod"))
	delete(n.mounts, gone.Target)
	n.gone["p2"] = true
	n.fail["hold"] = errForced
	n.manager.reconcile(t.Context())
	r, err := n.records.Load("v")
	check(t, err)
	if r.Publication(gone.Target) != nil {
		t.Error("the publication of a pod that is gone is left")
	}
	if len(r.Publications) != 1 {
		t.Errorf("%d publications are left", len(r.Publications))
	}
}

// TestReconcileOfManySlowVolumes: the time that the start of a driver takes does not grow with each view whose file system is slow.
func TestReconcileOfManySlowVolumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNode(t)
		const volumes, slow = 4 * parallelReconciles, time.Second
		for i := range volumes {
			request := n.request(fmt.Sprint("p", i), inline)
			request.VolumeID = fmt.Sprint("v", i)
			n.publish(request)
		}
		n.onHold = func() { time.Sleep(slow) }
		began := time.Now()
		n.manager.reconcile(t.Context())
		if took := time.Since(began); n.held != volumes || took != slow*volumes/parallelReconciles {
			t.Errorf("%d of %d volumes in %s", n.held, volumes, took)
		}
	})
}

// TestReconcileWithoutRecord leaves alone what somebody may still want. What it discards may be all that a power cut has left of an
// ephemeral volume.
func TestReconcileWithoutRecord(t *testing.T) {
	inlineID := "csi-" + strings.Repeat("0a", 32)
	makeUppers := func(id string, names ...string) func(n *fakeNode) {
		return func(n *fakeNode) {
			for _, name := range names {
				check(n.t, os.MkdirAll(filepath.Join(n.records.Dir(id), name), 0o700))
			}
		}
	}
	for name, row := range map[string]struct {
		id      string
		prepare func(n *fakeNode)
		left    bool
	}{
		"empty directory":                   {"v", makeUppers("v", ""), false},
		"upper":                             {"v", makeUppers("v", "upper"), true},
		"uppers of pods":                    {"v", makeUppers("v", "pods/p1/upper"), false},
		"uppers of pods that are mounted":   {"v", func(n *fakeNode) { makeUppers("v", "pods/p1/upper")(n); n.busyUpper = true }, true},
		"uppers of pods and another":        {"v", makeUppers("v", "pods/p1/upper", "upper"), true},
		"marked uppers of pods":             {"v", makeUppers("v", "pods/p1/upper", "persistent"), true},
		"upper of an inline volume":         {inlineID, makeUppers(inlineID, "upper"), false},
		"mounted upper of an inline volume": {inlineID, func(n *fakeNode) { makeUppers(inlineID, "upper")(n); n.busyUpper = true }, true},
		"empty record of a persistent volume": {"v", func(n *fakeNode) {
			n.create()
			n.writeRecord("")
		}, true},
		"empty record of an ephemeral volume": {"v", func(n *fakeNode) {
			n.publish(n.request("p1", inline))
			n.writeRecord("")
		}, false},
		"damaged record": {"v", func(n *fakeNode) { n.writeRecord("{") }, true},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			row.prepare(n)
			n.manager.reconcile(t.Context())
			if left := exists(n.records.Dir(row.id)); left != row.left {
				t.Errorf("the directory is left: %t, want %t", left, row.left)
			}
		})
	}
}

// TestReconcileSkipsBusyVolumes leaves a volume alone that an RPC is working on.
func TestReconcileSkipsBusyVolumes(t *testing.T) {
	n := newFakeNode(t)
	n.publish(n.request("p1", inline))
	clear(n.mounts)
	n.gone["p1"] = true
	unlock, err := n.manager.locks.Acquire(t.Context(), "v")
	check(t, err)
	n.manager.reconcile(t.Context())
	if _, err := n.records.Load("v"); err != nil {
		t.Errorf("the record of a volume that is being worked on: %v", err)
	}
	unlock()
	n.manager.reconcile(t.Context())
	if exists(n.records.Dir("v")) {
		t.Error("the volume is left although its pod is gone")
	}
}
