package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/readahead"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// aheadBuffers is the number of buffers that are decompressed ahead of the reader.
	aheadBuffers = 4
	// aheadSize is the size of each of these buffers in bytes.
	aheadSize = 256 << 10
	// sniffSize is the number of bytes that are read to recognize a tar. A block of zstd has at most 128 KiB.
	sniffSize = 256 << 10
)

// LayerBlob describes the blob of one layer of an image.
type LayerBlob struct {
	Descriptor ocispec.Descriptor
	// DiffID is the digest of the uncompressed tar, or "" if it is unknown.
	DiffID digest.Digest
	// FileName is the path in the layer if the blob is a single file, or "" if the blob is a tar.
	FileName string
	// DigestUnknown reports whether the digest of the blob is unknown. Descriptor.Digest is then only an identifier.
	DigestUnknown bool

	format blobFormat
}

// blobFormat is the format of a blob.
type blobFormat int

const (
	// tarFormat is a tar, compressed or not.
	tarFormat blobFormat = iota
	// fileFormat is a single file.
	fileFormat
	// unknownFormat is a tar if the blob begins with a valid header. Otherwise it is a single file without a name.
	unknownFormat
)

// OpenTar returns the uncompressed tar of the layer. It reads the blob from blob, which it does not close. Gzip is left to gunzip, which
// may be nil.
func (b LayerBlob) OpenTar(blob io.Reader, gunzip Gunzip) (io.ReadCloser, error) {
	file := b.FileName
	if b.format == unknownFormat {
		buffered := bufio.NewReaderSize(blob, sniffSize)
		blob = buffered
		prefix, err := buffered.Peek(sniffSize)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if !looksLikeTar(prefix) {
			file = strings.Replace(b.Descriptor.Digest.String(), ":", "-", 1)
		}
	}
	if file != "" {
		return tarOfFile(file, b.Descriptor.Size, blob)
	}
	reader, err := decompressWith(blob, func(from *bufio.Reader) io.ReadCloser {
		if gunzip == nil {
			return nil
		}
		return gunzip(from, b.Descriptor.Size)
	})
	if err != nil {
		return nil, err
	}
	ahead, err := readahead.NewReaderSize(reader, aheadBuffers, aheadSize)
	if err != nil {
		return nil, errors.Join(err, reader.Close())
	}
	return &aheadReader{ahead, reader}, nil
}

// aheadReader closes its source after it stopped the goroutine that reads ahead.
type aheadReader struct {
	io.ReadCloser
	source io.Closer
}

func (r *aheadReader) Close() error { return errors.Join(r.ReadCloser.Close(), r.source.Close()) }

// looksLikeTar reports whether prefix is the beginning of a tar, compressed or not.
func looksLikeTar(prefix []byte) bool {
	reader, err := decompress(bytes.NewReader(prefix))
	if err != nil {
		return false
	}
	defer reader.Close()
	_, err = tar.NewReader(reader).Next()
	return err == nil
}

// tarOfFile returns a tar with one file of size bytes. The diff ID of a layer with a single file is the digest of this tar.
func tarOfFile(name string, size int64, content io.Reader) (io.ReadCloser, error) {
	var header, trailer bytes.Buffer
	writer := tar.NewWriter(&header)
	err := writer.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatPAX,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: write the tar header of file %q: %w", errdefs.ErrInvalidArgument, name, err)
	}
	trailer.Write(make([]byte, (512-size%512)%512+1024))
	return io.NopCloser(io.MultiReader(&header, io.LimitReader(content, size), &trailer)), nil
}

// VerifyingReader is a reader that verifies the digest and the size of a blob.
type VerifyingReader struct {
	blob LayerBlob
	from io.Reader
	hash hash.Hash
	size int64
}

// NewVerifyingReader returns a reader that reads blob from from.
func NewVerifyingReader(blob LayerBlob, from io.Reader) *VerifyingReader {
	return &VerifyingReader{blob: blob, from: from, hash: blob.Descriptor.Digest.Algorithm().Hash()}
}

func (r *VerifyingReader) Read(buffer []byte) (int, error) {
	n, err := r.from.Read(buffer)
	r.hash.Write(buffer[:n])
	r.size += int64(n)
	return n, err
}

// Verify reads the rest of the blob. It returns ErrContentMismatch if the blob differs from its descriptor.
func (r *VerifyingReader) Verify() error {
	if r.blob.DigestUnknown {
		return nil
	}
	descriptor := r.blob.Descriptor
	// One additional byte proves that the blob is too long.
	if _, err := io.Copy(io.Discard, io.LimitReader(r, descriptor.Size-r.size+1)); err != nil {
		return err
	}
	return Verify(descriptor, digest.NewDigest(descriptor.Digest.Algorithm(), r.hash), r.size)
}

// ExplainUnpackError returns the reason for err, an error from unpacking the blob. If the blob is corrupt, that is the
// mismatch.
func (r *VerifyingReader) ExplainUnpackError(err error) error {
	local := errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, context.Canceled) ||
		errdefs.IsResourceExhausted(err) || errdefs.IsUnavailable(err)
	if !local {
		if mismatch := r.Verify(); mismatch != nil {
			return mismatch
		}
	}
	return fmt.Errorf("unpack layer %s: %w", r.blob.Descriptor.Digest, err)
}
