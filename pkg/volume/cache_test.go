package volume

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// cacheJob publishes an inline volume that is committed to the cache "deps", and writes a file to it as a pod would.
func (n *fakeNode) cacheJob(name string) PublishRequest {
	n.t.Helper()
	layers, err := reference.ParseList("cache://deps,dir://layers/a")
	check(n.t, err)
	req := n.publish(PublishRequest{
		VolumeID: "csi-" + name, Target: n.target(name), Inline: true, Pod: kubelet.Pod{Namespace: "ci", Name: name, UID: name},
		Spec: spec.Spec{Layers: layers, Upper: spec.UpperPod, Commit: "deps"},
	})
	check(n.t, os.WriteFile(filepath.Join(n.records.Dir(req.VolumeID), "upper", name), nil, 0o600))
	return req
}

func (n *fakeNode) cache() *record.Cache {
	n.t.Helper()
	cache, err := n.records.Caches().Load(record.CacheKey{Namespace: "ci", Name: "deps"})
	check(n.t, err)
	return cache
}

// TestCommitCrashes has the process end after each step of a commit, and another cache version be committed before it goes on.
func TestCommitCrashes(t *testing.T) {
	for _, call := range []string{"prepare freeze", "freeze", "discard"} {
		for _, later := range []bool{false, true} {
			name := call
			if later {
				name += ", another is committed first"
			}
			t.Run(name, func(t *testing.T) {
				n := newFakeNode(t)
				n.phase = corev1.PodSucceeded
				base := n.cacheJob("base")
				check(t, n.manager.Unpublish(t.Context(), base.VolumeID, base.Target))
				req, other := n.cacheJob("one"), n.cacheJob("two")
				r := n.loaded(req.VolumeID)
				wantNames(t, "the volume is on", n.filesOf(n.cache().Frozen()), "base")
				check(t, n.manager.views.unmountAndRemove(req.Target))

				n.fail[call] = errForced
				left, here := r.Without(req.Target), r.Publication(req.Target)
				err := n.manager.tryCommit(t.Context(), record.CacheKey{Namespace: "ci", Name: "deps"}, r, here)
				if err == nil {
					err = n.manager.forgetPublication(r, left, req.Target)
				}
				if err == nil {
					t.Fatal("nothing failed")
				}
				delete(n.fail, call)
				n.boot(testBoot)
				if later {
					check(t, n.manager.Unpublish(t.Context(), other.VolumeID, other.Target))
				}
				check(t, n.manager.Unpublish(t.Context(), req.VolumeID, req.Target))
				files := n.filesOf(n.cache().Frozen())
				if later && len(files) == 2 && files[0] == "two" {
					// It had begun before the other one.
					files[0] = "one"
				}
				wantNames(t, "the cache has", files, "one", "base")
				if !later {
					check(t, n.manager.Unpublish(t.Context(), other.VolumeID, other.Target))
				}
				check(t, n.manager.sweep(t.Context()))
				listed := map[string]bool{}
				for _, frozen := range slices.Concat(n.cache().Versions, n.cache().Before) {
					listed[frozen.ID] = true
				}
				wantNames(t, "the frozen uppers are", n.frozen(), slices.Sorted(maps.Keys(listed))...)
				if exists(filepath.Join(n.dir, "data", dataroot.Volumes, req.VolumeID)) {
					t.Error("the volume is left")
				}
			})
		}
	}
}

// TestCommitAfterReboot: what a pod wrote before the node went down was not synced.
func TestCommitAfterReboot(t *testing.T) {
	n := newFakeNode(t)
	n.phase = corev1.PodSucceeded
	req := n.cacheJob("one")
	clear(n.mounts)
	n.boot("boot-2")
	check(t, n.manager.Unpublish(t.Context(), req.VolumeID, req.Target))
	if keys, err := n.records.Caches().List(); err != nil || len(keys) > 0 {
		t.Errorf("caches %v, %v", keys, err)
	}
}

// TestCommitOfCanceledUnpublish: kubelet or the driver is stopped while a commit waits for the phase. The next unpublish goes on.
func TestCommitOfCanceledUnpublish(t *testing.T) {
	n := newFakeNode(t)
	n.phase = corev1.PodRunning
	req := n.cacheJob("one")
	ctx, cancel := context.WithCancel(t.Context())
	n.onPhase = cancel
	if err := n.manager.Unpublish(ctx, req.VolumeID, req.Target); !errors.Is(err, context.Canceled) {
		t.Errorf("the canceled unpublish returns %v", err)
	}
	n.onPhase, n.phase = nil, corev1.PodSucceeded
	check(t, n.manager.Unpublish(t.Context(), req.VolumeID, req.Target))
	wantNames(t, "the cache has", n.filesOf(n.cache().Frozen()), "one")
}
