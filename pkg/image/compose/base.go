package compose

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// maxDocument is the maximum size of the manifest and of the configuration of a base in bytes. Registries take manifests up to that
// (distribution, maxManifestBodySize).
const maxDocument = 4 << 20

// ErrNoBase is returned for what cannot be the image below another layer. Alone makes an image above it all the same.
var ErrNoBase = fmt.Errorf("%w: not an image that containers run and that may be distributed", errdefs.ErrFailedPrecondition)

// Base is the image that a new layer is put on.
type Base struct {
	// Manifest is the digest of its manifest.
	Manifest digest.Digest
	// Layers are its layers, the lowest first, with the media types of OCI.
	Layers []ocispec.Descriptor
	// DiffIDs are the digests of their tars.
	DiffIDs []digest.Digest

	// config has the fields of the configuration. What is not changed is kept, also what the specification does not know.
	config  map[string]json.RawMessage
	history []json.RawMessage
}

// ociTypes has the media types of OCI for Docker's.
var ociTypes = map[string]string{
	images.MediaTypeDockerSchema2Layer:     ocispec.MediaTypeImageLayer,
	images.MediaTypeDockerSchema2LayerGzip: ocispec.MediaTypeImageLayerGzip,
	images.MediaTypeDockerSchema2LayerZstd: ocispec.MediaTypeImageLayerZstd,
}

// ReadBase reads the manifest and the configuration that an image has for a platform. It returns ErrNoBase for an artifact, and for an
// image with layers that may not be distributed.
func ReadBase(
	ctx context.Context, root ocispec.Descriptor, platform platforms.MatchComparer, documents *image.Documents, fetch image.Fetch,
) (Base, error) {
	found, err := image.FindManifest(ctx, root, platform, documents, fetch)
	if err != nil {
		return Base{}, err
	}
	var manifest ocispec.Manifest
	if err := read(ctx, found, documents, fetch, &manifest); err != nil {
		return Base{}, err
	}
	if !images.IsConfigType(manifest.Config.MediaType) {
		return Base{}, fmt.Errorf("%w: %s is an artifact", ErrNoBase, root.Digest)
	}
	base := Base{Manifest: found.Digest}
	if err := read(ctx, manifest.Config, documents, fetch, &base.config); err != nil {
		return Base{}, err
	}
	if err := base.parseConfig(); err != nil {
		return Base{}, err
	}
	if len(base.DiffIDs) != len(manifest.Layers) {
		return Base{}, fmt.Errorf("%w: %s has %d layers, but its configuration has %d diff IDs", ErrNoBase,
			root.Digest, len(manifest.Layers), len(base.DiffIDs))
	}
	for _, layer := range manifest.Layers {
		if converted, ok := ociTypes[layer.MediaType]; ok {
			layer.MediaType = converted
		}
		if !images.IsLayerType(layer.MediaType) || images.IsNonDistributable(layer.MediaType) {
			return Base{}, fmt.Errorf("%w: layer %s has the media type %q", ErrNoBase, layer.Digest, layer.MediaType)
		}
		layer.URLs, layer.Data = nil, nil
		base.Layers = append(base.Layers, layer)
	}
	return base, nil
}

// read reads a document of JSON.
func read(ctx context.Context, descriptor ocispec.Descriptor, documents *image.Documents, fetch image.Fetch, into any) error {
	if descriptor.Size > maxDocument {
		return fmt.Errorf("%w: document %s has %d bytes; the maximum for an image that gets another layer is %d",
			errdefs.ErrFailedPrecondition, descriptor.Digest, descriptor.Size, maxDocument)
	}
	return documents.Read(ctx, descriptor, fetch, func(data []byte) error {
		if err := json.Unmarshal(data, into); err != nil {
			return fmt.Errorf("%w: parse document %s of the image: %w", errdefs.ErrInvalidArgument, descriptor.Digest, err)
		}
		return nil
	})
}

// parseConfig parses the fields of the configuration that get another entry.
func (b *Base) parseConfig() error {
	var rootFS ocispec.RootFS
	for name, into := range map[string]any{"rootfs": &rootFS, "history": &b.history} {
		field, ok := b.config[name]
		if !ok {
			continue
		}
		if err := json.Unmarshal(field, into); err != nil {
			return fmt.Errorf("%w: parse %s in the configuration of the image: %w", errdefs.ErrInvalidArgument, name, err)
		}
	}
	b.DiffIDs = rootFS.DiffIDs
	return nil
}
