package store

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// fetcher brings single layers to the node, each once for all who want it.
type fetcher struct {
	catalogue *catalogue
	// slots bounds the layers that are downloaded and unpacked at the same time.
	slots *semaphore.Weighted

	mu sync.Mutex
	// fetches are those in progress. The lock is taken before the catalogue's.
	fetches map[blobKey]*fetch
}

// fetch is a layer in progress.
type fetch struct {
	done chan struct{}
	// err may be read when done is closed.
	err      error
	received progressCounter
}

func newFetcher(catalogue *catalogue, slots int) *fetcher {
	return &fetcher{catalogue: catalogue, slots: semaphore.NewWeighted(int64(max(slots, 1))), fetches: map[blobKey]*fetch{}}
}

// layer returns the layer's diff ID with a reference held. Concurrent callers share one fetch.
func (f *fetcher) layer(ctx context.Context, blob image.LayerBlob, from origin) (digest.Digest, error) {
	for tries := 0; ; tries++ {
		id, current, isOurs := f.join(blob)
		if current == nil {
			return id, nil
		}
		if isOurs {
			return f.run(ctx, current, blob, from)
		}
		select {
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-current.done:
		}
		// Another pull's try may have failed for reasons of its own, such as its credentials.
		if current.err != nil && tries > 0 {
			return "", current.err
		}
	}
}

// join returns a present layer with a reference held, or else a fetch: one in progress or, with isOurs, a new one that
// the caller runs.
func (f *fetcher) join(blob image.LayerBlob) (id digest.Digest, current *fetch, isOurs bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if id, err := f.catalogue.acquireBlob(blob); err == nil {
		return id, nil, false
	}
	if current, ok := f.fetches[keyOf(blob)]; ok {
		return "", current, false
	}
	current = &fetch{done: make(chan struct{})}
	f.fetches[keyOf(blob)] = current
	return "", current, true
}

// run fetches a layer for all who wait for it.
func (f *fetcher) run(ctx context.Context, current *fetch, blob image.LayerBlob, from origin) (digest.Digest, error) {
	layer, err := f.fetchInSlot(ctx, current, blob, from)
	if err == nil {
		f.catalogue.add(layer, keyOf(blob))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.fetches, keyOf(blob))
	current.err = err
	close(current.done)
	return layer.DiffID, err
}

func (f *fetcher) fetchInSlot(ctx context.Context, current *fetch, blob image.LayerBlob, from origin) (Layer, error) {
	if err := f.slots.Acquire(ctx, 1); err != nil {
		return Layer{}, err
	}
	defer f.slots.Release(1)
	return from.fetch(ctx, blob, &current.received)
}

// received returns how many bytes of a blob have been received.
func (f *fetcher) received(blob image.LayerBlob) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if current, ok := f.fetches[keyOf(blob)]; ok {
		return current.received.load()
	}
	return 0
}
