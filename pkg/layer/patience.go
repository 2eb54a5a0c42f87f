package layer

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// patience is how long the file system of a layer has for an answer. A local one takes microseconds; one of a server that is away never
// answers. It is shorter than a check of health may take, which can then say what does not answer.
const patience = 4 * time.Second

// endsWithin is how long do has to end after its context has. What waits for kubelet or the API server does so at once.
const endsWithin = time.Second

// maxOverdue is how many answers of one root may be overdue before it is asked for nothing more. It is more than one because other
// file systems may be mounted beneath a root.
const maxOverdue = 8

// ErrDoesNotAnswer says that the file system of a layer does not answer. It is an ErrUnavailable.
var ErrDoesNotAnswer = fmt.Errorf("%w: the file system does not answer", errdefs.ErrUnavailable)

// questions are what file systems of layers have been asked and have not answered in time. Each keeps a thread of this process until it
// is answered, so that none is asked again before.
type questions struct {
	mu sync.Mutex
	// overdue has when each question began, by its root and by what is asked for beneath it.
	overdue map[string]map[string]time.Time
}

// question is one that may be asked: to open what is at a path beneath a root.
type question struct {
	all        *questions
	root, path string
	patience   time.Duration
}

// begin returns a question. It returns ErrDoesNotAnswer if the answer to an earlier one is overdue.
func (q *questions) begin(root, path string, patience time.Duration) (question, error) {
	return question{q, root, path, patience}, q.refuse(root, path)
}

// open calls do, which opens the file, and has the file system answer for the file. It returns ErrDoesNotAnswer if that takes too long,
// and waits for a second at most when ctx has ended. What do returns later is closed.
func (q question) open(ctx context.Context, do func() (*os.File, error)) (*os.File, error) {
	type answer struct {
		file *os.File
		err  error
	}
	began := time.Now()
	answered, left := make(chan answer), make(chan struct{})
	go func() {
		file, err := do()
		if err == nil {
			// What was opened may have been remembered of a server that is away. The mount would wait for it.
			err = linux.Revalidate(file)
		}
		select {
		case answered <- answer{file, err}:
			return
		case <-left:
			q.all.end(q.root, q.path)
		}
		if file != nil {
			file.Close()
		}
	}()
	timer := time.NewTimer(q.patience)
	defer timer.Stop()
	ended := ctx.Done()
	for waiting := true; waiting; {
		select {
		case a := <-answered:
			if a.err != nil && a.file != nil {
				a.file.Close()
			}
			return a.file, a.err
		case <-ended:
			ended = nil
			timer.Reset(endsWithin)
		case <-timer.C:
			waiting = false
		}
	}
	q.all.setOverdue(q.root, q.path, began)
	close(left)
	if ctx.Err() != nil {
		return nil, fmt.Errorf("wait for %s: %w", q.root, context.Cause(ctx))
	}
	return nil, noAnswer(q.root, q.path, began)
}

// refuse returns an error if a question must not be asked now.
func (q *questions) refuse(root, path string) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	overdue := q.overdue[root]
	if began, ok := overdue[path]; ok {
		return noAnswer(root, path, began)
	}
	if len(overdue) >= maxOverdue {
		for other, began := range overdue {
			return noAnswer(root, other, began)
		}
	}
	return nil
}

func (q *questions) setOverdue(root, path string, began time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.overdue == nil {
		q.overdue = map[string]map[string]time.Time{}
	}
	if q.overdue[root] == nil {
		q.overdue[root] = map[string]time.Time{}
	}
	q.overdue[root][path] = began
}

func (q *questions) end(root, path string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.overdue[root], path)
	if len(q.overdue[root]) == 0 {
		delete(q.overdue, root)
	}
}

func noAnswer(root, path string, began time.Time) error {
	if path != "" {
		root = fmt.Sprintf("%q in %s", path, root)
	}
	return fmt.Errorf("%s: %w since %s; find out whether its disk or server is there",
		root, ErrDoesNotAnswer, began.UTC().Format(time.RFC3339))
}
