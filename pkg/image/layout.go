package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// blobsName is the name of the directory with the blobs of a layout.
const blobsName = "blobs"

// layoutDir is the directory of an OCI layout (OCI image specification, "Image Layout").
type layoutDir struct{ dir *os.File }

func (layoutDir) close() {}

func (l layoutDir) has(name string) bool {
	file, err := l.openFile(name)
	if err == nil {
		file.Close()
	}
	return !errors.Is(err, fs.ErrNotExist)
}

func (l layoutDir) open(name string) (io.ReadCloser, int64, error) {
	file, err := l.openFile(name)
	if err != nil {
		return nil, 0, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: file %q of the layout is not a regular file", errdefs.ErrInvalidArgument, truncate(name))
	}
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, info.Size(), nil
}

func (l layoutDir) size(name string) (int64, error) {
	file, size, err := l.open(name)
	if err != nil {
		return 0, err
	}
	return size, file.Close()
}

// openFile opens a file of the layout. It does not follow links.
func (l layoutDir) openFile(name string) (*os.File, error) {
	file, err := linux.Open(l.dir, name, os.O_RDONLY|linux.O_NOFOLLOW|linux.O_NONBLOCK, linux.ResolveBeneath|linux.ResolveNoSymlinks)
	if err != nil {
		return nil, fmt.Errorf("%w: open file %q of the layout: %w", errdefs.ErrInvalidArgument, truncate(name), err)
	}
	return file, nil
}

// statLayoutIndex returns the file info of the index.json in the directory of a layout.
func statLayoutIndex(dir *os.File) (fs.FileInfo, error) {
	file, err := layoutDir{dir}.openFile(ocispec.ImageIndexFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: the directory has no %s; want an OCI layout", errdefs.ErrInvalidArgument, ocispec.ImageIndexFile)
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return file.Stat()
}

// readIndex returns the index.json of an OCI layout or archive.
func (a *Archive) readIndex(ctx context.Context) (index manifestOrIndex, err error) {
	err = a.readDocument(ctx, ocispec.ImageIndexFile, func(data []byte) (err error) {
		index, err = parseManifest(data)
		if err == nil && !index.isIndex() {
			err = fmt.Errorf("%w: %s is not an index", errdefs.ErrInvalidArgument, ocispec.ImageIndexFile)
		}
		return err
	})
	return index, err
}

// describeLayout sets the description from the index.json of an OCI layout or archive.
func (a *Archive) describeLayout(ctx context.Context, index manifestOrIndex, platform platforms.MatchComparer) error {
	root, err := index.chooseInLayout(platform)
	if err != nil {
		return err
	}
	fetch := func(_ context.Context, descriptor ocispec.Descriptor) (io.ReadCloser, error) {
		content, _, err := a.files.open(blobPath(descriptor.Digest))
		if err != nil {
			return nil, err
		}
		return verifiedAtEnd{content, NewVerifyingReader(LayerBlob{Descriptor: descriptor}, content)}, nil
	}
	a.Description, err = Describe(ctx, root, platform, a.documents, fetch)
	for _, blob := range a.Layers {
		a.names[blob.Descriptor.Digest] = blobPath(blob.Descriptor.Digest)
	}
	return err
}

// verifiedAtEnd is a document that returns ErrContentMismatch at its end, and where it is too long.
type verifiedAtEnd struct {
	io.Closer
	content *VerifyingReader
}

func (v verifiedAtEnd) Read(buffer []byte) (int, error) {
	n, err := v.content.Read(buffer)
	if isTooLong := v.content.size > v.content.blob.Descriptor.Size; isTooLong || errors.Is(err, io.EOF) {
		if mismatch := v.content.Verify(); mismatch != nil {
			return n, mismatch
		}
	}
	return n, err
}

// blobPath returns the path of a blob in a layout.
func blobPath(id digest.Digest) string {
	return path.Join(blobsName, id.Algorithm().String(), id.Encoded())
}

// chooseInLayout returns the descriptor of the image in the index.json of a layout. The layout must have exactly one image, which may have
// more than one name. Some tools list the manifests of its platforms there.
func (d manifestOrIndex) chooseInLayout(platform platforms.MatchComparer) (ocispec.Descriptor, error) {
	var images []descriptor
	for _, candidate := range d.images() {
		if !slices.ContainsFunc(images, func(d descriptor) bool { return d.Digest == candidate.Digest }) {
			images = append(images, candidate)
		}
	}
	if len(images) == 1 {
		return images[0].ocispec(), nil
	}
	// Two manifests of one image have different platforms, and the same name if they have names.
	seen := map[imagePlatform]bool{}
	for _, image := range images {
		if image.Platform == nil || seen[*image.Platform] || image.Annotations.RefName != images[0].Annotations.RefName {
			return ocispec.Descriptor{}, errImageCount(len(images))
		}
		seen[*image.Platform] = true
	}
	return d.choose(platform)
}

func errImageCount(count int) error {
	return fmt.Errorf("%w: the archive has %d images; create one archive for each", errdefs.ErrInvalidArgument, count)
}
