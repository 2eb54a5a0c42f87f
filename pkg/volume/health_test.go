package volume

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// TestCheckThatIsNotAnswered has a file system not answer: a caller waits for checkWait from the begin of the check, and as long as it
// runs, no other one begins.
func TestCheckThatIsNotAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		checks, answer := 0, make(chan struct{})
		c := &checker{}
		check := func() []string {
			found, err := c.run(t.Context(), "v", func(_ context.Context, current *healthCheck) {
				checks++
				current.asks("layer /a")
				<-answer
				current.found.add(Degraded, reasonLayerMissing, "layer /a is missing")
			})
			if err != nil {
				t.Error(err)
			}
			var reasons []string
			for _, condition := range found {
				reasons = append(reasons, condition.Reason)
			}
			return reasons
		}
		for i := range 3 {
			began := time.Now()
			if got := check(); !slices.Equal(got, []string{reasonDoesNotAnswer}) {
				t.Errorf("check %d found %q", i, got)
			}
			want := checkWait
			if i > 0 {
				want = 0
			}
			if took := time.Since(began); took != want {
				t.Errorf("check %d took %s, want %s", i, took, want)
			}
		}
		if checks != 1 {
			t.Errorf("%d checks began", checks)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		c.running["w"] = &healthCheck{began: time.Now()}
		c.running["w"].asks("layer /b")
		if found, err := c.run(ctx, "w", nil); err == nil {
			t.Errorf("after the end of the request: %v", found)
		}
		close(answer)
		synctest.Wait()
		if got := check(); !slices.Equal(got, []string{reasonLayerMissing}) || checks != 2 {
			t.Errorf("after the answer, check %d found %q", checks, got)
		}
	})
}

// TestHealthBesideAnOperation: what a check finds of a view that is unmounted or mounted meanwhile is not wrong with it.
func TestHealthBesideAnOperation(t *testing.T) {
	wantHealthy := func(t *testing.T, n *fakeNode, target string) {
		t.Helper()
		if found, err := n.manager.Health(t.Context(), "v", target); err != nil || len(found) > 0 {
			t.Errorf("found %v, %v", found, err)
		}
	}
	t.Run("unpublish amid the check", func(t *testing.T) {
		n := newFakeNode(t)
		req := n.publish(n.request("p1", inline))
		n.onCheck = func() error {
			check(t, n.manager.Unpublish(t.Context(), "v", req.Target))
			return errdefs.ErrNotFound
		}
		wantHealthy(t, n, req.Target)
	})
	t.Run("publish amid the check", func(t *testing.T) {
		n := newFakeNode(t)
		req := n.publish(n.request("p1", rwo))
		clear(n.mounts)
		n.onAt = func() {
			n.onAt = nil
			check(t, n.manager.Publish(t.Context(), req))
		}
		wantHealthy(t, n, req.Target)
	})
	t.Run("upper that is gone", func(t *testing.T) {
		n := newFakeNode(t)
		req := n.publish(n.request("p1", inline))
		n.onCheck = func() error { return errdefs.ErrNotFound }
		found, err := n.manager.Health(t.Context(), "v", req.Target)
		if err != nil || len(found) != 1 || found[0].Reason != reasonUpperLost {
			t.Errorf("found %v, %v", found, err)
		}
	})
}
