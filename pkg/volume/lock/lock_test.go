package lock

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestLocks(t *testing.T) {
	l := NewLocks()
	unlock, err := l.Acquire(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := l.Acquire(ctx, "a"); !errdefs.IsAborted(err) {
		t.Errorf("the volume is taken: %v", err)
	}
	if _, ok := l.TryAcquire("a"); ok {
		t.Error("took a volume that is taken")
	}
	other, ok := l.TryAcquire("b")
	if !ok {
		t.Fatal("another volume waits")
	}
	other()
	unlock()
	if len(l.held) != 0 {
		t.Errorf("%d locks are left", len(l.held))
	}
	var group sync.WaitGroup
	counter := 0
	failed := make(chan error, 50)
	for range 50 {
		group.Go(func() {
			unlock, err := l.Acquire(t.Context(), "a")
			if err != nil {
				failed <- err
				return
			}
			counter++
			unlock()
		})
	}
	group.Wait()
	close(failed)
	if err := <-failed; err != nil || counter != 50 || len(l.held) != 0 {
		t.Errorf("%v, counted %d, %d locks left", errors.Join(err), counter, len(l.held))
	}
}
