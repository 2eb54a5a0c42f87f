package overlay

import (
	"errors"
	"sync"
	"time"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// patience is how long a file system has for an answer. A local one takes microseconds; one of a server that is away never answers.
const patience = time.Second

// errNoAnswer says that a file system does not answer.
var errNoAnswer = errors.New("the file system does not answer")

// questions are the paths of which file systems have been asked and have not answered yet. Each keeps a thread of this process for as
// long as that takes, so that none is asked twice.
type questions struct {
	mu sync.Mutex
	// open says of each question whether its answer is overdue.
	open map[string]bool
}

// mountRoot is what is mounted at a path: whether the path is the root of a mount, and the number of the file system's type if it is.
type mountRoot struct {
	isRoot bool
	magic  int64
}

// ask calls stat, and returns errNoAnswer if that does not return in time, or did not the last time and still has not.
func (q *questions) ask(path string, stat func() (mountRoot, error)) (mountRoot, error) {
	if !q.begin(path) {
		return mountRoot{}, errNoAnswer
	}
	type answer struct {
		mountRoot
		err error
	}
	answered := make(chan answer, 1)
	go func() {
		root, err := stat()
		q.end(path)
		answered <- answer{root, err}
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case a := <-answered:
		return a.mountRoot, a.err
	case <-timer.C:
		q.setOverdue(path)
		return mountRoot{}, errNoAnswer
	}
}

func (q *questions) begin(path string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, isOpen := q.open[path]; isOpen {
		return false
	}
	if q.open == nil {
		q.open = map[string]bool{}
	}
	q.open[path] = false
	return true
}

func (q *questions) setOverdue(path string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, isOpen := q.open[path]; isOpen {
		q.open[path] = true
	}
}

// isOverdue reports whether the file system at a path has been asked and has not answered in time.
func (q *questions) isOverdue(path string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.open[path]
}

func (q *questions) end(path string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.open, path)
}

// mountRootAt asks the file system at a path what it is.
func (m *Mounter) mountRootAt(path string) (mountRoot, error) {
	stat, err := linux.StatMount(nil, path)
	if err != nil || !stat.IsRoot {
		return mountRoot{}, err
	}
	magic, err := m.fileSystemMagic(path, stat.MountID)
	return mountRoot{isRoot: true, magic: magic}, err
}
