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

// images is what oci:// and archive:// references need of the layer store.
type images interface {
	Resolve(ctx context.Context, named dockerref.Named, credentials registry.Credentials) (digest.Digest, error)
	Acquire(id digest.Digest, path string) (*store.Lease, error)
	Pull(ctx context.Context, named dockerref.Canonical, credentials registry.Credentials, path string) (*store.Lease, error)
	Import(ctx context.Context, name string, file *os.File, wanted digest.Digest) (*store.Lease, error)
}

// pinned returns the image of an oci:// reference with its digest, which is asked of the registry where neither the
// reference nor the pins have it.
func (r *Resolver) pinned(ctx context.Context, ref reference.Reference, credentials registry.Credentials, pins reference.Digests) (dockerref.Canonical, error) {
	named, err := dockerref.ParseNormalizedNamed(ref.Name())
	if err != nil {
		return nil, fmt.Errorf("%w: layer %s: %w", errdefs.ErrInvalidArgument, ref, err)
	}
	if canonical, ok := named.(dockerref.Canonical); ok {
		return canonical, nil
	}
	id, ok := pins[ref.String()]
	if !ok {
		if id, err = r.images.Resolve(ctx, named, credentials); err != nil {
			return nil, fmt.Errorf("layer %s: %w", ref, err)
		}
	}
	return dockerref.WithDigest(named, id)
}

// Pin replaces the tags of oci:// references by what they stand for at the moment: the same images whenever and wherever
// they are resolved. secrets are those of the volume.
func (r *Resolver) Pin(ctx context.Context, refs []reference.Reference, secrets map[string]string) ([]reference.Reference, error) {
	credentials, err := registry.ParseCredentials(secrets)
	if err != nil {
		return nil, err
	}
	pinned := make([]reference.Reference, len(refs))
	for i, ref := range refs {
		pinned[i] = ref
		if ref.Scheme() != reference.OCI {
			continue
		}
		named, err := r.pinned(ctx, ref, credentials, nil)
		if err != nil {
			return nil, err
		}
		if pinned[i], err = ref.WithDigest(named.Digest()); err != nil {
			return nil, err
		}
	}
	return pinned, nil
}

// useImage opens the layers of an oci:// dockerref.
func (r *Resolver) useImage(ctx context.Context, ref reference.Reference, credentials registry.Credentials, pins reference.Digests) (*store.Lease, error) {
	named, err := r.pinned(ctx, ref, credentials, pins)
	if err != nil {
		return nil, err
	}
	use, err := r.images.Pull(ctx, named, credentials, ref.Path())
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return use, nil
}

// useArchive opens the layers of an archive:// dockerref. The archive itself need not be there any more, where what it
// was is known and is in the store.
func (r *Resolver) useArchive(ctx context.Context, ref reference.Reference, pins reference.Digests) (*store.Lease, error) {
	pin, isPinned := pins[ref.String()]
	if isPinned {
		if lease, err := r.images.Acquire(pin, ""); !errdefs.IsNotFound(err) {
			return lease, err
		}
	}
	file, err := r.roots.openArchive(ref)
	if err != nil {
		return nil, err
	}
	use, err := r.images.Import(ctx, ref.String(), file, pin)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return use, nil
}
