package layer

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	dockerref "github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
)

// images is the layer store.
type images interface {
	registries
	Acquire(id digest.Digest, path string) (*store.Lease, error)
	Pull(ctx context.Context, named dockerref.Canonical, credentials registry.Credentials, path string) (*store.Lease, error)
	Import(ctx context.Context, name string, file *os.File, wanted digest.Digest) (*store.Lease, error)
}

// leaseImage leases the layers of an oci:// reference.
func (r *Resolver) leaseImage(
	ctx context.Context, ref reference.Reference, credentials registry.Credentials, digests reference.Digests,
) (*store.Lease, error) {
	named, err := r.tags.withDigest(ctx, ref, credentials, digests)
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
