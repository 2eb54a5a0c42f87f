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

// prefetcher pulls images at start, and protects their layers from garbage collection.
type prefetcher struct {
	catalogue *catalogue
	names     []string
	mu        sync.Mutex
	// resolved maps names to the digests that they resolved to at start.
	resolved map[string]digest.Digest
}

// run pulls an image. It retries until it succeeds or ctx is done.
func (p *prefetcher) run(ctx context.Context, store *Store, name string) {
	for {
		err := p.prefetch(ctx, store, name)
		if err == nil || ctx.Err() != nil {
			return
		}
		klog.FromContext(ctx).Error(err, "Could not prefetch image; will retry", keyImage, name)
		select {
		case <-ctx.Done():
			return
		case <-time.After(prefetchRetry):
		}
	}
}

func (p *prefetcher) prefetch(ctx context.Context, store *Store, name string) error {
	named, err := registry.ParseName(name)
	if err != nil {
		return err
	}
	id, err := store.Resolve(ctx, named, registry.Operator())
	if err != nil {
		return err
	}
	canonical, err := reference.WithDigest(named, id)
	if err != nil {
		return err
	}
	lease, err := store.Pull(ctx, canonical, registry.Operator(), "")
	if err != nil {
		return err
	}
	defer lease.Release()
	if err := store.access.Preload(id, named.Name()); err != nil {
		return err
	}
	klog.FromContext(ctx).Info("Image prefetched", keyImage, name, keyDigest, id)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resolved[name] = id
	return nil
}

// layers returns the layers of the prefetched images. If the name of an image is not yet resolved, these are the layers of
// all present images that were pulled by that name.
func (p *prefetcher) layers() map[digest.Digest]bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	layers := map[digest.Digest]bool{}
	for _, image := range p.catalogue.listImages() {
		for _, name := range p.names {
			resolved, ok := p.resolved[name]
			if ok && resolved != image.Digest || !ok && !slices.Contains(image.Names, name) {
				continue
			}
			for _, id := range image.diffIDs() {
				layers[id] = true
			}
		}
	}
	return layers
}
