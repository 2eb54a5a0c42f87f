package gunzip

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	// minRate is the minimum rate in bytes a second, of input and output together, while the process has input and somebody reads.
	minRate = 1 << 10
	// chunkSize is the size of a read and of a write of a pipe in bytes.
	chunkSize = 256 << 10
)

// reader reads what a process decompresses.
type reader struct {
	process process
	stdout  *os.File
	feeder  *feeder
	stall   time.Duration
	// trailer is what comes last.
	trailer []byte
	// buffer[begin:end] is not read yet. The last trailerSize bytes of it may be the trailer.
	buffer     []byte
	begin, end int
	// err is how the stream ended.
	err error
	// isReaped reports whether the process has ended.
	isReaped bool

	// waited is how long this has waited for the process since the rate was looked at, and moved the number of bytes since then.
	waited time.Duration
	moved  int64
}

// feeder writes a stream to a process.
type feeder struct {
	from io.Reader
	to   *os.File
	// reads reports whether the feeder waits for the stream, not for the process.
	reads atomic.Bool
	// fed is the number of bytes that were written.
	fed  atomic.Int64
	done chan struct{}
	// readErr may be read after done is closed.
	readErr error
}

// open has a process decompress a stream. start starts it with its ends of two pipes, and leaves them open.
func open(from io.Reader, stall time.Duration, start func(stdin, stdout *os.File) (process, error)) (io.ReadCloser, error) {
	trailer, member, err := newTrailer()
	if err != nil {
		return nil, err
	}
	stdin, input, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer stdin.Close()
	output, stdout, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, input.Close())
	}
	defer stdout.Close()
	for _, pipe := range []*os.File{input, output} {
		// A larger one saves switches between processes, and is not to be had where this user has many.
		_ = linux.SetPipeSize(pipe, 4*chunkSize)
	}
	started, err := start(stdin, stdout)
	if err != nil {
		return nil, errors.Join(err, input.Close(), output.Close())
	}
	f := &feeder{from: io.MultiReader(from, bytes.NewReader(member)), to: input, done: make(chan struct{})}
	go func() {
		defer close(f.done)
		if f.run(); f.readErr != nil {
			// What it would still give is of no use, and it may hang.
			started.Kill()
		}
	}()
	return &reader{
		process: started, stdout: output, feeder: f, stall: stall, trailer: trailer, buffer: make([]byte, chunkSize+trailerSize),
	}, nil
}

// run writes the stream to its end, or until the process takes no more.
func (f *feeder) run() {
	defer f.to.Close()
	buffer := make([]byte, chunkSize)
	for {
		f.reads.Store(true)
		n, err := f.from.Read(buffer)
		f.reads.Store(false)
		if n > 0 {
			written, err := f.to.Write(buffer[:n])
			f.fed.Add(int64(written))
			if err != nil {
				// The process has ended. Its status, or what it left out, says why.
				return
			}
		}
		if err != nil {
			// An error that wraps io.EOF, such as one of a connection, is not the end.
			if err != io.EOF {
				f.readErr = err
			}
			return
		}
	}
}

func (r *reader) Read(to []byte) (int, error) {
	for {
		if ready := r.end - r.begin - trailerSize; ready > 0 {
			n := copy(to, r.buffer[r.begin:r.begin+ready])
			r.begin += n
			return n, nil
		}
		if r.err != nil {
			return 0, r.err
		}
		r.end = copy(r.buffer, r.buffer[r.begin:r.end])
		r.begin = 0
		n, err := r.receive(r.buffer[r.end:])
		r.end += n
		if errors.Is(err, io.EOF) {
			err = r.finish()
		}
		r.err = err
	}
}

// receive reads from the process. It kills it if it stalls.
func (r *reader) receive(to []byte) (int, error) {
	for {
		began, fed := time.Now(), r.feeder.fed.Load()
		if err := r.stdout.SetReadDeadline(began.Add(r.stall)); err != nil {
			return 0, err
		}
		n, err := r.stdout.Read(to)
		r.moved += int64(n) + r.feeder.fed.Load() - fed
		if !r.feeder.reads.Load() {
			r.waited += time.Since(began)
		}
		if r.waited >= r.stall {
			if float64(r.moved) < minRate*r.stall.Seconds() {
				return 0, r.stalled()
			}
			r.waited, r.moved = 0, 0
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
	}
}

// stalled ends a process that does nothing.
func (r *reader) stalled() error {
	r.kill()
	return fmt.Errorf("%w: the decompressor has done almost nothing for %s; retry, or turn it off (--gzip-program=)",
		errdefs.ErrUnavailable, r.stall)
}

// finish returns how a stream ended whose last byte was read: io.EOF if all of it was decompressed.
func (r *reader) finish() error {
	var exit error
	select {
	case exit = <-r.process.Exited():
		r.isReaped = true
	case <-time.After(r.stall):
		return r.stalled()
	}
	<-r.feeder.done
	switch {
	case r.feeder.readErr != nil:
		return r.feeder.readErr
	case exit != nil && !isRefusal(exit):
		return fmt.Errorf("%w: the decompressor has died: %w; retry, or turn it off (--gzip-program=)", errdefs.ErrUnavailable, exit)
	case exit != nil:
		return fmt.Errorf("%w: %w", ErrRefused, exit)
	case !bytes.HasSuffix(r.buffer[:r.end], r.trailer):
		return fmt.Errorf("%w: it ended before the last byte", ErrRefused)
	}
	return io.EOF
}

// kill ends the process and the feeder.
func (r *reader) kill() {
	if !r.isReaped {
		r.process.Kill()
		<-r.process.Exited()
		r.isReaped = true
	}
	<-r.feeder.done
}

// Close ends the process. It waits until the stream is no longer read.
func (r *reader) Close() error {
	r.kill()
	return r.stdout.Close()
}
