package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// puller brings images to the node. Its pulls outlive the requests that began them.
type puller struct {
	catalogue *catalogue
	fetcher   *fetcher
	collector *collector
	// parallel is how many layers of one image are in progress at once.
	parallel       int
	minFreePercent int

	// ctx ends the pulls, and work waits for them.
	ctx  context.Context
	work *sync.WaitGroup

	mu sync.Mutex
	// pulls are those in progress. The lock is taken before the catalogue's.
	pulls map[pullKey]*pull
}

// pullKey identifies a pull. Volumes with other credentials do not share one.
type pullKey struct {
	image       digest.Digest
	repository  string
	credentials string
}

// pull is an image in progress.
type pull struct {
	name  string
	began time.Time
	done  chan struct{}

	// The puller's lock guards these.
	waiters int
	blobs   []image.LayerBlob
	ended   bool

	// held are references on layers, until the pull has ended and everybody who waited has their own.
	heldMu sync.Mutex
	held   []digest.Digest

	// These may be read when done is closed.
	image *Image
	err   error
}

// acquire returns an image with references on its layers held: from the catalogue with present or, if that returns an
// error, by a pull from an origin. It closes the origin. If ctx ends before the pull does, acquire returns Unavailable.
func (p *puller) acquire(ctx context.Context, key pullKey, name string, present func() (*Image, error), from origin) (*Image, error) {
	image, current, isNew := p.join(key, name, present)
	if isNew {
		p.work.Go(func() { p.run(key, current, from) })
	} else if err := from.close(); err != nil {
		klog.FromContext(ctx).Error(err, "Could not close an image that is not pulled", keyImage, name)
	}
	if current == nil {
		return image, nil
	}
	return p.wait(ctx, current)
}

// join returns a present image, or else a pull: one in progress or, with isNew, one that the caller runs.
func (p *puller) join(key pullKey, name string, present func() (*Image, error)) (_ *Image, current *pull, isNew bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if image, err := present(); err == nil {
		return image, nil, false
	}
	if current := p.pulls[key]; current != nil {
		current.waiters++
		return nil, current, false
	}
	current = &pull{name: name, began: time.Now(), done: make(chan struct{}), waiters: 1}
	p.pulls[key] = current
	return nil, current, true
}

// answerBefore is how long before its deadline a request is answered, so that the caller learns what it waits for.
const answerBefore = 2 * time.Second

// wait waits for a pull that was joined, and returns its image with references on its layers held.
func (p *puller) wait(ctx context.Context, current *pull) (*Image, error) {
	defer p.leave(current)
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, left-min(answerBefore, left/4))
		defer cancel()
	}
	select {
	case <-current.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: image %s is still being pulled (%s); the pull goes on", errdefs.ErrUnavailable, current.name, p.progress(current))
	}
	if current.err != nil {
		return nil, current.err
	}
	if err := p.catalogue.acquire(current.image.diffIDs()); err != nil {
		return nil, fmt.Errorf("%w: image %s was removed again; retry", errdefs.ErrUnavailable, current.name)
	}
	return current.image, nil
}

// leave ends a wait.
func (p *puller) leave(current *pull) {
	p.mu.Lock()
	current.waiters--
	isLast := current.ended && current.waiters == 0
	p.mu.Unlock()
	if isLast {
		p.catalogue.unref(current.held)
	}
}

// end ends a pull.
func (p *puller) end(key pullKey, current *pull, image *Image, err error) {
	p.mu.Lock()
	delete(p.pulls, key)
	current.image, current.err, current.ended = image, err, true
	close(current.done)
	isLast := current.waiters == 0
	p.mu.Unlock()
	if isLast {
		p.catalogue.unref(current.held)
	}
}

// run is the goroutine of a pull.
func (p *puller) run(key pullKey, current *pull, from origin) {
	logger := klog.FromContext(p.ctx).WithValues(keyImage, current.name)
	logger.Info("Pulling image")
	stopLogging := p.logProgress(logger, current)
	image, err := p.pull(klog.NewContext(p.ctx, logger), current, from)
	stopLogging()
	err = errors.Join(err, from.close())
	duration := time.Since(current.began).Round(time.Millisecond).String()
	if err != nil {
		logger.Error(err, "Could not pull image", keyDuration, duration)
	} else {
		logger.Info("Image pulled", keyDigest, image.Digest, keyLayers, len(image.Layers), keyDuration, duration)
	}
	p.end(key, current, image, err)
}

// pull brings all layers of an image to the node, and saves the image.
func (p *puller) pull(ctx context.Context, current *pull, from origin) (*Image, error) {
	img, blobs, err := from.describe(ctx)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	current.blobs = blobs
	p.mu.Unlock()
	if err := p.makeRoom(ctx, blobs); err != nil {
		return nil, err
	}
	img.Layers = make([]ImageLayer, len(blobs))
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(max(p.parallel, 1))
	for i, blob := range blobs {
		group.Go(func() error {
			id, err := p.fetcher.layer(groupCtx, blob, from)
			if err != nil {
				return err
			}
			current.hold(id)
			descriptor := blob.Descriptor
			img.Layers[i] = ImageLayer{DiffID: id, Digest: descriptor.Digest, MediaType: descriptor.MediaType, Size: descriptor.Size, FileName: blob.FileName}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if img.Digest == "" {
		// The tar of a root file system: it is its layer.
		img.Digest = img.Layers[0].DiffID
	}
	return p.catalogue.saveImage(img)
}

// hold takes over a reference on a layer.
func (p *pull) hold(id digest.Digest) {
	p.heldMu.Lock()
	defer p.heldMu.Unlock()
	p.held = append(p.held, id)
}

// makeRoom runs garbage collection if the blobs that are still to come do not fit, and refuses those that cannot.
func (p *puller) makeRoom(ctx context.Context, blobs []image.LayerBlob) error {
	var required int64
	for _, blob := range blobs {
		if !p.catalogue.has(blob) {
			required += blob.Descriptor.Size
		}
	}
	if required == 0 {
		return nil
	}
	available, err := p.available()
	if err != nil || required <= available {
		return err
	}
	klog.FromContext(ctx).Info("Removing unused layers for a pull", keyRequired, required, keyAvailable, available)
	if _, err := p.collector.collect(ctx, GCRequest{Bytes: required - available}); err != nil {
		klog.FromContext(ctx).Error(err, "Could not remove unused layers for a pull")
	}
	if available, err = p.available(); err != nil || required <= available {
		return err
	}
	return fmt.Errorf("%w: the layers have %s to download, and %s has %s available for pulls (%d %% stay free for the volumes, --min-free-disk-percent)",
		errdefs.ErrResourceExhausted, humanize.IBytes(uint64(required)), p.catalogue.path, humanize.IBytes(uint64(max(available, 0))), p.minFreePercent)
}

// available returns how much of the disk pulls may take.
func (p *puller) available() (int64, error) {
	usage, err := linux.FileSystemUsage(p.catalogue.root)
	return usage.Bytes.Available - usage.Bytes.Total*int64(p.minFreePercent)/100, err
}
