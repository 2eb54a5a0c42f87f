package volume

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

var (
	inline = spec.Scope{Inline: true}
	rwo    = spec.Scope{Access: spec.ReadWriteOnce}
	rwop   = spec.Scope{Access: spec.ReadWriteOncePod}
	rwx    = spec.Scope{Access: spec.ReadWriteMany}
)

// request returns a request to publish volume "v" for a pod.
func (n *fakeNode) request(pod string, scope spec.Scope, keys ...string) PublishRequest {
	return PublishRequest{
		VolumeID: "v", Target: n.target(pod), Spec: parsed(n.t, scope, keys...), Inline: scope.Inline, Access: scope.Access,
		Pod: kubelet.Pod{Name: pod, UID: pod},
	}
}

func (n *fakeNode) publish(req PublishRequest) PublishRequest {
	n.t.Helper()
	check(n.t, n.manager.Publish(n.t.Context(), req))
	return req
}

// create makes the volume "v" of a claim.
func (n *fakeNode) create(keys ...string) {
	n.t.Helper()
	_, err := n.manager.Create(n.t.Context(), CreateRequest{Name: "v", Spec: parsed(n.t, rwo, keys...), Access: rwo.Access})
	check(n.t, err)
}

// publishes are volumes before a publish. Each row prepares a node and returns the request that is made on it.
var publishes = map[string]func(n *fakeNode) PublishRequest{
	"inline": func(n *fakeNode) PublishRequest { return n.request("p1", inline) },
	"inline, unmounted by hand": func(n *fakeNode) PublishRequest {
		req := n.publish(n.request("p1", inline))
		delete(n.mounts, req.Target)
		return req
	},
	"inline, after a reboot": func(n *fakeNode) PublishRequest {
		req := n.publish(n.request("p1", inline))
		clear(n.mounts)
		clear(n.inUse)
		n.boot("boot-2")
		return req
	},
	"inline, read-only": func(n *fakeNode) PublishRequest { return n.request("p1", inline, spec.KeyUpper, "none") },
	"inline, in another volume": func(n *fakeNode) PublishRequest {
		return n.request("p1", inline, spec.KeyUpper, "volume://scratch")
	},
	"static claim": func(n *fakeNode) PublishRequest { return n.request("p1", rwo) },
	"static claim, first pod with an fsGroup": func(n *fakeNode) PublishRequest {
		needs.Root(n.t) // Nobody else gives a directory to any group.
		first := n.publish(n.request("p1", rwo))
		check(n.t, n.manager.Unpublish(n.t.Context(), "v", first.Target))
		req, group := n.request("p2", rwo), uint32(2000)
		req.Group = &group
		return req
	},
	"provisioned claim, first pod": func(n *fakeNode) PublishRequest {
		n.create()
		req := n.request("p1", rwo)
		req.Provisioned = true
		return req
	},
	"provisioned claim, next pod": func(n *fakeNode) PublishRequest {
		n.create()
		first := n.publish(n.request("p1", rwo))
		check(n.t, n.manager.Unpublish(n.t.Context(), "v", first.Target))
		req := n.request("p2", rwo)
		req.Provisioned = true
		return req
	},
	"claim, pods that share": func(n *fakeNode) PublishRequest {
		n.publish(n.request("p1", rwo))
		return n.request("p2", rwo)
	},
	"claim, an upper for each pod": func(n *fakeNode) PublishRequest {
		n.publish(n.request("p1", rwx, spec.KeyUpper, "pod"))
		return n.request("p2", rwx, spec.KeyUpper, "pod")
	},
}

// TestPublishUndo has each step of a publish fail, before and after it has done its work. The node must then be as it was,
// and the same publish must succeed afterwards.
func TestPublishUndo(t *testing.T) {
	for name, prepare := range publishes {
		for i, step := range (&publishing{}).steps() {
			for _, when := range []string{"before", "after"} {
				t.Run(fmt.Sprintf("%s/%s/%s", name, step.name, when), func(t *testing.T) {
					t.Parallel()
					n := newFakeNode(t)
					req := prepare(n)
					before, inUse := n.state(), maps.Clone(n.inUse)
					failAt(t, n, req, i, when == "before")
					n.wantAsBefore(before, inUse)
					n.publish(req)
					wantPublished(t, n, req)
				})
			}
		}
	}
}

// failAt publishes with one step that fails.
func failAt(t *testing.T, n *fakeNode, req PublishRequest, failing int, first bool) {
	t.Helper()
	p := &publishing{m: n.manager, req: req}
	steps := p.steps()
	do := steps[failing].do
	steps[failing].do = func(ctx context.Context) error {
		if first {
			return errForced
		}
		return errors.Join(do(ctx), errForced)
	}
	err := p.run(t.Context(), steps)
	p.close()
	wantKind(t, err, errForced)
}

func wantPublished(t *testing.T, n *fakeNode, req PublishRequest) {
	t.Helper()
	if n.mounts[req.Target] != overlay.Overlay {
		t.Errorf("no view at the target: %v", n.mounts)
	}
	r, err := n.records.Load(req.VolumeID)
	check(t, err)
	if p := r.Publication(req.Target); p == nil || p.BootID != n.manager.config.BootID {
		t.Errorf("publication %+v in the record", p)
	}
	view := n.views[req.Target]
	if hasUpper := req.Spec.Upper != spec.UpperNone; (view.Upper != nil) != hasUpper {
		t.Errorf("the view has an upper: %t, want %t", view.Upper != nil, hasUpper)
	}
	if volatile := req.Spec.Upper == spec.UpperPod; view.Volatile != volatile {
		t.Errorf("the view is volatile: %t, want %t", view.Volatile, volatile)
	}
}

// TestPublishCalls has each call that a publish makes fail, where no step is replaced.
func TestPublishCalls(t *testing.T) {
	for _, row := range []struct{ volume, call string }{
		{"inline, unmounted by hand", "at"}, {"inline", "resolve"}, {"inline", "choose"}, {"inline", "prepare"}, {"inline", "overlay"},
		{"inline, unmounted by hand", "upper in use"}, {"inline, unmounted by hand", "clear work"},
		{"inline, in another volume", "pod volume"}, {"inline, in another volume", "prepare"}, {"inline, read-only", "overlay"},
		{"provisioned claim, next pod", "upper in use"}, {"claim, pods that share", "bind"},
	} {
		t.Run(row.volume+"/"+row.call, func(t *testing.T) {
			n := newFakeNode(t)
			req := publishes[row.volume](n)
			before, inUse := n.state(), maps.Clone(n.inUse)
			n.fail[row.call] = errForced
			wantKind(t, n.manager.Publish(t.Context(), req), errForced)
			n.wantAsBefore(before, inUse)
			delete(n.fail, row.call)
			n.publish(req)
			wantPublished(t, n, req)
		})
	}
}

// TestPublishAgain publishes a volume that is published.
func TestPublishAgain(t *testing.T) {
	group := uint32(1000)
	for name, row := range map[string]struct {
		volume string
		change func(n *fakeNode, req *PublishRequest)
		want   error
	}{
		"the same":             {"inline", func(*fakeNode, *PublishRequest) {}, nil},
		"another group":        {"inline", func(_ *fakeNode, req *PublishRequest) { req.Group = &group }, errdefs.ErrAlreadyExists},
		"another mount option": {"inline", func(_ *fakeNode, req *PublishRequest) { req.Attributes.NoExec = true }, errdefs.ErrAlreadyExists},
		"another upper":        {"inline", func(_ *fakeNode, req *PublishRequest) { req.Spec.Upper = spec.UpperNone }, errdefs.ErrAlreadyExists},
		"a second pod, inline": {"inline", func(n *fakeNode, req *PublishRequest) { req.Target = n.target("p9") }, errdefs.ErrFailedPrecondition},
		"a second pod, claim":  {"static claim", func(n *fakeNode, req *PublishRequest) { req.Target = n.target("p9") }, nil},
		"another group, shared": {"static claim", func(n *fakeNode, req *PublishRequest) {
			req.Target, req.Group = n.target("p9"), &group
		}, errdefs.ErrFailedPrecondition},
		"another access mode": {"static claim", func(_ *fakeNode, req *PublishRequest) {
			req.Access = rwop.Access
		}, errdefs.ErrAlreadyExists},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			req := n.publish(publishes[row.volume](n))
			row.change(n, &req)
			before, inUse := n.state(), maps.Clone(n.inUse)
			err := n.manager.Publish(t.Context(), req)
			wantKind(t, err, row.want)
			if err != nil {
				n.wantAsBefore(before, inUse)
			}
		})
	}
}

// TestPublishRefuses publishes onto nodes that do not have what the volume needs.
func TestPublishRefuses(t *testing.T) {
	for name, row := range map[string]struct {
		volume  string
		prepare func(n *fakeNode, req *PublishRequest)
		want    error
	}{
		"persistent upper without a record": {"static claim", func(n *fakeNode, _ *PublishRequest) {
			check(n.t, os.MkdirAll(filepath.Join(n.records.Dir("v"), "upper"), 0o755))
		}, errdefs.ErrDataLoss},
		"uppers of pods without a record": {"static claim", func(n *fakeNode, req *PublishRequest) {
			*req = n.request("p1", rwx, spec.KeyUpper, "pod")
			check(n.t, os.MkdirAll(filepath.Join(n.records.Dir("v"), "pods", "p0"), 0o755))
		}, errdefs.ErrDataLoss},
		"mounted inline view without a record": {"inline", func(n *fakeNode, req *PublishRequest) {
			*req = n.publish(*req)
			check(n.t, os.Remove(filepath.Join(n.records.Dir("v"), "volume.json")))
		}, errdefs.ErrDataLoss},
		"persistent upper with an empty record": {"provisioned claim, next pod", func(n *fakeNode, _ *PublishRequest) {
			n.writeRecord("")
		}, record.ErrDamaged},
		"damaged record": {"static claim", func(n *fakeNode, _ *PublishRequest) { n.writeRecord("{") }, record.ErrDamaged},
		"provisioned on another node": {"static claim", func(_ *fakeNode, req *PublishRequest) {
			req.Provisioned = true
		}, errdefs.ErrNotFound},
		"lost upper": {"provisioned claim, next pod", func(n *fakeNode, _ *PublishRequest) {
			check(n.t, os.RemoveAll(filepath.Join(n.records.Dir("v"), "upper")))
		}, errdefs.ErrDataLoss},
		"upper that is still mounted": {"provisioned claim, next pod", func(n *fakeNode, _ *PublishRequest) {
			n.busyUpper = true
		}, errdefs.ErrUnavailable},
		"something else at the target": {"inline", func(n *fakeNode, req *PublishRequest) {
			check(n.t, os.Mkdir(req.Target, 0o750))
			n.mounts[req.Target] = overlay.Other
		}, errdefs.ErrFailedPrecondition},
		"what is at the target is not known": {"inline", func(n *fakeNode, req *PublishRequest) {
			check(n.t, os.Mkdir(req.Target, 0o750))
			n.fail["at"] = errForced
		}, errForced},
		"no directory for the target": {"inline", func(n *fakeNode, req *PublishRequest) {
			req.Target = filepath.Join(n.dir, "pods", "absent", "mount")
		}, errdefs.ErrFailedPrecondition},
		"a file at the target": {"inline", func(n *fakeNode, req *PublishRequest) {
			check(n.t, os.WriteFile(req.Target, nil, 0o600))
		}, errdefs.ErrInvalidArgument},
		"request that ends while layers are resolved": {"inline", nil, context.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			req := publishes[row.volume](n)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if row.prepare != nil {
				row.prepare(n, &req)
			} else {
				n.onResolve = cancel
			}
			before, inUse := n.state(), maps.Clone(n.inUse)
			wantKind(t, n.manager.Publish(ctx, req), row.want)
			n.wantAsBefore(before, inUse)
		})
	}
}

// writeRecord writes what is no record of volume "v".
func (n *fakeNode) writeRecord(content string) {
	n.t.Helper()
	check(n.t, os.MkdirAll(n.records.Dir("v"), 0o700))
	check(n.t, os.WriteFile(filepath.Join(n.records.Dir("v"), dataroot.Record), []byte(content), 0o600))
}
