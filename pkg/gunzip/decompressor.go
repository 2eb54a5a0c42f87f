package gunzip

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/klauspost/compress/gzip"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/linux/sandbox"
)

const (
	keyProgram = "program"
	keyReason  = "reason"
)

// MinBytes is the size of a compressed stream in bytes from which on it is worth a process: the start of one takes as long as Go needs for
// about so much.
const MinBytes = 2 << 20

// ErrRefused is wrapped by errors about a stream that igzip did not decompress whole, or that it ended before its last byte. Go's
// decompressor tells what is wrong with it.
var ErrRefused = errors.New("igzip refused the stream")

// Config is the configuration of a Decompressor.
type Config struct {
	// Program is the path of igzip.
	Program string
	// Helper is a command that calls [sandbox.Main] with the arguments after it.
	Helper []string
	// StallTimeout is the time in which the program must decompress something, while it has input and somebody reads its output.
	StallTimeout time.Duration
}

// Decompressor decompresses gzip in processes of igzip, one for each stream.
type Decompressor struct {
	config Config
	root   *sandbox.Root
}

// New returns a decompressor, with copies of the program and its libraries in memory. It fails where the program is missing, or the kernel
// does not permit what confines it. Neither is tried again: a node gets another program with another image of the driver.
func New(config Config) (*Decompressor, error) {
	if _, err := os.Stat(config.Program); err != nil {
		return nil, err
	}
	root, err := sandbox.NewRoot(config.Program)
	if err != nil {
		return nil, fmt.Errorf("make a root for %s: %w", config.Program, err)
	}
	d := &Decompressor{config, root}
	if err := d.try(); err != nil {
		return nil, errors.Join(fmt.Errorf("try %s: %w", config.Program, err), d.Close())
	}
	return d, nil
}

// try decompresses something.
func (d *Decompressor) try() error {
	const content = "overlay-csi"
	var compressed bytes.Buffer
	writer := gzip.NewWriter(&compressed)
	_, err := io.WriteString(writer, content)
	if err := errors.Join(err, writer.Close()); err != nil {
		return err
	}
	reader, err := d.start(&compressed)
	if err != nil {
		return err
	}
	got, err := io.ReadAll(io.LimitReader(reader, 2*int64(len(content))))
	if err == nil && string(got) != content {
		err = errors.New("it gave something else")
	}
	return errors.Join(err, reader.Close())
}

// Close frees the copy of the program. Streams that are being decompressed go on.
func (d *Decompressor) Close() error { return d.root.Close() }

// Gunzip returns the uncompressed content of a stream of gzip, which has size bytes. It returns nil where the stream is to be decompressed
// in this process, and has then read nothing: it is short, or igzip could not be started. Errors of the reader wrap [ErrRefused] or
// ErrUnavailable, or are those of from. No goroutine reads from after Close.
func (d *Decompressor) Gunzip(from *bufio.Reader, size int64) io.ReadCloser {
	if size < MinBytes || !hasHeader(from) {
		return nil
	}
	reader, err := d.start(from)
	if err != nil {
		klog.Background().Info("Decompressing in the driver itself", keyProgram, d.config.Program, keyReason, err.Error())
		return nil
	}
	return reader
}

// hasHeader reports whether Go takes the first header of a stream. igzip takes longer names and comments.
func hasHeader(from *bufio.Reader) bool {
	// An error shows when the rest is read.
	prefix, _ := from.Peek(from.Size())
	_, err := gzip.NewReader(bytes.NewReader(prefix))
	return err == nil
}

// start starts a process for a stream.
func (d *Decompressor) start(from io.Reader) (io.ReadCloser, error) {
	return open(from, d.config.StallTimeout, func(stdin, stdout *os.File) (process, error) {
		return sandbox.Start(d.root, d.config.Helper, []string{"-d", "-c"}, stdin, stdout)
	})
}

// process is a decompressor that runs. It is a sandbox.Process outside of tests.
type process interface {
	// Exited returns a channel that receives once how the process ended: nil, or an *exec.ExitError.
	Exited() <-chan error
	Kill()
}

// isRefusal reports whether a program ended by itself, with an error.
func isRefusal(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && exit.Exited()
}

const (
	// trailerSize is the number of random bytes that are compressed after the end of a stream.
	trailerSize = 32
	// extraSize is the size of the extra field of the member that has them, the largest there is (RFC 1952).
	extraSize = 1<<16 - 1
)

// newTrailer returns random bytes, and a member of gzip that has them. What comes out at the end shows that all before it were whole
// members: igzip ends without an error, and reads no more, at the first bytes that do not begin one.
//
// A stream that is cut off must not go on in the member. Its header is therefore longer than the extra field of any other header, which
// would take it and leave the data; its random bytes are in no checksum that was computed before, and no zero is among them, which
// would end a name.
func newTrailer() (content, member []byte, _ error) {
	content = make([]byte, trailerSize)
	extra := make([]byte, extraSize)
	// It does not fail (crypto/rand).
	_, _ = rand.Read(content)
	_, _ = rand.Read(extra)
	for i := range extra {
		extra[i] |= 1
	}
	var compressed bytes.Buffer
	writer := gzip.NewWriter(&compressed)
	writer.Extra = extra
	_, err := writer.Write(content)
	err = errors.Join(err, writer.Close())
	return content, compressed.Bytes(), err
}
