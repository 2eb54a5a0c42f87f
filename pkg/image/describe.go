package image

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Description is what an image says of itself, for one platform.
type Description struct {
	// Digest is the image's: of the index if there is one for many platforms, else of the manifest. In a docker archive,
	// which has neither, it is the image ID.
	Digest digest.Digest
	// Manifest is the digest of the manifest for the platform.
	Manifest digest.Digest
	Platform string
	// Layers in the order of the manifest, the lowest first.
	Layers []LayerBlob
}

// Fetch returns the content of a manifest, an index or a configuration, verified.
type Fetch func(ctx context.Context, descriptor ocispec.Descriptor) ([]byte, error)

// maxIndexes is how many indexes may lead from one to the next.
const maxIndexes = 4

// Describe leads from the descriptor of an image to its layers for a platform.
func Describe(ctx context.Context, root ocispec.Descriptor, platform platforms.MatchComparer, fetch Fetch) (Description, error) {
	description := Description{Digest: root.Digest}
	descriptor := root
	for range maxIndexes {
		data, err := fetch(ctx, descriptor)
		if err != nil {
			return Description{}, err
		}
		manifest, err := parseManifest(data)
		if err != nil {
			return Description{}, err
		}
		if len(manifest.Manifests) > 0 {
			if descriptor, err = manifest.choose(platform); err != nil {
				return Description{}, err
			}
			if descriptor.Platform != nil {
				description.Platform = platforms.Format(*descriptor.Platform)
			}
			continue
		}
		description.Manifest = descriptor.Digest
		var config []byte
		if manifest.isImage() {
			if config, err = fetch(ctx, *manifest.Config); err != nil {
				return Description{}, err
			}
		}
		description.Layers, err = manifest.layers(config)
		return description, err
	}
	return Description{}, fmt.Errorf("%w: more than %d indexes lead from one to the next", errdefs.ErrInvalidArgument, maxIndexes)
}
