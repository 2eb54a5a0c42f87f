package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// fetcher fetches single layers. Concurrent pulls share the fetch of a layer if it is the same for all of them.
type fetcher struct {
	catalogue *catalogue
	collector *collector
	slots     *slots
	observer  Observer

	mu sync.Mutex
	// fetches are the fetches in progress. mu is locked before the lock of the catalogue.
	fetches map[fetchKey]*fetch
}

// source identifies where an origin gets its blobs from.
type source struct {
	// host is the registry in the name of the image. It is empty for an archive.
	host string
	// repository is the path of the image in the registry, or identifies the archive.
	repository string
	// credentials is the ID of the credentials.
	credentials string
}

// fetchKey identifies a fetch. Pulls share only a fetch that is the same for each of them: a registry that sends slowly must not
// make the pulls from others wait, and an image that describes a blob wrongly must not make those of others fail.
type fetchKey struct {
	blob   blobKey
	size   int64
	diffID digest.Digest
	from   source
}

func fetchKeyOf(blob image.LayerBlob, from source) fetchKey {
	return fetchKey{keyOf(blob), blob.Descriptor.Size, blob.DiffID, from}
}

// shared returns the key of the fetch that all repositories of the registry share.
func (k fetchKey) shared() fetchKey {
	k.from.repository = ""
	return k
}

// workDirName returns the name of the work directory for a fetch. A later fetch with the same key resumes its download.
func (k fetchKey) workDirName() string {
	return k.blob.digest.Encoded() + "-" + digest.FromString(fmt.Sprintf("%#v", k)).Encoded()[:16]
}

// fetch is the fetch of a layer in progress.
type fetch struct {
	// ctx is done when the pull has ended that runs the fetch, or when another fetch has added the layer.
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
	blob   image.LayerBlob
	from   origin
	// err and canceled may be read after done is closed. canceled reports whether the pull has ended before the fetch.
	err      error
	canceled bool
	received progressCounter

	// The lock of the fetcher guards these. clocks are those of the pulls that need the fetch. They run while it has a slot.
	clocks   []*slotClock
	isInSlot bool
}

func newFetcher(collector *collector, slots int, observer Observer) *fetcher {
	return &fetcher{
		catalogue: collector.catalogue, collector: collector, slots: newSlots(slots), observer: observer, fetches: map[fetchKey]*fetch{},
	}
}

// layer fetches the layer of a blob if it is not present. It returns the diff ID, and acquires a reference on the layer. clock
// runs while the fetch has a slot.
func (f *fetcher) layer(ctx context.Context, blob image.LayerBlob, from origin, clock *slotClock) (digest.Digest, error) {
	own := fetchKeyOf(blob, from.source())
	key := own.shared()
	for {
		id, current, isOurs := f.join(ctx, key, blob, from, clock)
		if current == nil {
			return id, nil
		}
		if isOurs {
			return f.run(ctx, key, current, blob, from)
		}
		select {
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-current.done:
		}
		switch {
		case current.err == nil, current.canceled:
			// The layer is present, or its download is to be resumed.
		case key == own:
			return "", current.err
		default:
			// Another repository may not have the blob, or refuse the credentials.
			key = own
		}
	}
}

// join acquires a reference on the layer of a blob if it is present. Otherwise it returns the fetch in progress. isOurs
// reports whether the fetch is new, so that the caller must run it.
func (f *fetcher) join(
	ctx context.Context, key fetchKey, blob image.LayerBlob, from origin, clock *slotClock,
) (id digest.Digest, current *fetch, isOurs bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if id, err := f.catalogue.acquireBlob(blob, from.mayUse); err == nil {
		return id, nil, false
	}
	if current, ok := f.fetches[key]; ok {
		current.clocks = append(current.clocks, clock)
		if current.isInSlot {
			clock.start()
		}
		return "", current, false
	}
	current = &fetch{done: make(chan struct{}), blob: blob, from: from, clocks: []*slotClock{clock}}
	current.ctx, current.cancel = context.WithCancel(ctx)
	f.fetches[key] = current
	return "", current, true
}

// run runs a fetch, and wakes the callers that wait for it. If another fetch adds the layer first, that is the result.
func (f *fetcher) run(ctx context.Context, key fetchKey, current *fetch, blob image.LayerBlob, from origin) (digest.Digest, error) {
	defer current.cancel()
	layer, err := f.fetchWithRoom(current, key, blob, from)
	id := layer.DiffID
	if err != nil {
		if present, missing := f.catalogue.acquireBlob(blob, from.mayUse); missing == nil {
			id, err = present, nil
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.fetches, key)
	if err == nil {
		f.cancelOthersLocked(key.blob)
	}
	current.err, current.canceled = err, ctx.Err() != nil
	close(current.done)
	return id, err
}

// cancelOthersLocked cancels the fetches of a blob whose layer is present now, and may be used without them.
func (f *fetcher) cancelOthersLocked(blob blobKey) {
	for key, other := range f.fetches {
		if key.blob == blob && f.catalogue.has(other.blob, other.from.mayUse) {
			other.cancel()
		}
	}
}

// fetchInSlot fetches a layer when a slot is free. A fetch that loses its slot waits for another one and goes on.
func (f *fetcher) fetchInSlot(current *fetch, key fetchKey, blob image.LayerBlob, from origin) (Layer, error) {
	if _, ok := from.(*attributesOrigin); ok {
		// It is not downloaded, and takes turns of its own (attributesOrigin.write).
		return from.fetch(current.ctx, blob, key.workDirName(), &current.received)
	}
	for turn := slotTurn; ; {
		layer, err := f.fetchUntilLost(current, key, blob, from, turn)
		if !errors.Is(err, errSlotLost) {
			return layer, err
		}
		if current.received.IgnoresRanges.Load() {
			// In another turn of the same length the registry would only send the same bytes again.
			turn = min(2*turn, maxSlotTurn)
		}
	}
}

// fetchUntilLost fetches a layer when a slot is free. It returns errSlotLost if another fetch gets the slot after turn.
func (f *fetcher) fetchUntilLost(
	current *fetch, key fetchKey, blob image.LayerBlob, from origin, turn time.Duration,
) (Layer, error) {
	ctx, cancel := context.WithCancelCause(current.ctx)
	defer cancel(nil)
	var lose func()
	// The unpacking of an archive would begin again.
	if key.from.host != "" {
		lose = func() { cancel(errSlotLost) }
	}
	remaining := func() int64 { return blob.Descriptor.Size - current.received.load() }
	slot, err := f.slots.acquire(ctx, key.from.host, turn, remaining, lose)
	if err != nil {
		return Layer{}, err
	}
	defer slot.release()
	defer f.runClocks(current)()
	before := current.received.load()
	layer, err := from.fetch(ctx, blob, key.workDirName(), &current.received)
	f.observer.LayerFetched(max(current.received.load()-before, 0), current.received.unpacked.Load())
	if err != nil && errors.Is(context.Cause(ctx), errSlotLost) {
		err = errSlotLost
	}
	return layer, err
}

// runClocks runs the clocks of the pulls that need a fetch, until stop is called.
func (f *fetcher) runClocks(current *fetch) (stop func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	current.isInSlot = true
	for _, clock := range current.clocks {
		clock.start()
	}
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		current.isInSlot = false
		for _, clock := range current.clocks {
			clock.stop()
		}
	}
}

// progress returns the number of bytes that are received of a blob from a source, and that are unpacked. Both are 0 if no fetch of
// it is in progress.
func (f *fetcher) progress(blob image.LayerBlob, from source) (received, unpacked int64) {
	key := fetchKeyOf(blob, from)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, key := range []fetchKey{key, key.shared()} {
		if current, ok := f.fetches[key]; ok {
			return current.received.load(), current.received.unpacked.Load()
		}
	}
	return 0, 0
}
