package store

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// archiveContent are the files of an archive of images.
type archiveContent interface {
	open(name string) (io.ReadCloser, int64, error)
	has(name string) bool
	close()
}

// imageNames are the names of the files in archives of images. A tar with any other is that of a root file system.
var imageNames = regexp.MustCompile(`^(\.|oci-layout|index\.json|manifest\.json|repositories|blobs(/[a-z0-9]+(/[0-9a-f]*)?)?|[0-9a-f]{64}\.(json|tar)|[0-9a-f]{64}(/(VERSION|json|layer\.tar)?)?|sha256:[0-9a-f]{64}|[0-9a-f]{64}\.tar\.gz)$`)

// openArchive opens an archive of images. It is nil where the file is none, but a tar. A compressed one is first written
// to the file spare: there is no other way to its middle.
func openArchive(ctx context.Context, file *os.File, isDir bool, spare string) (archiveContent, error) {
	if isDir {
		return layoutDir{file}, nil
	}
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	whole := func() *io.SectionReader { return io.NewSectionReader(file, 0, info.Size()) }
	magic := make([]byte, magicSize)
	if _, err := io.ReadFull(whole(), magic); err != nil {
		return nil, fmt.Errorf("%w: the file is too short for an archive", errdefs.ErrInvalidArgument)
	}
	if err := checkSupported(magic); err != nil {
		return nil, err
	}
	if !isCompressed(magic) {
		return indexTar(ctx, whole(), func() {})
	}
	plain, err := decompress(whole())
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	isImage, err := scan(ctx, plain)
	if err != nil || !isImage {
		return nil, err
	}
	return decompressArchive(ctx, whole(), spare)
}

// scan reads a tar as far as it takes to know that it is not an archive of images.
func scan(ctx context.Context, from io.Reader) (bool, error) {
	reader := tar.NewReader(from)
	hasManifest := false
	for ctx.Err() == nil {
		header, err := reader.Next()
		if err == io.EOF {
			return hasManifest, nil
		}
		if err != nil {
			return false, fmt.Errorf("%w: read the tar: %w", errdefs.ErrInvalidArgument, err)
		}
		name := path.Clean(header.Name)
		if !imageNames.MatchString(name) {
			return false, nil
		}
		hasManifest = hasManifest || name == dockerManifest || name == ocispec.ImageIndexFile
	}
	return false, ctx.Err()
}

func decompressArchive(ctx context.Context, from io.Reader, spare string) (archiveContent, error) {
	plain, err := decompress(from)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	file, err := os.OpenFile(spare, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	size, err := io.Copy(file, plain)
	if err == nil {
		err = os.Remove(spare)
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("decompress the archive: %w", err)
	}
	return indexTar(ctx, io.NewSectionReader(file, 0, size), func() { file.Close() })
}

// tarIndex is the files of a tar, by name.
type tarIndex struct {
	from    *io.SectionReader
	files   map[string]section
	links   map[string]string
	closing func()
}

type section struct{ offset, size int64 }

// maxArchiveFiles bounds the index of an archive: an image has three files for each layer.
const maxArchiveFiles = 100_000

// indexTar finds the files in an archive of images. It is nil where the tar is none.
func indexTar(ctx context.Context, from *io.SectionReader, closing func()) (archiveContent, error) {
	t := &tarIndex{from: from, files: map[string]section{}, links: map[string]string{}, closing: closing}
	reader := tar.NewReader(from)
	for len(t.files) < maxArchiveFiles && ctx.Err() == nil {
		header, err := reader.Next()
		if err == io.EOF {
			if t.has(dockerManifest) || t.has(ocispec.ImageIndexFile) {
				return t, nil
			}
			closing()
			return nil, nil
		}
		if err != nil {
			closing()
			return nil, fmt.Errorf("%w: read the tar: %w", errdefs.ErrInvalidArgument, err)
		}
		name := path.Clean(header.Name)
		if !imageNames.MatchString(name) {
			closing()
			return nil, nil
		}
		switch header.Typeflag {
		case tar.TypeReg:
			// The reader takes no byte more than the header from a seeker.
			offset, err := from.Seek(0, io.SeekCurrent)
			if err != nil {
				closing()
				return nil, err
			}
			t.files[name] = section{offset, header.Size}
		case tar.TypeSymlink:
			// Old docker archives have each layer once.
			t.links[name] = path.Join(path.Dir(name), header.Linkname)
		}
	}
	closing()
	return nil, errors.Join(ctx.Err(), fmt.Errorf("%w: the archive has more than %d files", errdefs.ErrInvalidArgument, maxArchiveFiles))
}

func (t *tarIndex) has(name string) bool { _, ok := t.files[name]; return ok }

func (t *tarIndex) close() { t.closing() }

func (t *tarIndex) open(name string) (io.ReadCloser, int64, error) {
	name = path.Clean(name)
	if target, ok := t.links[name]; ok {
		name = target
	}
	at, ok := t.files[name]
	if !ok {
		return nil, 0, fmt.Errorf("%w: the archive has no file %q", errdefs.ErrInvalidArgument, name)
	}
	return io.NopCloser(io.NewSectionReader(t.from, at.offset, at.size)), at.size, nil
}

// layoutDir is the directory of an OCI layout (OCI image specification, "Image Layout").
type layoutDir struct{ dir *os.File }

func (l layoutDir) close() {}

func (l layoutDir) has(name string) bool {
	var stat unix.Stat_t
	return unix.Fstatat(int(l.dir.Fd()), name, &stat, unix.AT_SYMLINK_NOFOLLOW) == nil
}

func (l layoutDir) open(name string) (io.ReadCloser, int64, error) {
	fd, err := unix.Openat2(int(l.dir.Fd()), name, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, 0, fmt.Errorf("%w: the layout's file %q: %w", errdefs.ErrInvalidArgument, name, err)
	}
	file := os.NewFile(uintptr(fd), name)
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: the layout's %q is no file", errdefs.ErrInvalidArgument, name)
	}
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, info.Size(), nil
}

// readSmall reads a manifest or a configuration.
func readSmall(content archiveContent, name string) ([]byte, error) {
	blob, size, err := content.open(name)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	if size > maxDocument {
		return nil, fmt.Errorf("%w: %q has %d bytes: at most %d", errdefs.ErrInvalidArgument, name, size, maxDocument)
	}
	return io.ReadAll(blob)
}
