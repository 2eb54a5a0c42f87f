package volume

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

const mib = 1 << 20

// sized publishes a claim of 64 MiB.
func (n *fakeNode) sized() PublishRequest {
	n.t.Helper()
	req := n.request("p1", rwo, spec.KeySizeLimit, "64Mi")
	return n.publish(req)
}

// TestExpandFails has each step of an expansion fail. The record keeps the size that the upper has at least, and the next try
// succeeds.
func TestExpandFails(t *testing.T) {
	for _, call := range []string{"at", "grow"} {
		t.Run(call, func(t *testing.T) {
			n := newFakeNode(t)
			req := n.sized()
			before, inUse := n.state(), maps.Clone(n.inUse)
			n.fail[call] = errForced
			_, err := n.manager.Expand(t.Context(), "v", req.Target, 128*mib, 0)
			wantKind(t, err, errForced)
			n.wantAsBefore(before, inUse)
			delete(n.fail, call)
			wantExpanded(t, n, req, 128*mib)
		})
	}
}

// TestNobodyWaitsForAGrowth: resize2fs and fsync take seconds. Meanwhile others reserve, but not the bytes of the growth.
func TestNobodyWaitsForAGrowth(t *testing.T) {
	n := newFakeNode(t)
	req := n.sized()
	free, err := n.manager.Capacity(t.Context())
	check(t, err)
	meanwhile := false
	n.whileGrowing = func() {
		meanwhile = true
		left, err := n.manager.Capacity(t.Context())
		check(t, err)
		// Others write to this disk too.
		if taken := free - left; taken < 60*mib {
			t.Errorf("%d bytes are taken while a volume grows by 64 MiB", taken)
		}
		_, err = n.manager.Create(t.Context(), CreateRequest{Name: "other", Spec: parsed(t, rwo, spec.KeySizeLimit, "8Mi"), Access: rwo.Access})
		check(t, err)
	}
	wantExpanded(t, n, req, 128*mib)
	if !meanwhile {
		t.Error("the upper did not grow")
	}
	if len(n.manager.ledger.growing) != 0 {
		t.Errorf("there are still bytes reserved for a growth: %v", n.manager.ledger.growing)
	}
}

// TestReservingEndsWithTheRequest has somebody else's turn take long.
func TestReservingEndsWithTheRequest(t *testing.T) {
	n := newFakeNode(t)
	check(t, n.manager.ledger.turn.Acquire(t.Context(), 1))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := n.manager.Create(ctx, CreateRequest{Name: "v", Spec: parsed(t, rwo, spec.KeySizeLimit, "8Mi"), Access: rwo.Access})
	wantKind(t, err, context.DeadlineExceeded)
	if exists(n.records.Dir("v")) {
		t.Error("a volume was made")
	}
	// One that reserves nothing does not wait.
	none := parsed(t, rwo, spec.KeySizeLimit, "8Mi", spec.KeySizeEnforcement, "none")
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := n.manager.Create(ctx, CreateRequest{Name: "none", Spec: none, Access: rwo.Access}); err != nil {
		t.Errorf("a volume that reserves nothing: %v", err)
	}
	n.manager.ledger.turn.Release(1)
	n.create(spec.KeySizeLimit, "8Mi")
}

func wantExpanded(t *testing.T, n *fakeNode, req PublishRequest, want int64) {
	t.Helper()
	got, err := n.manager.Expand(t.Context(), "v", req.Target, want, 0)
	check(t, err)
	r, err := n.records.Load("v")
	check(t, err)
	if got != want || r.Size != want {
		t.Errorf("expanded to %d, in the record %d, want %d", got, r.Size, want)
	}
	for base, limit := range n.limits {
		if limit.Bytes != want {
			t.Errorf("limit of %s is %d bytes, want %d", base, limit.Bytes, want)
		}
	}
}

// TestExpandRefuses asks for what an expansion cannot do.
func TestExpandRefuses(t *testing.T) {
	const huge = 1 << 60
	for name, row := range map[string]struct {
		prepare         func(n *fakeNode) PublishRequest
		required, limit int64
		want            error
	}{
		"more than the node has": {(*fakeNode).sized, huge, 0, errdefs.ErrResourceExhausted},
		"limit below the size":   {(*fakeNode).sized, 0, 32 * mib, errdefs.ErrOutOfRange},
		"upper in another volume": {func(n *fakeNode) PublishRequest {
			return n.publish(publishes["inline, in another volume"](n))
		}, 128 * mib, 0, errdefs.ErrInvalidArgument},
		"not mounted": {func(n *fakeNode) PublishRequest {
			req := n.sized()
			clear(n.mounts)
			return req
		}, 128 * mib, 0, errdefs.ErrFailedPrecondition},
		"not published": {func(n *fakeNode) PublishRequest {
			n.sized()
			return n.request("p9", rwo)
		}, 128 * mib, 0, errdefs.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			req := row.prepare(n)
			before, inUse := n.state(), maps.Clone(n.inUse)
			_, err := n.manager.Expand(t.Context(), "v", req.Target, row.required, row.limit)
			wantKind(t, err, row.want)
			n.wantAsBefore(before, inUse)
		})
	}
}

// TestExpandAgain asks for a size that the volume has.
func TestExpandAgain(t *testing.T) {
	n := newFakeNode(t)
	req := n.sized()
	wantExpanded(t, n, req, 128*mib)
	wantExpanded(t, n, req, 128*mib)
	if got, err := n.manager.Expand(t.Context(), "v", req.Target, 32*mib, 0); err != nil || got != 128*mib {
		t.Errorf("expanded to %d, %v; want the size that it has, 128 MiB", got, err)
	}
}

// TestCapacityWhileAnUpperGrows: what an upper takes of the disk while its size is asked for does not count both as free and as its own.
func TestCapacityWhileAnUpperGrows(t *testing.T) {
	needs.Root(t)
	n := newFakeNode(t)
	root := fakeRoot{n}
	check(t, unix.Mount("tmpfs", root.Path(), "tmpfs", 0, "size=1g"))
	t.Cleanup(func() { _ = unix.Unmount(root.Path(), unix.MNT_DETACH) })
	check(t, os.Mkdir(root.VolumesDir(), 0o700))
	free, err := n.manager.Capacity(t.Context())
	check(t, err)
	n.sized()
	n.onDiskUsage = func() int64 {
		file, err := os.Create(filepath.Join(root.Path(), "disk.img"))
		check(t, err)
		defer file.Close()
		check(t, linux.Reserve(file, 64*mib))
		return 64 * mib
	}
	left, err := n.manager.Capacity(t.Context())
	check(t, err)
	if free-left < 64*mib {
		t.Errorf("%d bytes are taken, want 64 MiB", free-left)
	}
}
