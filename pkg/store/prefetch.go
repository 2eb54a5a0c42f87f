package store

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
)

// prefetchRetry is the pause after a failed prefetch.
const prefetchRetry = time.Minute

// prefetchedName is the name of an image to prefetch.
type prefetchedName struct {
	text  string
	named reference.Named
}

// parsePrefetchedNames parses the names of images to prefetch.
func parsePrefetchedNames(names []string) ([]prefetchedName, error) {
	parsed := make([]prefetchedName, len(names))
	for i, name := range names {
		named, err := registry.ParseName(name)
		if err != nil {
			return nil, err
		}
		parsed[i] = prefetchedName{name, named}
	}
	return parsed, nil
}

// isOf reports whether the name stands for an image. A digest in the name decides alone. That a pod has pulled an image by the tag
// is not enough: the pod may have written another digest beside it.
func (n prefetchedName) isOf(image *Image) bool {
	if canonical, ok := n.named.(reference.Canonical); ok {
		return image.Digest == canonical.Digest()
	}
	return n.hasPrefetched(image)
}

// hasPrefetched reports whether an image was prefetched by the name.
func (n prefetchedName) hasPrefetched(image *Image) bool {
	return slices.Contains(image.Prefetched, n.named.String())
}

// prefetcher pulls images at start, and protects their layers from garbage collection.
type prefetcher struct {
	catalogue *catalogue
	names     []prefetchedName
	mu        sync.Mutex
	// resolved maps names to the digests that they resolved to at start.
	resolved map[string]digest.Digest
}

// run pulls an image. It retries until it succeeds or ctx is done.
func (p *prefetcher) run(ctx context.Context, store *Store, name prefetchedName) {
	for {
		err := p.prefetch(ctx, store, name)
		if err == nil || ctx.Err() != nil {
			return
		}
		klog.FromContext(ctx).Error(err, "Could not prefetch image; will retry", keyImage, name.text)
		select {
		case <-ctx.Done():
			return
		case <-time.After(prefetchRetry):
		}
	}
}

func (p *prefetcher) prefetch(ctx context.Context, store *Store, name prefetchedName) error {
	id, err := store.Resolve(ctx, name.named, registry.Operator())
	if err != nil {
		return err
	}
	canonical, err := reference.WithDigest(name.named, id)
	if err != nil {
		return err
	}
	lease, err := store.Pull(ctx, canonical, registry.Operator(), "")
	if err != nil {
		return err
	}
	defer lease.Release()
	if err := p.catalogue.addPrefetched(id, name); err != nil {
		return err
	}
	klog.FromContext(ctx).Info("Image prefetched", keyImage, name.text, keyDigest, id)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resolved[name.text] = id
	return nil
}

// layers returns the layers of the prefetched images. If the name of an image is not yet resolved, these are the layers of
// all present images that were prefetched by that name before.
func (p *prefetcher) layers() map[digest.Digest]bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	layers := map[digest.Digest]bool{}
	for _, image := range p.catalogue.listImages() {
		for _, name := range p.names {
			resolved, ok := p.resolved[name.text]
			if ok && resolved != image.Digest || !ok && !name.isOf(&image) {
				continue
			}
			for _, id := range image.diffIDs() {
				layers[id] = true
			}
		}
	}
	return layers
}
