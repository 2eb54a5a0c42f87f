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

// question is what one caller asks file systems for, one thing after the other.
type question struct {
	all *questions

	// answers are those that there are, and kept what was opened for them. Of the answers, so many are complete: they are those to what was
	// asked for before. They are protected by all.mu.
	answers  []answer
	complete int
	kept     []keptOpen
	// root and path are what is asked for, and began is when that began. They are protected by all.mu.
	root, path string
	began      time.Time
	// answered is set when nothing more is asked for, and left when nobody waits for the answer. They are protected by all.mu.
	answered, left bool
}

// answer is an open file, and what its file system said of it.
type answer struct {
	file        *os.File
	id          linux.FileID
	fingerprint linux.Fingerprint
}

// keptOpen is something of a root that is open while more is asked for.
type keptOpen struct {
	root  string
	close func()
}

// ask calls do, which opens files with question.open, and returns these files. It returns ErrDoesNotAnswer if one of them takes longer
// than patience, and waits for a second at most when ctx has ended. What is opened later is closed.
func (q *questions) ask(ctx context.Context, patience time.Duration, do func(*question) error) ([]answer, error) {
	asked := &question{all: q, began: time.Now()}
	answered := make(chan error, 1)
	go func() {
		err := do(asked)
		left := asked.end()
		for _, kept := range asked.kept {
			kept.close()
		}
		if err != nil || left {
			closeAll(asked.answers)
		}
		answered <- err
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	ended := ctx.Done()
	for {
		select {
		case err := <-answered:
			if err != nil {
				return nil, err
			}
			return asked.answers, nil
		case <-ended:
			ended, patience = nil, 0
			timer.Reset(endsWithin)
		case <-timer.C:
			left, err := asked.leave(patience)
			if err != nil && ctx.Err() != nil {
				return nil, fmt.Errorf("wait for %s: %w", asked.root, context.Cause(ctx))
			}
			if err != nil {
				return nil, err
			}
			timer.Reset(left)
		}
	}
}

// askOne is ask for one file.
func (q *questions) askOne(
	ctx context.Context, patience time.Duration, root, path string, do func() (*os.File, error),
) (*os.File, error) {
	answers, err := q.ask(ctx, patience, func(asked *question) error {
		_, err := asked.open(root, path, do)
		return err
	})
	if err != nil {
		return nil, err
	}
	return answers[0].file, nil
}

// open calls do, which opens what is at a path beneath a root, and has the file system answer for it. It returns ErrDoesNotAnswer, and
// does not call do, if an answer is overdue.
func (q *question) open(root, path string, do func() (*os.File, error)) (answer, error) {
	if err := q.begin(root, path); err != nil {
		return answer{}, err
	}
	file, err := do()
	if err != nil {
		return answer{}, err
	}
	// What was opened may have been remembered of a server that is away. The mount would wait for it.
	id, fingerprint, err := linux.Revalidate(file)
	opened := answer{file, id, fingerprint}
	q.all.mu.Lock()
	defer q.all.mu.Unlock()
	q.answers = append(q.answers, opened)
	return opened, err
}

// keep has something of a root closed when nothing more is asked for.
func (q *question) keep(root string, closeIt func()) {
	q.all.mu.Lock()
	defer q.all.mu.Unlock()
	q.kept = append(q.kept, keptOpen{root, closeIt})
}

func closeAll(answers []answer) {
	for _, opened := range answers {
		opened.file.Close()
	}
}

// begin is called before something is asked for. The error says why it must not be.
func (q *question) begin(root, path string) error {
	q.all.mu.Lock()
	defer q.all.mu.Unlock()
	if q.left {
		return noAnswer(q.root, q.path, q.began)
	}
	overdue := q.all.overdue[root]
	if began, ok := overdue[path]; ok {
		return noAnswer(root, path, began)
	}
	if len(overdue) >= maxOverdue {
		for other, began := range overdue {
			return noAnswer(root, other, began)
		}
	}
	q.root, q.path, q.began, q.complete = root, path, time.Now(), len(q.answers)
	return nil
}

// end is called when nothing more is asked for. It reports whether nobody waits for the answer.
func (q *question) end() (left bool) {
	q.all.mu.Lock()
	defer q.all.mu.Unlock()
	q.answered = true
	if q.left {
		delete(q.all.overdue[q.root], q.path)
		if len(q.all.overdue[q.root]) == 0 {
			delete(q.all.overdue, q.root)
		}
	}
	return q.left
}

// leave ends the waiting if what is asked for was begun that long ago, and returns ErrDoesNotAnswer. Otherwise it returns how long is
// left. What is open of other file systems is closed: it would keep them from being unmounted until this one answers.
func (q *question) leave(patience time.Duration) (time.Duration, error) {
	q.all.mu.Lock()
	defer q.all.mu.Unlock()
	if left := patience - time.Since(q.began); left > 0 || q.answered {
		return max(left, time.Millisecond), nil
	}
	q.left = true
	if q.all.overdue == nil {
		q.all.overdue = map[string]map[string]time.Time{}
	}
	if q.all.overdue[q.root] == nil {
		q.all.overdue[q.root] = map[string]time.Time{}
	}
	q.all.overdue[q.root][q.path] = q.began
	q.closeComplete()
	return 0, noAnswer(q.root, q.path, q.began)
}

// closeComplete closes what is not needed for what is asked for: the complete answers, and what is kept of other roots. The caller holds
// all.mu, and does not wait for it.
func (q *question) closeComplete() {
	complete := q.answers[:q.complete]
	q.answers = q.answers[q.complete:]
	var ofThis, ofOthers []keptOpen
	for _, kept := range q.kept {
		if kept.root == q.root {
			ofThis = append(ofThis, kept)
		} else {
			ofOthers = append(ofOthers, kept)
		}
	}
	q.kept = ofThis
	go func() {
		closeAll(complete)
		for _, kept := range ofOthers {
			kept.close()
		}
	}()
}

func noAnswer(root, path string, began time.Time) error {
	if path != "" {
		root = fmt.Sprintf("%q in %s", path, root)
	}
	return fmt.Errorf("%s: %w since %s; find out whether its disk or server is there",
		root, ErrDoesNotAnswer, began.UTC().Format(time.RFC3339))
}
