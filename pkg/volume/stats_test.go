package volume

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// TestCountOutlivesItsCaller: kubelet waits for two minutes, and asks again.
func TestCountOutlivesItsCaller(t *testing.T) {
	var cache usageCache
	counts, release := 0, make(chan struct{})
	want := Stats{Bytes: linux.Space{Used: 42}}
	measure := func(ctx context.Context) (Stats, error) {
		counts++
		select {
		case <-release:
			return want, nil
		case <-ctx.Done():
			return Stats{}, ctx.Err()
		}
	}
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := cache.get(ctx, "v", measure); !errdefs.IsUnavailable(err) {
			t.Errorf("%v while the files are counted", err)
		}
		cancel()
	}
	close(release)
	for range 2 {
		if got, err := cache.get(t.Context(), "v", measure); err != nil || got != want {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if counts != 1 {
		t.Errorf("%d counts, want 1", counts)
	}

	// The next count takes longer than its caller waits, who gets the result before.
	cache.counts["v"].until = time.Time{}
	release = make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if got, err := cache.get(ctx, "v", measure); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}

	running := cache.counts["v"]
	cache.forget("v")
	if !running.isDone() || !errors.Is(running.err, context.Canceled) {
		t.Errorf("a forgotten count ended with %v", running.err)
	}
	cache.forget("v")
	failed := errors.New("failed")
	fails := func(context.Context) (Stats, error) {
		counts++
		return Stats{}, failed
	}
	for range 2 {
		if _, err := cache.get(t.Context(), "v", fails); !errors.Is(err, failed) {
			t.Errorf("%v, want %v", err, failed)
		}
	}
	if counts != 4 {
		t.Errorf("%d counts, want 4: an error is not remembered", counts)
	}
}
