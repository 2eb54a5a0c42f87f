package registry

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// Tags asks registries which digests names have.
type Tags struct {
	client    *Client
	documents *image.Documents
}

// NewTags returns a Tags. Its manifests take their memory from that of documents.
func NewTags(client *Client, documents *image.Documents) *Tags { return &Tags{client, documents} }

// Resolve returns the digest that the registry currently has for a reference.
func (t *Tags) Resolve(ctx context.Context, named reference.Named, credentials Credentials) (digest.Digest, error) {
	descriptor, err := t.client.Repository(named, credentials).Resolve(ctx)
	return descriptor.Digest, err
}

// ResolvePlatform returns the digest of the manifest that an image in a registry has for a platform, such as "linux/arm64".
func (t *Tags) ResolvePlatform(
	ctx context.Context, named reference.Named, platform string, credentials Credentials,
) (digest.Digest, error) {
	parsed, err := platforms.Parse(platform)
	if err != nil {
		return "", fmt.Errorf("%w: platform %q: %w", errdefs.ErrInvalidArgument, platform, err)
	}
	repository := t.client.Repository(named, credentials)
	descriptor, err := repository.Resolve(ctx)
	if err != nil {
		return "", err
	}
	description, err := image.Describe(ctx, descriptor, platforms.Only(parsed), t.documents, repository.Fetch)
	if err != nil {
		return "", fmt.Errorf("image %s for %s: %w", named, platform, err)
	}
	return description.Manifest, nil
}
