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
)

// imageNames are the names of the files in archives of images. A tar with any other is that of a root file system.
var imageNames = regexp.MustCompile(`^(\.|oci-layout|index\.json|manifest\.json|repositories|` +
	`blobs(/[a-z0-9]+(/[0-9a-f]*)?)?|[0-9a-f]{64}\.(json|tar)|[0-9a-f]{64}(/(VERSION|json|layer\.tar)?)?|` +
	`sha256:[0-9a-f]{64}|[0-9a-f]{64}\.tar\.gz)$`)

// maxImageName is the longest of these names, and to spare.
const maxImageName = 256

func isImageName(name string) bool { return len(name) <= maxImageName && imageNames.MatchString(name) }

// scanTar reads a tar as far as it takes to know that it is not an archive of images, and then returns ErrNoImage.
func scanTar(ctx context.Context, from io.Reader) error {
	reader := tar.NewReader(from)
	hasManifest := false
	for ctx.Err() == nil {
		header, err := reader.Next()
		if err == io.EOF {
			if hasManifest {
				return nil
			}
			return ErrNoImage
		}
		if err != nil {
			return fmt.Errorf("%w: read the tar: %w", errdefs.ErrInvalidArgument, err)
		}
		name := path.Clean(header.Name)
		if !isImageName(name) {
			return ErrNoImage
		}
		hasManifest = hasManifest || name == dockerManifestFile || name == ocispec.ImageIndexFile
	}
	return ctx.Err()
}

// tarIndex has the files of a tar, by name.
type tarIndex struct {
	from   *io.SectionReader
	files  map[string]section
	links  map[string]string
	closer io.Closer
}

type section struct{ offset, size int64 }

// maxArchiveFiles bounds the index of an archive: an image has three files for each layer.
const maxArchiveFiles = 100_000

// indexTar finds the files in an archive of images. It returns ErrNoImage for any other tar. The index, or indexTar when
// it fails, closes closer.
func indexTar(ctx context.Context, from *io.SectionReader, closer io.Closer) (archiveFiles, error) {
	t := &tarIndex{from: from, files: map[string]section{}, links: map[string]string{}, closer: closer}
	if err := t.read(ctx); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

func (t *tarIndex) read(ctx context.Context) error {
	reader := tar.NewReader(t.from)
	for len(t.files)+len(t.links) < maxArchiveFiles {
		if err := ctx.Err(); err != nil {
			return err
		}
		header, err := reader.Next()
		if err == io.EOF {
			if t.has(dockerManifestFile) || t.has(ocispec.ImageIndexFile) {
				return nil
			}
			return ErrNoImage
		}
		if err != nil {
			return fmt.Errorf("%w: read the tar: %w", errdefs.ErrInvalidArgument, err)
		}
		name := path.Clean(header.Name)
		if !isImageName(name) {
			return ErrNoImage
		}
		switch header.Typeflag {
		case tar.TypeReg:
			// The reader takes no byte more than the header from a seeker.
			offset, err := t.from.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			t.files[name] = section{offset, header.Size}
		case tar.TypeSymlink:
			// Old docker archives have each layer once.
			if target := path.Join(path.Dir(name), header.Linkname); isImageName(target) {
				t.links[name] = target
			}
		}
	}
	return fmt.Errorf("%w: the archive has more than %d files", errdefs.ErrInvalidArgument, maxArchiveFiles)
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
