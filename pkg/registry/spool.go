package registry

import (
	"errors"
	"io"
	"os"
	"sync"
)

// Spool is a file that is read while it is downloaded. It decouples the download from unpacking, and a restarted driver
// resumes a download from it.
type Spool struct {
	file *os.File
	mu   sync.Mutex
	more *sync.Cond
	size int64
	// err is the reason why the download ended. It is io.EOF after a complete download, and nil during the download.
	err error

	// Check is called after each checkInterval bytes that are written. Its error ends the download. It may be nil.
	Check     func() error
	unchecked int64
	// BeforeWrite is called before each write. Its error ends the download. It may be nil.
	BeforeWrite func() error
}

// checkInterval is the number of bytes between two calls of Spool.Check.
const checkInterval = 4 << 20

// OpenSpool opens the spool at path. It creates an empty file if there is none.
func OpenSpool(path string) (*Spool, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	s := &Spool{file: file, size: size}
	s.more = sync.NewCond(&s.mu)
	return s, nil
}

// Write appends data to the spool.
func (s *Spool) Write(data []byte) (int, error) {
	if s.unchecked += int64(len(data)); s.Check != nil && s.unchecked >= checkInterval {
		s.unchecked = 0
		if err := s.Check(); err != nil {
			return 0, err
		}
	}
	if s.BeforeWrite != nil {
		if err := s.BeforeWrite(); err != nil {
			return 0, err
		}
	}
	n, err := s.file.Write(data)
	s.mu.Lock()
	s.size += int64(n)
	s.mu.Unlock()
	s.more.Broadcast()
	return n, err
}

// Finish ends the download. Readers get err after the last byte, or io.EOF if err is nil.
func (s *Spool) Finish(err error) {
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

// Reset removes the content of an earlier download. It must be called before Write and Reader.
func (s *Spool) Reset() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = 0
	_, err := s.file.Seek(0, io.SeekStart)
	return errors.Join(err, s.file.Truncate(0))
}

// Len returns the number of bytes in the spool.
func (s *Spool) Len() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size
}

// Close closes the file.
func (s *Spool) Close() error { return s.file.Close() }

// Reader returns a reader from the beginning of the spool. It waits for bytes that are not yet downloaded.
func (s *Spool) Reader() io.Reader { return &spoolReader{spool: s} }

type spoolReader struct {
	spool  *Spool
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
