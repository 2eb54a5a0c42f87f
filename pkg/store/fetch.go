package store

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// fetcher fetches single layers. Concurrent pulls share the fetch of a layer.
type fetcher struct {
	catalogue *catalogue
	// slots bounds the number of layers that are downloaded and unpacked at the same time.
	slots *semaphore.Weighted

	mu sync.Mutex
	// fetches are the fetches in progress. mu is locked before the lock of the catalogue.
	fetches map[blobKey]*fetch
}

// fetch is the fetch of a layer in progress.
type fetch struct {
	done chan struct{}
	// err may be read after done is closed.
	err      error
	received progressCounter
}

func newFetcher(catalogue *catalogue, slots int) *fetcher {
	return &fetcher{catalogue: catalogue, slots: semaphore.NewWeighted(int64(max(slots, 1))), fetches: map[blobKey]*fetch{}}
}

// layer fetches the layer of a blob if it is not present. It returns the diff ID, and acquires a reference on the layer.
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
		// The fetch of another pull may have failed because of its credentials. Retry once with those of this pull.
		if current.err != nil && tries > 0 {
			return "", current.err
		}
	}
}

// join acquires a reference on the layer of a blob if it is present. Otherwise it returns the fetch in progress. isOurs
// reports whether the fetch is new, so that the caller must run it.
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

// run runs a fetch, and wakes the callers that wait for it.
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

// fetchInSlot fetches a layer when a slot is free.
func (f *fetcher) fetchInSlot(ctx context.Context, current *fetch, blob image.LayerBlob, from origin) (Layer, error) {
	if err := f.slots.Acquire(ctx, 1); err != nil {
		return Layer{}, err
	}
	defer f.slots.Release(1)
	return from.fetch(ctx, blob, &current.received)
}

// received returns the number of bytes received of a blob whose fetch is in progress. Otherwise it returns 0.
func (f *fetcher) received(blob image.LayerBlob) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if current, ok := f.fetches[keyOf(blob)]; ok {
		return current.received.load()
	}
	return 0
}
