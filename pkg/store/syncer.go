package store

import (
	"os"
	"sync"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// syncer syncs a file system. All calls during a sync share the next one, because each sync writes the whole file system.
type syncer struct {
	dir     *os.File
	mu      sync.Mutex
	running bool
	next    *round
}

// round is one sync of the file system.
type round struct {
	done chan struct{}
	// err may be read after done is closed.
	err error
}

func newSyncer(dir *os.File) *syncer { return &syncer{dir: dir} }

// sync returns after everything that was written before the call is on the disk.
func (s *syncer) sync() error {
	s.mu.Lock()
	if s.next == nil {
		s.next = &round{done: make(chan struct{})}
	}
	mine := s.next
	if !s.running {
		s.running = true
		go s.run()
	}
	s.mu.Unlock()
	<-mine.done
	return mine.err
}

// run syncs until no call waits.
func (s *syncer) run() {
	for {
		s.mu.Lock()
		current := s.next
		s.next = nil
		if current == nil {
			s.running = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		current.err = linux.SyncFS(s.dir)
		close(current.done)
	}
}
