package registry

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// spareMemory is the memory for large documents that the disk has no room for, in bytes. It has room for two of image.MaxDocumentSize.
const spareMemory = 2 * image.MaxDocumentSize

// document is a manifest, an index or a configuration that is fetched: written first, and read after rewind.
type document interface {
	io.ReadWriteCloser
	rewind() error
}

// newDocument returns a document of size bytes. A large one is in memory if the disk has no room for it: an image that is on the node can
// be used on a full disk. It waits for memory until ctx is done.
func (r *Repository) newDocument(ctx context.Context, size int64) (document, error) {
	if size <= image.SmallDocument {
		return &memoryDocument{}, nil
	}
	dir := cmp.Or(r.config.SpoolDir, os.TempDir())
	file, failed := newSpoolFile(dir, size, r.config.SpoolReserve)
	if failed == nil {
		return largeDocument{file}, nil
	}
	if err := r.client.spare.Acquire(ctx, size); err != nil {
		return nil, fmt.Errorf("%w: the manifest is too large for the memory that is left (%w), and for the disk: %w",
			errdefs.ErrUnavailable, err, failed)
	}
	content := &memoryDocument{release: func() { r.client.spare.Release(size) }}
	content.Grow(int(size) + bytes.MinRead)
	return content, nil
}

// newSpoolFile returns a file without a name in a directory, with room for size bytes. It returns ErrResourceExhausted if less than reserve
// percent of the disk would be left.
func newSpoolFile(dir string, size int64, reserve int) (*os.File, error) {
	file, err := os.OpenFile(dir, os.O_RDWR|linux.O_TMPFILE, 0o600)
	if errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.EISDIR) {
		file, err = createDeleted(dir)
	}
	if err != nil {
		return nil, err
	}
	err = checkReserve(file, size, reserve)
	if err == nil {
		err = linux.Reserve(file, size)
	}
	if err != nil && !errors.Is(err, syscall.EOPNOTSUPP) {
		file.Close()
		return nil, err
	}
	return file, nil
}

// createDeleted creates a file and deletes its name. It is for file systems without O_TMPFILE.
func createDeleted(dir string) (*os.File, error) {
	file, err := os.CreateTemp(dir, "manifest-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file.Name()); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// checkReserve returns ErrResourceExhausted if less than percent of the disk of a file would be left after it got size bytes.
func checkReserve(file *os.File, size int64, percent int) error {
	usage, err := linux.FileSystemUsage(file)
	if err != nil {
		return err
	}
	// Some file systems have no limit of inodes: both numbers are 0.
	if usage.Bytes.Available-size < usage.Bytes.Total/100*int64(percent) || usage.Inodes.Available < usage.Inodes.Total/100*int64(percent) {
		return fmt.Errorf("%w: less than %d %% of the disk of %s would be free", errdefs.ErrResourceExhausted, percent, file.Name())
	}
	return nil
}

// memoryDocument is in memory.
type memoryDocument struct {
	bytes.Buffer
	// release releases the memory. It is nil for a small document.
	release func()
}

func (*memoryDocument) rewind() error { return nil }

// Close implements io.Closer.
func (d *memoryDocument) Close() error {
	if d.release != nil {
		d.release()
		d.release = nil
	}
	return nil
}

// largeDocument is in a file.
type largeDocument struct{ *os.File }

func (d largeDocument) rewind() error {
	_, err := d.Seek(0, io.SeekStart)
	return err
}

// documentWriter writes to a document. err is why that failed, which is no fault of the registry.
type documentWriter struct {
	to  document
	err error
}

// Write implements io.Writer.
func (w *documentWriter) Write(data []byte) (int, error) {
	n, err := w.to.Write(data)
	if err != nil {
		w.err = fmt.Errorf("%w: write a manifest to the disk: %w", errdefs.ErrUnavailable, err)
	}
	return n, w.err
}
