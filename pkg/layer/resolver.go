package layer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
)

// Request says for whom references are resolved.
type Request struct {
	Pod kubelet.Pod
	// Secrets are the volume's. They may contain credentials for registries.
	Secrets map[string]string
	// Digests are the image digests that references of the volume were resolved to before. They are used again.
	Digests reference.Digests
}

// Resolver resolves references of every scheme.
type Resolver struct {
	roots      *Roots
	podVolumes *PodVolumes
	images     images
	tags       *Tags
}

// NewResolver returns a resolver of dir:// and archive:// beneath roots, volume:// in podVolumes, and oci:// in images. The
// frozen uppers of a cache:// are not layers, and others open them.
func NewResolver(roots *Roots, podVolumes *PodVolumes, images images) *Resolver {
	return &Resolver{roots: roots, podVolumes: podVolumes, images: images, tags: NewTags(images)}
}

// Resolve opens the directories of the references in their order. It pulls images that are not on the node. The caller closes the
// result.
func (r *Resolver) Resolve(ctx context.Context, refs []reference.Reference, req Request) (*ResolvedLayers, error) {
	credentials, err := registry.ParseCredentials(req.Secrets)
	if err != nil {
		return nil, err
	}
	credentials = credentials.InNamespace(req.Pod.Namespace)
	resolved := newResolvedLayers()
	for len(refs) > 0 {
		var next []reference.Reference
		if next, refs = splitDirs(refs); len(next) == 0 {
			next, refs = refs[:1], refs[1:]
		}
		if err := r.resolve(ctx, next, req, credentials, resolved); err != nil {
			resolved.Close()
			return nil, err
		}
	}
	return resolved, nil
}

// splitDirs splits the references before the first that is not dir://.
func splitDirs(refs []reference.Reference) (dirs, rest []reference.Reference) {
	n := slices.IndexFunc(refs, func(ref reference.Reference) bool { return ref.Scheme() != reference.Dir })
	if n < 0 {
		n = len(refs)
	}
	return refs[:n], refs[n:]
}

// resolve opens the directories of one reference, or of several dir:// references, and adds them to resolved.
func (r *Resolver) resolve(
	ctx context.Context, refs []reference.Reference, req Request, credentials registry.Credentials, resolved *ResolvedLayers,
) error {
	ref := refs[0]
	switch ref.Scheme() {
	case reference.Dir:
		dirs, err := r.roots.openDirsInTime(ctx, refs)
		for _, dir := range dirs {
			resolved.addDir(dir.file, dir.fingerprint)
		}
		return err
	case reference.Volume:
		dir, err := r.podVolumes.Open(ctx, ref, req.Pod)
		if err != nil {
			return err
		}
		// It may change.
		resolved.addDir(dir, "")
		return nil
	case reference.OCI:
		lease, err := r.leaseImage(ctx, ref, credentials, req.Digests)
		if err != nil {
			return err
		}
		return resolved.addImage(ref, lease)
	case reference.Archive:
		lease, err := r.leaseArchive(ctx, ref, req.Digests)
		if err != nil {
			return err
		}
		return resolved.addImage(ref, lease)
	case reference.Cache:
		resolved.Caches = append(resolved.Caches, CacheLayer{ref.Name(), len(resolved.Dirs)})
		return nil
	}
	panic(fmt.Sprintf("layer %s: scheme %q", ref, ref.Scheme()))
}

// ResolveTags is [Tags.ResolveTags].
func (r *Resolver) ResolveTags(
	ctx context.Context, refs []reference.Reference, secrets map[string]string, namespace string,
) ([]reference.Reference, error) {
	return r.tags.ResolveTags(ctx, refs, secrets, namespace)
}

// Check returns ErrInvalidArgument if a reference cannot be resolved on any node for any pod: if it names an unknown layer root,
// or a cache.
func (r *Resolver) Check(refs []reference.Reference) error {
	for _, ref := range refs {
		if ref.Scheme() == reference.Cache {
			return fmt.Errorf("%w: layer %s: a cache belongs to the namespace of a pod; use it in an inline volume of the pod",
				errdefs.ErrInvalidArgument, ref)
		}
		if ref.Scheme() != reference.Dir && ref.Scheme() != reference.Archive {
			continue
		}
		if _, err := r.roots.find(ref); err != nil {
			return err
		}
	}
	return nil
}

// CheckPresent returns the error of the first dir:// or archive:// reference that cannot be opened on this node, which is
// ErrDoesNotAnswer where its file system does not answer. It does not check images, which can be pulled, and volumes of pods.
func (r *Resolver) CheckPresent(ctx context.Context, refs []reference.Reference) error {
	for i, ref := range refs {
		switch ref.Scheme() {
		case reference.Dir:
			dirs, err := r.roots.openDirsInTime(ctx, refs[i:i+1])
			if err != nil {
				return err
			}
			dirs[0].file.Close()
		case reference.Archive:
			archive, err := r.roots.openArchiveInTime(ctx, ref)
			if err != nil {
				return err
			}
			archive.Close()
		case reference.OCI, reference.Volume, reference.Cache:
		}
	}
	return nil
}

// CheckRoots returns an error for each layer root that cannot be opened on this node, which is ErrDoesNotAnswer where its file system
// does not answer.
func (r *Resolver) CheckRoots(ctx context.Context) (errs []error) {
	for _, name := range slices.Sorted(maps.Keys(r.roots.roots)) {
		root, err := r.roots.openRootInTime(ctx, name)
		switch {
		case errors.Is(err, ErrDoesNotAnswer):
			errs = append(errs, err)
		case err != nil:
			errs = append(errs, fmt.Errorf("layer root %s: %w", name, err))
		default:
			root.Close()
		}
	}
	return errs
}
