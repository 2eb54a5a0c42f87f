package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// abandonAfter is the time after which a pull that nobody waits for ends. kubelet repeats a request within minutes.
const abandonAfter = 10 * time.Minute

// errAbandoned is the cause of the end of a pull that nobody waits for.
var errAbandoned = fmt.Errorf("%w: nobody waits for the pull any more", errdefs.ErrUnavailable)

// puller pulls images. A pull continues after the request that started it has ended, until abandonAfter has passed.
type puller struct {
	catalogue *catalogue
	fetcher   *fetcher
	collector *collector
	builder   *builder
	// composing has the directories of one layer of attributes read at a time: their names take memory. Registries take turns. It is not
	// one of the slots of downloads, which would wait with it.
	composing *slots
	// parallel is the maximum number of layers of one image in progress.
	parallel int
	// abandonAfter is the time after which a pull that nobody waits for ends.
	abandonAfter time.Duration
	// minFreePercent is the percentage of the disk that must stay free.
	minFreePercent int
	// maxLayerBytes is the maximum size of a layer. Zero is no limit.
	maxLayerBytes int64
	observer      Observer

	// ctx cancels the pulls. work waits for them.
	ctx  context.Context
	work *sync.WaitGroup

	mu sync.Mutex
	// pulls are the pulls in progress. mu is locked before the lock of the catalogue.
	pulls map[pullKey]*pull
}

// pullKey identifies a pull. Volumes with different credentials do not share a pull.
type pullKey struct {
	image       digest.Digest
	repository  string
	credentials string
}

// pull is a pull in progress.
type pull struct {
	name string
	from source
	// mayUse says which layers of the node the pull may use.
	mayUse permission
	began  time.Time
	done   chan struct{}

	// ctx is done when the store is closed, or when nobody has waited for the pull for too long.
	ctx    context.Context
	cancel context.CancelCauseFunc

	// The lock of the puller guards waiters, abandon, blobs, onDisk, reserved and ended.
	waiters int
	// abandon ends the pull later. It is nil while a request waits.
	abandon *time.Timer
	blobs   []image.LayerBlob
	// onDisk are the numbers of bytes that earlier pulls have downloaded.
	onDisk map[fetchKey]int64
	// reserved is the disk space that is reserved for the missing layers, nil before it is.
	reserved *reservation
	ended    bool

	// inSlot measures how long the layers of the pull have had slots. Without one it cannot take what it has reserved.
	inSlot slotClock

	heldMu sync.Mutex
	// held are the references of the pull on layers. They are released after all waiters have their own.
	held []digest.Digest

	// image and err may be read after done is closed.
	image *Image
	err   error
}

// acquire acquires references on the layers of an image. It calls present, and pulls the image from an origin if that returns
// an error. It closes the origin. It returns ErrUnavailable if ctx is done before the pull is.
func (p *puller) acquire(ctx context.Context, key pullKey, name string, present func() (*Image, error), from origin) (*Image, error) {
	image, current, isNew := p.join(key, name, from, present)
	p.observer.ImageRequested(current == nil)
	if isNew {
		p.work.Go(func() { p.run(key, current, from) })
	} else if err := from.close(); err != nil {
		klog.FromContext(ctx).Error(err, "Could not close unused image source", keyImage, name)
	}
	if current == nil {
		return image, nil
	}
	return p.wait(ctx, current)
}

// join returns the image if it is present. Otherwise it joins the pull in progress. isNew reports whether the pull is new, so
// that the caller must run it.
func (p *puller) join(key pullKey, name string, from origin, present func() (*Image, error)) (_ *Image, current *pull, isNew bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if image, err := present(); err == nil {
		return image, nil, false
	}
	if current := p.pulls[key]; current != nil {
		current.waiters++
		if current.abandon != nil {
			current.abandon.Stop()
			current.abandon = nil
		}
		return nil, current, false
	}
	current = &pull{
		name: name, from: from.source(), mayUse: from.mayUse, began: time.Now(), done: make(chan struct{}), waiters: 1,
	}
	current.ctx, current.cancel = context.WithCancelCause(p.ctx)
	p.pulls[key] = current
	return nil, current, true
}

// answerBefore is the time between the answer to a request and its deadline. It leaves time for the answer to arrive.
const answerBefore = 2 * time.Second

// wait waits for a joined pull, and acquires references on the layers of its image.
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
		return nil, fmt.Errorf("%w: image %s is still being pulled (%s); retry",
			errdefs.ErrUnavailable, current.name, p.progress(current))
	}
	if current.err != nil {
		return nil, current.err
	}
	if err := p.catalogue.acquire(current.image.diffIDs()); err != nil {
		return nil, fmt.Errorf("%w: image %s was removed after its pull; retry", errdefs.ErrUnavailable, current.name)
	}
	return current.image, nil
}

// leave ends the wait of one request. The last one releases the references of a pull that has ended. Another pull ends later if no
// request comes, and leaves its downloads to be resumed.
func (p *puller) leave(current *pull) {
	p.mu.Lock()
	current.waiters--
	isLast := current.ended && current.waiters == 0
	if current.waiters == 0 && !current.ended {
		current.abandon = time.AfterFunc(p.abandonAfter, func() { p.cancelIfAbandoned(current) })
	}
	p.mu.Unlock()
	if isLast {
		p.catalogue.unref(current.held)
	}
}

// cancelIfAbandoned cancels a pull unless a request has come.
func (p *puller) cancelIfAbandoned(current *pull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if current.waiters == 0 {
		current.cancel(errAbandoned)
	}
}

// end removes a pull from the pulls in progress and wakes its waiters. It releases the references of the pull if nobody waits.
func (p *puller) end(key pullKey, current *pull, image *Image, err error) {
	p.mu.Lock()
	delete(p.pulls, key)
	if current.abandon != nil {
		current.abandon.Stop()
	}
	current.image, current.err, current.ended = image, err, true
	close(current.done)
	isLast := current.waiters == 0
	p.mu.Unlock()
	if isLast {
		p.catalogue.unref(current.held)
	}
}

// run runs a pull and logs its result.
func (p *puller) run(key pullKey, current *pull, from origin) {
	logger := klog.FromContext(p.ctx).WithValues(keyImage, current.name)
	logger.Info("Pulling image")
	stopLogging := p.logProgress(logger, current)
	image, err := p.pull(klog.NewContext(current.ctx, logger), current, from)
	stopLogging()
	if err != nil && errors.Is(context.Cause(current.ctx), errAbandoned) {
		err = errAbandoned
	}
	current.cancel(nil)
	err = errors.Join(err, from.close())
	took := time.Since(current.began)
	p.observer.PullEnded(took, err)
	duration := took.Round(time.Millisecond).String()
	if err != nil {
		logger.Error(err, "Could not pull image", keyDuration, duration)
	} else {
		logger.Info("Image pulled", keyDigest, image.Digest, keyLayers, len(image.Layers), keyDuration, duration)
	}
	p.end(key, current, image, err)
}

// pull adds all layers of an image to the store, and saves the image.
func (p *puller) pull(ctx context.Context, current *pull, from origin) (*Image, error) {
	img, blobs, err := from.describe(ctx)
	if err != nil {
		return nil, err
	}
	defer p.hold(current, blobs)()
	// What is present must not be removed to make room for the rest.
	for _, blob := range blobs {
		if id, err := p.catalogue.acquireBlob(blob, current.mayUse); err == nil {
			current.hold(id)
		}
	}
	if err := p.reserve(ctx, current); err != nil {
		return nil, err
	}
	img.Layers = make([]ImageLayer, len(blobs))
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(max(p.parallel, 1))
	for i, blob := range blobs {
		group.Go(func() error {
			id, err := p.fetcher.layer(groupCtx, blob, from, &current.inSlot)
			if err != nil {
				return err
			}
			current.hold(id)
			descriptor := blob.Descriptor
			img.Layers[i] = ImageLayer{
				DiffID: id, Digest: descriptor.Digest, MediaType: descriptor.MediaType, Size: descriptor.Size, FileName: blob.FileName,
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if img.Digest == "" {
		// The digest of the tar of a root file system is its diff ID.
		img.Digest = img.Layers[0].DiffID
	}
	if err := p.addAttributes(ctx, current, &img, from); err != nil {
		return nil, err
	}
	saved, err := p.catalogue.saveImage(img)
	if err != nil {
		return nil, err
	}
	if err := from.accept(saved); err != nil {
		// The registry will be asked again.
		klog.FromContext(ctx).Error(err, "Could not remember the accepted credentials")
	}
	return saved, nil
}

// hold takes over the caller's reference on a layer.
func (p *pull) hold(id digest.Digest) {
	p.heldMu.Lock()
	defer p.heldMu.Unlock()
	p.held = append(p.held, id)
}
