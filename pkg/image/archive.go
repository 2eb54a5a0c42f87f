package image

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// ErrNoImage is the error of OpenArchive for a tar that is not an archive of an image.
var ErrNoImage = fmt.Errorf("%w: the tar is not an archive of an image", errdefs.ErrNotFound)

// ArchiveFile identifies an archive and its content. Two equal values identify the same content.
type ArchiveFile struct {
	// Reference is the layer reference of the archive.
	Reference string `json:"reference"`
	Device    uint64 `json:"device"`
	Inode     uint64 `json:"inode"`
	// Size is the size of the file in bytes.
	Size     int64     `json:"size"`
	Modified time.Time `json:"modified"`
}

// IdentifyArchive returns the identity of an open archive. The identity of a directory with an OCI layout is that of its
// index.json, which changes with the content.
func IdentifyArchive(reference string, file *os.File) (ArchiveFile, error) {
	info, err := file.Stat()
	if err == nil && info.IsDir() {
		info, err = statLayoutIndex(file)
	}
	if err != nil {
		return ArchiveFile{}, err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ArchiveFile{}, fmt.Errorf("stat %s: no inode number", file.Name())
	}
	return ArchiveFile{Reference: reference, Device: stat.Dev, Inode: stat.Ino, Size: info.Size(), Modified: info.ModTime().UTC()}, nil
}

// Key returns a digest that identifies the archive. It is not the digest of the content.
func (a ArchiveFile) Key() digest.Digest {
	return digest.FromString(fmt.Sprintf("%q %d %d %d %d", a.Reference, a.Device, a.Inode, a.Size, a.Modified.UnixNano()))
}

// Blob returns the archive as the only layer of an image. The archive is the tar of a root file system.
func (a ArchiveFile) Blob() LayerBlob {
	return LayerBlob{Descriptor: ocispec.Descriptor{Digest: a.Key(), Size: a.Size}, DigestUnknown: true}
}

// Archive is an open archive of one image.
type Archive struct {
	Description
	files     archiveFiles
	documents *Documents
	// names maps the digests of the layers' blobs to their names in the archive.
	names map[digest.Digest]string
}

// archiveFiles provides the files of an archive by name.
type archiveFiles interface {
	// open opens a file and returns its size in bytes.
	open(name string) (content io.ReadCloser, size int64, err error)
	// size returns the size of a file in bytes.
	size(name string) (int64, error)
	has(name string) bool
	close()
}

// OpenArchive opens an archive for a platform. file is a docker archive, an OCI archive or the directory of an OCI layout.
// The archives may be compressed. OpenArchive decompresses them to the directory scratch, because it needs random access.
// documents bounds the memory for its manifests. It returns ErrNoImage if file is another tar, and errdefs.ErrResourceExhausted if the
// archive is larger than a layer may be. The caller closes file after the Archive.
func OpenArchive(
	ctx context.Context, file *os.File, scratch string, platform platforms.MatchComparer, documents *Documents, limits unpack.Limits,
) (*Archive, error) {
	files, err := openFiles(ctx, file, filepath.Join(scratch, "archive.tar"), documents, limits)
	if err != nil {
		return nil, err
	}
	archive := &Archive{files: files, documents: documents, names: map[digest.Digest]string{}}
	index, err := archive.readIndex(ctx)
	switch {
	case err == nil:
		err = archive.describeLayout(ctx, index, platform)
	case files.has(dockerManifestFile):
		// Docker 25 may write an index.json without manifests beside it.
		err = archive.describeDocker(ctx)
	}
	if err != nil {
		files.close()
		return nil, err
	}
	return archive, nil
}

// OpenBlob opens the blob of a layer.
func (a *Archive) OpenBlob(blob LayerBlob) (io.ReadCloser, error) {
	content, _, err := a.files.open(a.names[blob.Descriptor.Digest])
	return content, err
}

// Close frees the resources of the archive. It does not close the file.
func (a *Archive) Close() { a.files.close() }

// openFiles returns the files of an archive. It decompresses a compressed archive to the file at scratch.
func openFiles(ctx context.Context, file *os.File, scratch string, documents *Documents, limits unpack.Limits) (archiveFiles, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return layoutDir{file}, nil
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
		return indexTar(ctx, whole(), io.NopCloser(nil), documents)
	}
	plain, err := decompress(unpack.ContextReader(ctx, whole()))
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	if err := scanTar(ctx, &limitedReader{from: plain, limits: limits}, documents); err != nil {
		return nil, err
	}
	return decompressArchive(ctx, whole(), scratch, documents, limits)
}

// decompressArchive decompresses an archive to a file at scratch. It unlinks the file, which exists until it is closed.
func decompressArchive(
	ctx context.Context, from io.Reader, scratch string, documents *Documents, limits unpack.Limits,
) (archiveFiles, error) {
	plain, err := decompress(unpack.ContextReader(ctx, from))
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	file, err := os.OpenFile(scratch, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	size, err := limits.CopyToFile(ctx, file, plain)
	if err == nil {
		err = os.Remove(scratch)
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("decompress the archive: %w", err)
	}
	return indexTar(ctx, io.NewSectionReader(file, 0, size), file, documents)
}

// limitedReader reads at most as many bytes as a layer may have. A few bytes can decompress to terabytes.
type limitedReader struct {
	from   io.Reader
	limits unpack.Limits
	size   int64
}

func (r *limitedReader) Read(buffer []byte) (int, error) {
	if err := r.limits.CheckSize(r.size); err != nil {
		return 0, fmt.Errorf("decompress the archive: %w", err)
	}
	n, err := r.from.Read(buffer)
	r.size += int64(n)
	return n, err
}

// readDocument reads and parses a file of the archive that is a manifest, an index or a configuration.
func (a *Archive) readDocument(ctx context.Context, name string, parse func(data []byte) error) error {
	content, size, err := a.files.open(name)
	if err != nil {
		return err
	}
	defer content.Close()
	if size > MaxDocumentSize {
		return fmt.Errorf("%w: %q has %d bytes; the maximum is %d", errdefs.ErrInvalidArgument, truncate(name), size, MaxDocumentSize)
	}
	return a.documents.Read(ctx, ocispec.Descriptor{Size: size}, func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
		return io.NopCloser(content), nil
	}, parse)
}
