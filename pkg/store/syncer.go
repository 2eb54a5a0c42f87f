package store

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// syncer writes a file system to its disk. Calls that come while one is at it share the next one: layers that are done
// at about the same time are synced together.
type syncer struct {
	dir     *os.File
	mu      sync.Mutex
	running bool
	next    *round
}

type round struct {
	done chan struct{}
	err  error
}

func newSyncer(dir *os.File) *syncer { return &syncer{dir: dir} }

// sync returns when everything that was written before the call is on the disk.
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
		current.err = syncFS(s.dir)
		close(current.done)
	}
}

// syncFS is syncfs(2), which reports write errors from Linux 5.8 on. It wants a descriptor that is no O_PATH.
func syncFS(dir *os.File) error {
	fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir.Name(), Err: err}
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("syncfs %s: %w", dir.Name(), err)
	}
	return nil
}
