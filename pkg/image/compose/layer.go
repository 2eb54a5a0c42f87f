package compose

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// level is the level of gzip. Another one would change the digests of layers.
const level = 5

// WriteTar is a function that writes the tar of a layer. It writes the same bytes each time.
type WriteTar func(ctx context.Context, to io.Writer) error

// Layer is a layer whose digests are known.
type Layer struct {
	// Descriptor is that of the compressed layer, and DiffID the digest of the tar.
	Descriptor ocispec.Descriptor
	DiffID     digest.Digest

	write WriteTar
}

// NewLayer returns the layer with the tar that write writes. It calls write once.
func NewLayer(ctx context.Context, write WriteTar) (Layer, error) {
	hash, count := digest.SHA256.Digester(), &counter{}
	diffID, err := compress(ctx, io.MultiWriter(hash.Hash(), count), write)
	if err != nil {
		return Layer{}, err
	}
	return Layer{
		Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: hash.Digest(), Size: count.size},
		DiffID:     diffID, write: write,
	}, nil
}

// Open returns the compressed layer. Its last read returns image.ErrContentMismatch if it is not the layer that NewLayer read.
func (l Layer) Open(ctx context.Context) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	reader, writer := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		hash, count := digest.SHA256.Digester(), &counter{}
		_, err := compress(ctx, io.MultiWriter(hash.Hash(), count, writer), l.write)
		if err == nil {
			err = image.Verify(l.Descriptor, hash.Digest(), count.size)
		}
		writer.CloseWithError(err)
	}()
	return &pipedLayer{reader, func() {
		cancel()
		reader.Close()
		<-done
	}}, nil
}

// pipedLayer is what a goroutine writes. Close waits until that has ended, so that what it reads from may be closed.
type pipedLayer struct {
	io.Reader
	stop func()
}

func (p *pipedLayer) Close() error {
	p.stop()
	return nil
}

// compress compresses what write writes. It returns the digest of that.
func compress(ctx context.Context, to io.Writer, write WriteTar) (digest.Digest, error) {
	zip, err := gzip.NewWriterLevel(to, level)
	if err != nil {
		return "", fmt.Errorf("compress the layer: %w", err)
	}
	hash := digest.SHA256.Digester()
	err = write(ctx, io.MultiWriter(hash.Hash(), zip))
	return hash.Digest(), errors.Join(err, zip.Close())
}

// counter counts what is written to it.
type counter struct{ size int64 }

func (c *counter) Write(data []byte) (int, error) {
	c.size += int64(len(data))
	return len(data), nil
}
