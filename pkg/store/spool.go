package store

import (
	"errors"
	"io"
	"os"
	"sync"
)

// spool is a file that is read while it is still being downloaded: the registry is not kept waiting for the disk, and
// what has come is still there when the driver is not.
type spool struct {
	file *os.File
	mu   sync.Mutex
	more *sync.Cond
	size int64
	// err is why nothing more comes: io.EOF where all has come.
	err error
}

// openSpool opens the file with what an earlier download left in it.
func openSpool(path string) (*spool, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	s := &spool{file: file, size: size}
	s.more = sync.NewCond(&s.mu)
	return s, nil
}

// Write appends.
func (s *spool) Write(data []byte) (int, error) {
	n, err := s.file.Write(data)
	s.mu.Lock()
	s.size += int64(n)
	s.mu.Unlock()
	s.more.Broadcast()
	return n, err
}

// finish says that nothing more will come, because of err or, with nil, because that was all.
func (s *spool) finish(err error) {
	if err == nil {
		err = io.EOF
	}
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	s.mu.Unlock()
	s.more.Broadcast()
}

// empty throws away what an earlier download left, which is none of this blob.
func (s *spool) empty() error {
	s.size = 0
	_, err := s.file.Seek(0, io.SeekStart)
	return errors.Join(err, s.file.Truncate(0))
}

func (s *spool) length() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size
}

// reader reads from the beginning, and waits for what is not there yet.
func (s *spool) reader() io.Reader { return &spoolReader{spool: s} }

type spoolReader struct {
	spool  *spool
	offset int64
}

func (r *spoolReader) Read(buffer []byte) (int, error) {
	s := r.spool
	s.mu.Lock()
	for r.offset >= s.size && s.err == nil {
		s.more.Wait()
	}
	available, err := s.size-r.offset, s.err
	s.mu.Unlock()
	if available <= 0 {
		return 0, err
	}
	n, err := s.file.ReadAt(buffer[:min(int64(len(buffer)), available)], r.offset)
	r.offset += int64(n)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}
