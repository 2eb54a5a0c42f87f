package overlay

import (
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
)

// TestAskedOnce: a file system that does not answer is not asked again, and is once it has answered.
func TestAskedOnce(t *testing.T) { synctest.Test(t, testAskedOnce) }

func testAskedOnce(t *testing.T) {
	var q questions
	answer := make(chan error)
	hangs := func() (mountRoot, error) { return mountRoot{isRoot: true}, <-answer }
	first := make(chan error)
	go func() {
		_, err := q.ask("/hung", hangs)
		first <- err
	}()
	synctest.Wait()
	if _, err := q.ask("/hung", hangs); !errors.Is(err, errNoAnswer) {
		t.Errorf("asked while it has not answered: %v", err)
	}
	if q.isOverdue("/hung") {
		t.Error("the answer is overdue at once, and a view in use would be unmounted lazily")
	}
	if err := <-first; !errors.Is(err, errNoAnswer) {
		t.Errorf("the first question: %v", err)
	}
	if !q.isOverdue("/hung") || q.isOverdue("/other") {
		t.Error("the answer is not overdue, or another one is")
	}
	if root, err := q.ask("/other", func() (mountRoot, error) { return mountRoot{magic: 1}, nil }); err != nil || root.magic != 1 {
		t.Errorf("another file system: %v, %v", root, err)
	}
	answer <- syscall.EIO
	synctest.Wait()
	if root, err := q.ask("/hung", func() (mountRoot, error) { return mountRoot{magic: 2}, nil }); err != nil || root.magic != 2 {
		t.Errorf("asked after it has answered: %v, %v", root, err)
	}
}
