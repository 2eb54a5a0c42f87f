package volume

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"
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
