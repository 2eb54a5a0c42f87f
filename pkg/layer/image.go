package layer

import (
	"context"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	dockerref "github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
)

// images is the layer store.
type images interface {
	Resolve(ctx context.Context, named dockerref.Named, credentials registry.Credentials) (digest.Digest, error)
	ResolvePlatform(ctx context.Context, named dockerref.Named, platform string, credentials registry.Credentials) (digest.Digest, error)
	Acquire(id digest.Digest, path string) (*store.Lease, error)
	Pull(ctx context.Context, named dockerref.Canonical, credentials registry.Credentials, path string) (*store.Lease, error)
	Import(ctx context.Context, name string, file *os.File, wanted digest.Digest) (*store.Lease, error)
}

// withDigest returns the image of an oci:// reference with its digest, which is that of a manifest if the reference has a platform. It asks
// the registry for the digest if neither the reference nor digests have it.
func (r *Resolver) withDigest(
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
		id, err = r.images.ResolvePlatform(ctx, named, ref.Platform(), credentials)
	default:
		id, err = r.images.Resolve(ctx, named, credentials)
	}
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return dockerref.WithDigest(named, id)
}

// ResolveTags replaces the tags of oci:// references by the digests that they have now, so that the references name the same images
// whenever and wherever they are resolved. secrets and namespace are those of the volume.
func (r *Resolver) ResolveTags(
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
		named, err := r.withDigest(ctx, ref, credentials, nil)
		if err != nil {
			return nil, err
		}
		if resolved[i], err = ref.WithDigest(named.Digest()); err != nil {
			return nil, err
		}
	}
	return resolved, nil
}

// leaseImage leases the layers of an oci:// reference.
func (r *Resolver) leaseImage(
	ctx context.Context, ref reference.Reference, credentials registry.Credentials, digests reference.Digests,
) (*store.Lease, error) {
	named, err := r.withDigest(ctx, ref, credentials, digests)
	if err != nil {
		return nil, err
	}
	// The volume was published with this image before. It must be published again when the registry is away, or the secret was renewed.
	if digests[ref.String()] == named.Digest() {
		if lease, err := r.images.Acquire(named.Digest(), ref.Path()); !errdefs.IsNotFound(err) {
			return lease, err
		}
	}
	lease, err := r.images.Pull(ctx, named, credentials, ref.Path())
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return lease, nil
}

// leaseArchive leases the layers of an archive:// reference. It does not need the archive if the reference was resolved before and the
// layers are in the store.
func (r *Resolver) leaseArchive(ctx context.Context, ref reference.Reference, digests reference.Digests) (*store.Lease, error) {
	id, isResolved := digests[ref.String()]
	if isResolved {
		lease, err := r.images.Acquire(id, "")
		if err == nil && lease.Image.Archive == nil {
			// It was pulled from a registry. The archive may give its digest to other content.
			lease.Release()
		} else if !errdefs.IsNotFound(err) {
			return lease, err
		}
	}
	file, err := r.roots.openArchiveInTime(ctx, ref)
	if err != nil {
		return nil, err
	}
	lease, err := r.images.Import(ctx, ref.String(), file, id)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return lease, nil
}
