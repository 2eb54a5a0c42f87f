package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"regexp"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// tarForm has what shows whether a tar is an archive of an image or that of a root file system. docker load goes by manifest.json, whose
// files may have any name. A root file system may have a file of that name too.
type tarForm struct {
	// documents bounds the memory for reading a manifest.json.
	documents *Documents
	// manifestBytes is the total size of its manifest.json, of which there may be many, in bytes.
	manifestBytes int64
	// describesImage reports whether the tar has a manifest.json that names the files of an image.
	describesImage bool
	// hasManifest reports whether it has a manifest.json or index.json, whatever that says.
	hasManifest bool
	// hasIndex and hasLayout report whether it has the two files that every OCI layout has.
	hasIndex, hasLayout bool
	// hasOldLayer reports whether it has a layer where docker save puts it.
	hasOldLayer bool
	// isForeign reports whether it has a file that docker save and OCI layouts do not have.
	isForeign bool
}

// imageNames matches the names of the files that docker save and OCI layouts have.
var imageNames = regexp.MustCompile(`^(|oci-layout|index\.json|manifest\.json|repositories|` +
	`blobs(/[a-z0-9]+(/[0-9a-f]*)?)?|[0-9a-f]{64}\.(json|tar)|[0-9a-f]{64}(/(VERSION|json|layer\.tar)?)?|` +
	`sha256:[0-9a-f]{64}|[0-9a-f]{64}\.tar\.gz)$`)

// oldLayerName matches the name of a layer that docker save wrote before Docker 25.
var oldLayerName = regexp.MustCompile(`^[0-9a-f]{64}/layer\.tar$`)

// maxManifestBytes is the maximum total size in bytes of what is read as manifest.json. A later entry replaces an earlier one of its name,
// and a sparse one takes next to nothing in the tar.
const maxManifestBytes = 4 * MaxDocumentSize

// maxImageName is an upper bound of the length of these names in bytes.
const maxImageName = 256

// add looks at an entry of the tar, and reads the content of a manifest.json.
func (f *tarForm) add(ctx context.Context, name string, header *tar.Header, content io.Reader) error {
	f.isForeign = f.isForeign || len(name) > maxImageName || !imageNames.MatchString(name)
	switch name {
	case dockerManifestFile:
		f.hasManifest = true
		size := min(header.Size, MaxDocumentSize)
		if f.manifestBytes += size; f.manifestBytes > maxManifestBytes {
			return fmt.Errorf("%w: its entries %s have more than %d bytes altogether",
				errdefs.ErrInvalidArgument, dockerManifestFile, maxManifestBytes)
		}
		return f.documents.Read(ctx, ocispec.Descriptor{Size: size}, func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
			return io.NopCloser(io.LimitReader(content, size)), nil
		}, func(data []byte) error {
			f.describesImage = isDockerManifest(data)
			return nil
		})
	case ocispec.ImageIndexFile:
		f.hasManifest, f.hasIndex = true, true
	case ocispec.ImageLayoutFile:
		f.hasLayout = true
	}
	f.hasOldLayer = f.hasOldLayer || oldLayerName.MatchString(name)
	return nil
}

// isImage reports whether the tar is an archive of an image, which may be broken.
func (f *tarForm) isImage() bool {
	return f.describesImage || f.hasIndex && f.hasLayout || f.hasManifest && !f.isForeign
}

// check returns ErrNoImage if the tar is not an archive of an image, and ErrInvalidArgument if it is one without a manifest.
func (f *tarForm) check() error {
	switch {
	case f.isImage():
		return nil
	case f.hasOldLayer && !f.isForeign:
		// The layers are in the order of their parents, and no diff ID verifies them.
		return fmt.Errorf("%w: the archive has layers but no %s, as docker save wrote it before Docker 1.10; "+
			"load it with a Docker that still reads it, and save it again", errdefs.ErrInvalidArgument, dockerManifestFile)
	}
	return ErrNoImage
}

// isDockerManifest reports whether the content of a manifest.json names the files of an image.
func isDockerManifest(data []byte) bool {
	var images list[dockerImage]
	if json.Unmarshal(data, &images) != nil || images.count == 0 {
		return false
	}
	return images.items[0].Config != "" && images.items[0].Layers.count > 0
}
