package overlay

import (
	"errors"
	"runtime"
	"syscall"
	"testing"
)

// TestAskedOnce: a file system that does not answer is not asked again, and is once it has answered.
func TestAskedOnce(t *testing.T) {
	var q questions
	answer, asked := make(chan error), make(chan struct{})
	hangs := func() (mountRoot, error) {
		asked <- struct{}{}
		return mountRoot{isRoot: true}, <-answer
	}
	first := make(chan error)
	go func() {
		_, err := q.ask("/hung", hangs)
		first <- err
	}()
	<-asked
	if _, err := q.ask("/hung", hangs); !errors.Is(err, errNoAnswer) {
		t.Errorf("asked while it does not answer: %v", err)
	}
	if !q.isOpen("/hung") || q.isOpen("/other") {
		t.Error("the question is not open, or another one is")
	}
	if root, err := q.ask("/other", func() (mountRoot, error) { return mountRoot{magic: 1}, nil }); err != nil || root.magic != 1 {
		t.Errorf("another file system: %v, %v", root, err)
	}
	answer <- syscall.EIO
	if err := <-first; !errors.Is(err, syscall.EIO) && !errors.Is(err, errNoAnswer) {
		t.Errorf("the first question: %v", err)
	}
	for !q.begin("/hung") {
		runtime.Gosched()
	}
	q.end("/hung")
	if root, err := q.ask("/hung", func() (mountRoot, error) { return mountRoot{magic: 2}, nil }); err != nil || root.magic != 2 {
		t.Errorf("asked after it has answered: %v, %v", root, err)
	}
}
