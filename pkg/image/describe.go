package image

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Description describes an image for one platform.
type Description struct {
	// Digest is the digest of the image. It is the digest of the index of a multi-platform image, the digest of the manifest
	// of another image, or the image ID of a docker archive.
	Digest digest.Digest
	// Manifest is the digest of the manifest for the platform.
	Manifest digest.Digest
	// Platform is the platform of the manifest, for example "linux/amd64". It may be empty.
	Platform string
	// Layers are the layers in the order of the manifest, the lowest first.
	Layers []LayerBlob
}

// Fetch is a function that opens a manifest, an index or a configuration. Its content is verified when it was read to the end. If it is
// larger than SmallDocument, it is not in memory.
type Fetch func(ctx context.Context, descriptor ocispec.Descriptor) (io.ReadCloser, error)

// maxIndexes is the maximum depth of nested indexes.
const maxIndexes = 4

// Describe returns the description of an image for a platform. root is the descriptor of its manifest or index. documents bounds the
// memory for it.
func Describe(
	ctx context.Context, root ocispec.Descriptor, platform platforms.MatchComparer, documents *Documents, fetch Fetch,
) (Description, error) {
	manifest, found, name, err := findManifest(ctx, root, platform, documents, fetch)
	if err != nil {
		return Description{}, err
	}
	description := Description{Digest: root.Digest, Manifest: found.Digest, Platform: name}
	if !manifest.isImage() {
		description.Layers, err = manifest.layers(imageConfig{})
		return description, err
	}
	err = documents.Read(ctx, manifest.Config.ocispec(), fetch, func(data []byte) error {
		config, err := parseConfig(data)
		if err == nil {
			description.Layers, err = manifest.layers(config)
		}
		return err
	})
	return description, err
}

// FindManifest returns the descriptor of the manifest that an image has for a platform. root is the descriptor of its manifest or index.
func FindManifest(
	ctx context.Context, root ocispec.Descriptor, platform platforms.MatchComparer, documents *Documents, fetch Fetch,
) (ocispec.Descriptor, error) {
	_, found, _, err := findManifest(ctx, root, platform, documents, fetch)
	return found, err
}

// findManifest also returns what was parsed of the manifest, and the name of its platform, which may be empty.
func findManifest(
	ctx context.Context, root ocispec.Descriptor, platform platforms.MatchComparer, documents *Documents, fetch Fetch,
) (manifest manifestOrIndex, found ocispec.Descriptor, name string, err error) {
	next := root
	for range maxIndexes {
		found = next
		err := documents.Read(ctx, found, fetch, func(data []byte) (err error) {
			if manifest, err = parseManifest(data); err != nil || !manifest.isIndex() {
				return err
			}
			next, err = manifest.choose(platform)
			return err
		})
		if err != nil || !manifest.isIndex() {
			return manifest, found, name, err
		}
		if next.Platform != nil {
			if name, err = formatPlatform(*next.Platform); err != nil {
				return manifest, found, "", err
			}
		}
	}
	return manifest, found, "", fmt.Errorf("%w: the image has more than %d nested indexes", errdefs.ErrInvalidArgument, maxIndexes)
}
