package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// TestFileSystemThatDoesNotAnswer: a publish is answered, and the file system is not asked again before it answers.
func TestFileSystemThatDoesNotAnswer(t *testing.T) {
	synctest.Test(t, testFileSystemThatDoesNotAnswer)
}

func testFileSystemThatDoesNotAnswer(t *testing.T) {
	var q questions
	answer := make(chan struct{})
	var asked atomic.Int32
	opened := make(chan *os.File, 2*maxOverdue)
	hangs := func() (*os.File, error) {
		asked.Add(1)
		<-answer
		file, err := os.Open("/")
		opened <- file
		return file, err
	}
	ask := func(ctx context.Context, root, path string, do func() (*os.File, error)) (time.Duration, error) {
		began := time.Now()
		question, err := q.begin(root, path, patience)
		if err != nil {
			return time.Since(began), err
		}
		file, err := question.open(ctx, do)
		if err == nil {
			file.Close()
		}
		return time.Since(began), err
	}
	refused := func(root, path string, want time.Duration) {
		t.Helper()
		took, err := ask(t.Context(), root, path, hangs)
		if !errors.Is(err, ErrDoesNotAnswer) || !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), root) || took != want {
			t.Errorf("%s in %s: after %s: %v", path, root, took, err)
		}
	}
	refused("layer root a", "0", patience)
	refused("layer root a", "0", 0)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if took, err := ask(ctx, "layer root a", "1", hangs); !errors.Is(err, context.DeadlineExceeded) || took != time.Second+endsWithin {
		t.Errorf("the request ended: after %s: %v", took, err)
	}
	for i := range maxOverdue - 2 {
		refused("layer root a", fmt.Sprint(i+2), patience)
	}
	refused("layer root a", "another", 0)
	if n := asked.Load(); n != maxOverdue {
		t.Errorf("%d questions, want %d", n, maxOverdue)
	}
	// What waits for something else than a file system ends with the request, and may be asked again.
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		took, err := ask(ctx, "volume", "", func() (*os.File, error) {
			<-ctx.Done()
			time.Sleep(time.Millisecond)
			return nil, ctx.Err()
		})
		if !errors.Is(err, context.DeadlineExceeded) || took > 2*time.Second {
			t.Errorf("the request ended: after %s: %v", took, err)
		}
		cancel()
	}
	// Another root, and a fault that is none of these.
	for name, want := range map[string]error{"answers": nil, "fails": os.ErrNotExist} {
		_, err := ask(t.Context(), "layer root b", name, func() (*os.File, error) {
			if want != nil {
				return nil, want
			}
			return os.Open("/")
		})
		if !errors.Is(err, want) {
			t.Errorf("another root %s: %v", name, err)
		}
	}
	close(answer)
	synctest.Wait()
	for range maxOverdue {
		file := <-opened
		if _, err := file.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("what was opened late is open: %v", err)
		}
	}
	if took, err := ask(t.Context(), "layer root a", "0", hangs); err != nil || took != 0 || len(q.overdue) > 0 {
		t.Errorf("after the answer: after %s: %v, overdue: %v", took, err, q.overdue)
	}
}
