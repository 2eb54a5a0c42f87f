package layer

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	dockerref "github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
)

// registries have the digests of images. It is a registry.Tags, that of a store or alone.
type registries interface {
	Resolve(ctx context.Context, named dockerref.Named, credentials registry.Credentials) (digest.Digest, error)
	ResolvePlatform(ctx context.Context, named dockerref.Named, platform string, credentials registry.Credentials) (digest.Digest, error)
}

// Tags resolves the tags of oci:// references.
type Tags struct{ registries registries }

// NewTags returns a Tags that asks these registries.
func NewTags(registries registries) *Tags { return &Tags{registries} }

// withDigest returns the image of an oci:// reference with its digest, which is that of a manifest if the reference has a platform. It asks
// the registry for the digest if neither the reference nor digests have it.
func (t *Tags) withDigest(
	ctx context.Context, ref reference.Reference, credentials registry.Credentials, digests reference.Digests,
) (dockerref.Canonical, error) {
	named, err := dockerref.ParseNormalizedNamed(ref.Name())
	if err != nil {
		return nil, fmt.Errorf("%w: layer %s: %w", errdefs.ErrInvalidArgument, ref, err)
	}
	if canonical, ok := named.(dockerref.Canonical); ok && ref.Platform() == "" {
		return canonical, nil
	}
	id, ok := digests[ref.String()]
	switch {
	case ok:
	case ref.Platform() != "":
		id, err = t.registries.ResolvePlatform(ctx, named, ref.Platform(), credentials)
	default:
		id, err = t.registries.Resolve(ctx, named, credentials)
	}
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return dockerref.WithDigest(named, id)
}

// ResolveTags replaces the tags of oci:// references by the digests that they have now, so that the references name the same images
// whenever and wherever they are resolved. secrets and namespace are those of the volume.
func (t *Tags) ResolveTags(
	ctx context.Context, refs []reference.Reference, secrets map[string]string, namespace string,
) ([]reference.Reference, error) {
	credentials, err := registry.ParseCredentials(secrets)
	if err != nil {
		return nil, err
	}
	credentials = credentials.InNamespace(namespace)
	resolved := slices.Clone(refs)
	for i, ref := range refs {
		if ref.Scheme() != reference.OCI {
			continue
		}
		named, err := t.withDigest(ctx, ref, credentials, nil)
		if err != nil {
			return nil, err
		}
		if resolved[i], err = ref.WithDigest(named.Digest()); err != nil {
			return nil, err
		}
	}
	return resolved, nil
}
