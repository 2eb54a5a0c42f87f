package registry

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"os"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// document is a manifest, an index or a configuration that is fetched: written first, and read after rewind.
type document interface {
	io.ReadWriteCloser
	rewind() error
}

// newDocument returns a document of size bytes.
func (r *Repository) newDocument(size int64) (document, error) {
	if size <= image.SmallDocument {
		return &smallDocument{}, nil
	}
	dir := cmp.Or(r.config.SpoolDir, os.TempDir())
	file, err := os.OpenFile(dir, os.O_RDWR|linux.O_TMPFILE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create a file for a manifest: %w", err)
	}
	return largeDocument{file}, nil
}

// smallDocument is in memory.
type smallDocument struct{ bytes.Buffer }

func (*smallDocument) rewind() error { return nil }

// Close implements io.Closer.
func (*smallDocument) Close() error { return nil }

// largeDocument is in a file.
type largeDocument struct{ *os.File }

func (d largeDocument) rewind() error {
	_, err := d.Seek(0, io.SeekStart)
	return err
}
