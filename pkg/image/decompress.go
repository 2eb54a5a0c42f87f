package image

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxWindow is the maximum window of a zstd stream in bytes. It bounds the memory of a decompressor. It is the window of
// zstd --ultra -20.
const maxWindow = 32 << 20

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
	// unsupported maps compressions that are recognized but not supported to their magic bytes.
	unsupported = map[string][]byte{
		"bzip2": []byte("BZh"),
		"xz":    {0xfd, '7', 'z', 'X', 'Z', 0},
		"lz4":   {0x04, 0x22, 0x4d, 0x18},
	}
)

// Gunzip returns the uncompressed content of a stream of gzip of size bytes, or nil if it leaves that to this package.
type Gunzip func(from *bufio.Reader, size int64) io.ReadCloser

// decompress returns the uncompressed content of a stream, as decompressWith does with this package alone.
func decompress(from io.Reader) (io.ReadCloser, error) {
	return decompressWith(from, func(*bufio.Reader) io.ReadCloser { return nil })
}

// decompressWith returns the uncompressed content of a stream. It recognizes gzip and zstd by their magic bytes, because
// media types are often wrong. If gunzip returns nil for gzip, this package decompresses it.
func decompressWith(from io.Reader, gunzip func(*bufio.Reader) io.ReadCloser) (io.ReadCloser, error) {
	buffered := bufio.NewReaderSize(from, 128<<10)
	magic, err := buffered.Peek(magicSize)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, gzipMagic):
		if reader := gunzip(buffered); reader != nil {
			return reader, nil
		}
		reader, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, fmt.Errorf("%w: decompress gzip: %w", errdefs.ErrInvalidArgument, err)
		}
		return reader, nil
	case bytes.HasPrefix(magic, zstdMagic), isSkippable(magic):
		reader, err := zstd.NewReader(buffered,
			zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, fmt.Errorf("%w: decompress zstd: %w", errdefs.ErrInvalidArgument, err)
		}
		return reader.IOReadCloser(), nil
	}
	if err := checkSupported(magic); err != nil {
		return nil, err
	}
	return io.NopCloser(buffered), nil
}

// magicSize is the maximum length of magic bytes.
const magicSize = 6

// checkSupported returns an error if magic is from an unsupported compression.
func checkSupported(magic []byte) error {
	for name, prefix := range unsupported {
		if bytes.HasPrefix(magic, prefix) {
			return fmt.Errorf("%w: compression %s is not supported; use gzip or zstd", errdefs.ErrInvalidArgument, name)
		}
	}
	return nil
}

// isCompressed reports whether magic is from a supported compression.
func isCompressed(magic []byte) bool {
	return bytes.HasPrefix(magic, gzipMagic) || bytes.HasPrefix(magic, zstdMagic) || isSkippable(magic)
}

// isSkippable reports whether a zstd stream begins with a skippable frame (RFC 8878, 3.1.2).
func isSkippable(magic []byte) bool {
	return len(magic) >= 4 && magic[0]&0xf0 == 0x50 && magic[1] == 0x2a && magic[2] == 0x4d && magic[3] == 0x18
}
