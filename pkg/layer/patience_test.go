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
		file, err := q.askOne(ctx, patience, root, path, do)
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

// TestFileSystemsAskedInTurn: each file system has the same time for its answer, and only the one that does not answer is not asked
// again.
func TestFileSystemsAskedInTurn(t *testing.T) {
	synctest.Test(t, testFileSystemsAskedInTurn)
}

func testFileSystemsAskedInTurn(t *testing.T) {
	var q questions
	hung := make(chan struct{})
	opened := make(chan *os.File, 10)
	after := func(wait time.Duration, hung <-chan struct{}) func() (*os.File, error) {
		return func() (*os.File, error) {
			time.Sleep(wait)
			if hung != nil {
				<-hung
			}
			file, err := os.Open("/")
			opened <- file
			return file, err
		}
	}
	ask := func(ctx context.Context, second <-chan struct{}) (answers []answer, took time.Duration, err error) {
		began := time.Now()
		answers, err = q.ask(ctx, patience, func(asked *question) error {
			_, firstErr := asked.open("layer root a", "first", after(patience-time.Second, nil))
			_, secondErr := asked.open("layer root a", "second", after(patience-time.Second, second))
			_, thirdErr := asked.open("layer root b", "", after(patience-time.Second, nil))
			return errors.Join(firstErr, secondErr, thirdErr)
		})
		return answers, time.Since(began), err
	}
	answers, took, err := ask(t.Context(), nil)
	if err != nil || len(answers) != 3 || took != 3*(patience-time.Second) {
		t.Errorf("slow file systems: after %s: %d files, %v", took, len(answers), err)
	}
	for _, opened := range answers {
		opened.file.Close()
	}
	for len(opened) > 0 {
		<-opened
	}
	_, took, err = ask(t.Context(), hung)
	if !errors.Is(err, ErrDoesNotAnswer) || !strings.Contains(err.Error(), "second") || took != 2*patience-time.Second {
		t.Errorf("the second does not answer: after %s: %v", took, err)
	}
	// The answer that there is keeps no file system from being unmounted.
	synctest.Wait()
	if first := <-opened; len(opened) > 0 {
		t.Error("more than the first was opened")
	} else if _, err := first.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("what the first opened is open while the second does not answer: %v", err)
	}
	for path, want := range map[string]error{"first": nil, "second": ErrDoesNotAnswer} {
		file, err := q.askOne(t.Context(), patience, "layer root a", path, func() (*os.File, error) { return os.Open("/") })
		if !errors.Is(err, want) {
			t.Errorf("ask the %s: %v", path, err)
		}
		file.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, took, err = ask(ctx, nil); !errors.Is(err, context.DeadlineExceeded) || took != time.Second+endsWithin {
		t.Errorf("the request ended: after %s: %v", took, err)
	}
	close(hung)
	time.Sleep(time.Minute)
	synctest.Wait()
	if len(q.overdue) > 0 {
		t.Errorf("after the answers, overdue: %v", q.overdue)
	}
	// The third was not asked after the second, and for the request that had ended only the first was.
	if n := len(opened); n != 1+1 {
		t.Errorf("%d were opened", n)
	}
	for len(opened) > 0 {
		file := <-opened
		if _, err := file.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("what was opened late is open: %v", err)
		}
	}
}

// TestRootsOfOthersAreClosed: while one root does not answer, another one is not kept open, and the one that is asked is.
func TestRootsOfOthersAreClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q questions
		hung := make(chan struct{})
		var closed [2]atomic.Bool
		names := []string{"layer root a", "layer root b"}
		_, err := q.ask(t.Context(), patience, func(asked *question) error {
			for i, name := range names {
				if _, err := asked.open(name, "", func() (*os.File, error) {
					asked.keep(name, func() { closed[i].Store(true) })
					if i == 1 {
						<-hung
					}
					return os.Open("/")
				}); err != nil {
					return err
				}
			}
			return nil
		})
		synctest.Wait()
		if !errors.Is(err, ErrDoesNotAnswer) || !closed[0].Load() || closed[1].Load() {
			t.Errorf("%v; a is closed: %t, b: %t", err, closed[0].Load(), closed[1].Load())
		}
		close(hung)
		synctest.Wait()
		if !closed[1].Load() {
			t.Error("b is open after its answer")
		}
	})
}
