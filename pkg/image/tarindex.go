package image

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"path"
	"regexp"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// imageNames matches the names of the files in archives of images. A tar with another name is that of a root file system.
var imageNames = regexp.MustCompile(`^(\.|oci-layout|index\.json|manifest\.json|repositories|` +
	`blobs(/[a-z0-9]+(/[0-9a-f]*)?)?|[0-9a-f]{64}\.(json|tar)|[0-9a-f]{64}(/(VERSION|json|layer\.tar)?)?|` +
	`sha256:[0-9a-f]{64}|[0-9a-f]{64}\.tar\.gz)$`)

// maxImageName is an upper bound of the length of these names in bytes.
const maxImageName = 256

func isImageName(name string) bool { return len(name) <= maxImageName && imageNames.MatchString(name) }

// scanTar returns ErrNoImage if a tar is not an archive of an image. It stops at the first name that shows it.
func scanTar(ctx context.Context, from io.Reader) error {
	reader := tar.NewReader(unpack.ContextReader(ctx, from))
	hasManifest := false
	for range maxArchiveFiles {
		header, err := reader.Next()
		if err == io.EOF {
			if hasManifest {
				return nil
			}
			return ErrNoImage
		}
		if err != nil {
			return explainTarError(ctx, err)
		}
		name := path.Clean(header.Name)
		if !isImageName(name) {
			return ErrNoImage
		}
		hasManifest = hasManifest || name == dockerManifestFile || name == ocispec.ImageIndexFile
	}
	return errTooManyFiles()
}

// explainTarError adds its kind to an error of reading a tar.
func explainTarError(ctx context.Context, err error) error {
	if ctx.Err() != nil || errdefs.IsResourceExhausted(err) {
		return err
	}
	return fmt.Errorf("%w: read the tar: %w", errdefs.ErrInvalidArgument, err)
}

func errTooManyFiles() error {
	return fmt.Errorf("%w: the archive has more than %d entries", errdefs.ErrInvalidArgument, maxArchiveFiles)
}

// tarIndex is an index of the files in an uncompressed archive.
type tarIndex struct {
	from   *io.SectionReader
	files  map[string]section
	links  map[string]string
	closer io.Closer
}

// section is the content of a file in a tar, in bytes.
type section struct{ offset, size int64 }

// maxArchiveFiles is the maximum number of entries in an archive, of every type. Images have up to three files for each layer.
const maxArchiveFiles = 100_000

// indexTar returns an index of the files in an archive. It returns ErrNoImage for another tar. The close method of the index
// closes closer. indexTar closes it itself after an error.
func indexTar(ctx context.Context, from *io.SectionReader, closer io.Closer) (archiveFiles, error) {
	t := &tarIndex{from: from, files: map[string]section{}, links: map[string]string{}, closer: closer}
	if err := t.read(ctx); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

func (t *tarIndex) read(ctx context.Context) error {
	reader := tar.NewReader(contextSection{t.from, ctx})
	for range maxArchiveFiles {
		header, err := reader.Next()
		if err == io.EOF {
			if t.has(dockerManifestFile) || t.has(ocispec.ImageIndexFile) {
				return nil
			}
			return ErrNoImage
		}
		if err != nil {
			return explainTarError(ctx, err)
		}
		name := path.Clean(header.Name)
		if !isImageName(name) {
			return ErrNoImage
		}
		switch header.Typeflag {
		case tar.TypeReg:
			// The tar reader reads no further than the header if its source is a seeker.
			offset, err := t.from.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			t.files[name] = section{offset, header.Size}
		case tar.TypeSymlink:
			// Old docker archives have links in place of repeated layers.
			if target := path.Join(path.Dir(name), header.Linkname); isImageName(target) {
				t.links[name] = target
			}
		}
	}
	return errTooManyFiles()
}

// contextSection reads a file until ctx is done. It is a seeker, so that the tar reader skips the content of files.
type contextSection struct {
	*io.SectionReader
	ctx context.Context
}

func (s contextSection) Read(buffer []byte) (int, error) {
	return unpack.ContextReader(s.ctx, s.SectionReader).Read(buffer)
}

func (t *tarIndex) has(name string) bool { _, ok := t.files[name]; return ok }

func (t *tarIndex) close() { t.closer.Close() }

func (t *tarIndex) open(name string) (io.ReadCloser, int64, error) {
	name = path.Clean(name)
	if target, ok := t.links[name]; ok {
		name = target
	}
	at, ok := t.files[name]
	if !ok {
		return nil, 0, fmt.Errorf("%w: the archive has no file %q", errdefs.ErrInvalidArgument, truncate(name))
	}
	return io.NopCloser(io.NewSectionReader(t.from, at.offset, at.size)), at.size, nil
}
