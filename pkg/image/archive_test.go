package image

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// zeros reads as zeros without end.
type zeros struct{}

func (zeros) Read(buffer []byte) (int, error) {
	clear(buffer)
	return len(buffer), nil
}

// writeZstd writes a tar that is compressed with zstd.
func writeZstd(t *testing.T, write func(*tar.Writer)) *os.File {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "a.tar.zst"))
	must(t, err)
	t.Cleanup(func() { file.Close() })
	compressor, err := zstd.NewWriter(file)
	must(t, err)
	writer := tar.NewWriter(compressor)
	write(writer)
	must(t, errors.Join(writer.Close(), compressor.Close()))
	_, err = file.Seek(0, io.SeekStart)
	must(t, err)
	return file
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// addFile adds a file of size bytes, zeros after its text.
func addFile(t *testing.T, to *tar.Writer, name, text string, size int64) {
	t.Helper()
	must(t, to.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644}))
	_, err := io.Copy(to, io.MultiReader(strings.NewReader(text), io.LimitReader(zeros{}, size-int64(len(text)))))
	must(t, err)
}

// bomb is an archive that decompresses to 512 MiB.
func bomb(t *testing.T) *os.File {
	file := writeZstd(t, func(to *tar.Writer) {
		addFile(t, to, dockerManifestFile, "[]", 2)
		addFile(t, to, "blobs/sha256/"+strings.Repeat("a", 64), "", 512<<20)
	})
	if info, err := file.Stat(); err != nil || info.Size() > 64<<10 {
		t.Fatalf("the archive has %d bytes: %v", info.Size(), err)
	}
	return file
}

// interrupted is a context that is canceled after it was asked some times.
type interrupted struct {
	context.Context
	left *int
}

func (c interrupted) Err() error {
	if *c.left--; *c.left < 0 {
		return context.Canceled
	}
	return nil
}

// TestArchiveIsBounded opens archives that are small and decompress to much.
func TestArchiveIsBounded(t *testing.T) {
	needs.Root(t)
	for name, c := range map[string]struct {
		file   func(t *testing.T) *os.File
		ctx    context.Context
		limits unpack.Limits
		kind   error
		word   string
	}{
		"bytes":    {bomb, t.Context(), unpack.Limits{MaxBytes: 1 << 20}, errdefs.ErrResourceExhausted, "--max-layer-size"},
		"reserve":  {bomb, t.Context(), unpack.Limits{MinFreePercent: 50}, errdefs.ErrResourceExhausted, "--min-free-disk-percent"},
		"canceled": {bomb, interrupted{t.Context(), ptr(100)}, unpack.Limits{}, context.Canceled, ""},
		"entries": {func(t *testing.T) *os.File {
			return writeZstd(t, func(to *tar.Writer) {
				for range maxArchiveFiles {
					must(t, to.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "blobs", Mode: 0o755}))
				}
				addFile(t, to, dockerManifestFile, "[]", 2)
			})
		}, t.Context(), unpack.Limits{}, errdefs.ErrInvalidArgument, "100000 entries"},
	} {
		t.Run(name, func(t *testing.T) {
			scratch := t.TempDir()
			must(t, unix.Mount("tmpfs", scratch, "tmpfs", 0, "size=64m"))
			defer func() { must(t, unix.Unmount(scratch, 0)) }()
			_, err := OpenArchive(c.ctx, c.file(t), scratch, platforms.Default(), NewDocuments(), c.limits)
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.word) {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

// TestDecompressionOfArchiveEndsWithItsContext cancels the import of an archive while it is decompressed to the disk.
func TestDecompressionOfArchiveEndsWithItsContext(t *testing.T) {
	scratch := filepath.Join(t.TempDir(), "archive.tar")
	_, err := decompressArchive(interrupted{t.Context(), ptr(100)}, bomb(t), scratch, NewDocuments(), unpack.Limits{})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
	info, err := os.Stat(scratch)
	must(t, err)
	if info.Size() > 16<<20 {
		t.Errorf("it has written %d bytes", info.Size())
	}
}

func ptr(n int) *int { return &n }
