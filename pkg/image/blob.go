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
	// aheadBuffers of aheadSize bytes are decompressed ahead of what is being written.
	aheadBuffers = 4
	aheadSize    = 256 << 10
	// sniffSize is enough to decompress the first header of a tar: a block of zstd has at most 128 KiB.
	sniffSize = 256 << 10
)

// LayerBlob is one layer of an image as the image describes it.
type LayerBlob struct {
	Descriptor ocispec.Descriptor
	// DiffID is the digest of the uncompressed tar, "" if the image does not say it.
	DiffID digest.Digest
	// FileName is the path of the file that the blob is, "" if the blob is a tar.
	FileName string
	// DigestUnknown says that Descriptor.Digest only stands for the blob, whose own digest is not known.
	DigestUnknown bool

	format blobFormat
}

// blobFormat says how a blob becomes the tar of a layer.
type blobFormat int

const (
	tarFormat blobFormat = iota
	// fileFormat is a file as it is.
	fileFormat
	// unknownFormat is a tar if it looks like one, else a file without a name.
	unknownFormat
)

// OpenTar returns the tar of the layer in blob. Closing it does not close blob.
func (b LayerBlob) OpenTar(blob io.Reader) (io.ReadCloser, error) {
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
	reader, err := decompress(blob)
	if err != nil {
		return nil, err
	}
	ahead, err := readahead.NewReaderSize(reader, aheadBuffers, aheadSize)
	if err != nil {
		return nil, errors.Join(err, reader.Close())
	}
	return &aheadReader{ahead, reader}, nil
}

// aheadReader closes its source after the goroutine that reads ahead has ended.
type aheadReader struct {
	io.ReadCloser
	source io.Closer
}

func (r *aheadReader) Close() error { return errors.Join(r.ReadCloser.Close(), r.source.Close()) }

// looksLikeTar reports whether a blob with this prefix is a tar, compressed or not.
func looksLikeTar(prefix []byte) bool {
	reader, err := decompress(bytes.NewReader(prefix))
	if err != nil {
		return false
	}
	defer reader.Close()
	_, err = tar.NewReader(reader).Next()
	return err == nil
}

// tarOfFile makes a tar of one file, so that a file is a layer as any other, with the diff ID of that tar.
func tarOfFile(name string, size int64, content io.Reader) (io.ReadCloser, error) {
	var header, trailer bytes.Buffer
	writer := tar.NewWriter(&header)
	err := writer.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatPAX,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: the artifact's file %q: %w", errdefs.ErrInvalidArgument, name, err)
	}
	trailer.Write(make([]byte, (512-size%512)%512+1024))
	return io.NopCloser(io.MultiReader(&header, io.LimitReader(content, size), &trailer)), nil
}

// VerifyingReader hashes what is read of a blob.
type VerifyingReader struct {
	blob LayerBlob
	from io.Reader
	hash hash.Hash
	size int64
}

// NewVerifyingReader returns a reader of a blob.
func NewVerifyingReader(blob LayerBlob, from io.Reader) *VerifyingReader {
	return &VerifyingReader{blob: blob, from: from, hash: blob.Descriptor.Digest.Algorithm().Hash()}
}

func (r *VerifyingReader) Read(buffer []byte) (int, error) {
	n, err := r.from.Read(buffer)
	r.hash.Write(buffer[:n])
	r.size += int64(n)
	return n, err
}

// Verify reads the blob to its end and compares it with its descriptor.
func (r *VerifyingReader) Verify() error {
	if r.blob.DigestUnknown {
		return nil
	}
	descriptor := r.blob.Descriptor
	// One byte more than there should be is enough to know.
	if _, err := io.Copy(io.Discard, io.LimitReader(r, descriptor.Size-r.size+1)); err != nil {
		return err
	}
	return Verify(descriptor, digest.NewDigest(descriptor.Digest.Algorithm(), r.hash), r.size)
}

// ExplainUnpackError prefers a digest mismatch over the error that unpacking the corrupt blob caused.
func (r *VerifyingReader) ExplainUnpackError(err error) error {
	local := errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, context.Canceled) ||
		errdefs.IsResourceExhausted(err) || errdefs.IsUnavailable(err)
	if !local {
		if mismatch := r.Verify(); mismatch != nil {
			return mismatch
		}
	}
	return fmt.Errorf("layer %s: %w", r.blob.Descriptor.Digest, err)
}
