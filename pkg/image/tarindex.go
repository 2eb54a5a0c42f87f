package image

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"path"
	"strings"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

const (
	// maxArchiveFiles is the maximum number of entries in an archive, of every type. Images have up to three files for each layer.
	maxArchiveFiles = 100_000
	// maxArchiveNames is the maximum total length of the names in an archive and of the targets of its links in bytes.
	maxArchiveNames = 16 << 20
	// maxSparseHeaders is the maximum number of headers that are read to find sparse files. It is more than 500 layers need in an archive with
	// three files for each.
	maxSparseHeaders = 1 << 19
	// maxArchiveLinks is the maximum number of links that are followed to a file in an archive.
	maxArchiveLinks = 16
)

// scanTar returns ErrNoImage if a tar is not an archive of an image.
func scanTar(ctx context.Context, from io.Reader, documents *Documents) error {
	return walkTar(ctx, tar.NewReader(unpack.ContextReader(ctx, from)), documents, func(string, *tar.Header) error { return nil })
}

// walkTar calls visit for the entries of a tar, with their clean names relative to the root. It returns ErrNoImage if the tar is not an
// archive of an image.
func walkTar(
	ctx context.Context, reader *tar.Reader, documents *Documents, visit func(name string, header *tar.Header) error,
) error {
	form := tarForm{documents: documents}
	names := 0
	for range maxArchiveFiles {
		header, err := reader.Next()
		if err == io.EOF {
			return form.check()
		}
		if err != nil {
			return explainTarError(ctx, err)
		}
		if names += len(header.Name) + len(header.Linkname); names > maxArchiveNames {
			break
		}
		name := strings.TrimPrefix(path.Clean("/"+header.Name), "/")
		if err := visit(name, header); err != nil {
			return err
		}
		if err := form.add(ctx, name, header, reader); err != nil {
			return explainTarError(ctx, err)
		}
	}
	// The tar of a root file system may have as many as a layer.
	if form.isForeign && !form.isImage() {
		return ErrNoImage
	}
	return fmt.Errorf("%w: the archive has more than %d entries, or names of more than %d bytes altogether",
		errdefs.ErrInvalidArgument, maxArchiveFiles, maxArchiveNames)
}

// explainTarError adds its kind to an error of reading a tar.
func explainTarError(ctx context.Context, err error) error {
	if ctx.Err() != nil || errdefs.IsResourceExhausted(err) {
		return err
	}
	return fmt.Errorf("%w: read the tar: %w", errdefs.ErrInvalidArgument, err)
}

// tarIndex is an index of the files in an uncompressed archive.
type tarIndex struct {
	ctx    context.Context
	from   *io.SectionReader
	files  map[string]section
	links  map[string]string
	closer io.Closer
	// sparseHeaders is the number of headers that were read to find sparse files.
	sparseHeaders atomic.Int64
}

// section is the content of a file in a tar, in bytes.
type section struct {
	offset, size int64
	// entry is the number of the entry, from 1, if the file is sparse. Its content is then not at offset.
	entry int
}

// indexTar returns an index of the files in an archive, which can be read until ctx is done. It returns ErrNoImage for another tar. The
// close method of the index closes closer. indexTar closes it itself after an error.
func indexTar(ctx context.Context, from *io.SectionReader, closer io.Closer, documents *Documents) (archiveFiles, error) {
	t := &tarIndex{ctx: ctx, from: from, files: map[string]section{}, links: map[string]string{}, closer: closer}
	entry := 0
	err := walkTar(ctx, tar.NewReader(contextSection{from, ctx}), documents, func(name string, header *tar.Header) error {
		entry++
		return t.add(name, header, entry)
	})
	if err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// add adds an entry, which replaces an earlier one of its name. The tar reader has read its header and nothing else.
func (t *tarIndex) add(name string, header *tar.Header, entry int) error {
	delete(t.files, name)
	delete(t.links, name)
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		// The tar reader reads no further than the header if its source is a seeker.
		offset, err := t.from.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		at := section{offset: offset, size: header.Size}
		if isSparse(header) {
			at.entry = entry
		}
		t.files[name] = at
	case tar.TypeLink:
		t.links[name] = strings.TrimPrefix(path.Clean("/"+header.Linkname), "/")
	case tar.TypeSymlink:
		// Old docker archives have links in place of repeated layers. A link cannot lead out of the archive.
		target := header.Linkname
		if !path.IsAbs(target) {
			target = path.Join("/", path.Dir(name), target)
		}
		t.links[name] = strings.TrimPrefix(path.Clean(target), "/")
	}
	return nil
}

// isSparse reports whether a file has holes that are not in the tar.
func isSparse(header *tar.Header) bool {
	for record := range header.PAXRecords {
		if strings.HasPrefix(record, "GNU.sparse.") {
			return true
		}
	}
	return header.Typeflag == tar.TypeGNUSparse
}

// contextSection reads a file until ctx is done. It is a seeker, so that the tar reader skips the content of files.
type contextSection struct {
	*io.SectionReader
	ctx context.Context
}

func (s contextSection) Read(buffer []byte) (int, error) {
	return unpack.ContextReader(s.ctx, s.SectionReader).Read(buffer)
}

// find returns the content of a file, through links.
func (t *tarIndex) find(name string) (section, bool) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for range maxArchiveLinks {
		target, ok := t.links[name]
		if !ok {
			break
		}
		name = target
	}
	at, ok := t.files[name]
	return at, ok
}

func (t *tarIndex) has(name string) bool { _, ok := t.find(name); return ok }

func (t *tarIndex) close() { t.closer.Close() }

func (t *tarIndex) size(name string) (int64, error) {
	at, err := t.mustFind(name)
	return at.size, err
}

// mustFind is find with an error.
func (t *tarIndex) mustFind(name string) (section, error) {
	at, ok := t.find(name)
	if !ok {
		return section{}, fmt.Errorf("%w: the archive has no file %q", errdefs.ErrInvalidArgument, truncate(name))
	}
	return at, nil
}

func (t *tarIndex) open(name string) (io.ReadCloser, int64, error) {
	at, err := t.mustFind(name)
	if err != nil {
		return nil, 0, err
	}
	if at.entry == 0 {
		return io.NopCloser(io.NewSectionReader(t.from, at.offset, at.size)), at.size, nil
	}
	if t.sparseHeaders.Add(int64(at.entry)) > maxSparseHeaders {
		return nil, 0, fmt.Errorf("%w: the archive has too many sparse files behind too many others; write it without --sparse",
			errdefs.ErrInvalidArgument)
	}
	// Only the tar reader knows where the holes are.
	reader := tar.NewReader(contextSection{io.NewSectionReader(t.from, 0, t.from.Size()), t.ctx})
	for range at.entry {
		if _, err := reader.Next(); err != nil {
			return nil, 0, explainTarError(t.ctx, err)
		}
	}
	return io.NopCloser(reader), at.size, nil
}
