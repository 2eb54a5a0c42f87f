package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/dustin/go-humanize"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

const (
	// reserveFor is how long a pull reserves what it will take, however slow it is. The time in which none of its layers has a slot does
	// not count.
	reserveFor = 2 * time.Minute
	// reserveAhead is the time for which a pull then reserves what it will write, at the speed that it has had in its slots.
	reserveAhead = time.Hour
	// maxRoomTries is the number of times that a layer is fetched again after it ran out of disk space.
	maxRoomTries = 2
	// usualRatio is the ratio of the sizes of most layers, unpacked and compressed, and of what else is needed to unpack them.
	usualRatio = 4
	// mostRatio is what is made room for at most when that was not enough. A small blob may unpack to more than the disk has.
	mostRatio = 16
	// usualFileSize is the size of the files of most layers in bytes.
	usualFileSize = 16 << 10
	// trashWait is the maximum time that a pull waits until what was discarded is deleted.
	trashWait = time.Minute
)

// reserve reserves the disk space that a pull takes at least, and removes unused layers if there is not enough. What is reserved
// counts as taken for other pulls until it is written, or the pull ends. reserve returns ErrResourceExhausted, and removes
// nothing, if the missing layers cannot fit.
func (p *puller) reserve(ctx context.Context, current *pull) error {
	if err := p.checkSizes(current); err != nil {
		return err
	}
	missing, err := p.tryReserve(current)
	if missing > 0 && err == nil {
		p.collector.awaitTrash(ctx)
		missing, err = p.tryReserve(current)
	}
	if missing <= 0 || err != nil {
		return err
	}
	klog.FromContext(ctx).Info("Removing unused layers for a pull", keyRequired, missing)
	if err := p.collector.makeRoom(ctx, missing); err != nil {
		klog.FromContext(ctx).Error(err, "Could not remove unused layers for a pull")
	}
	if missing, err = p.tryReserve(current); missing <= 0 || err != nil {
		return err
	}
	return fmt.Errorf("%w: the image has %s to download and unpack at least, of which %s do not fit on the disk of %s: "+
		"%d %% of it must stay free, other pulls have their part, and no more unused layers can be removed; "+
		"free disk space or lower --min-free-disk-percent", errdefs.ErrResourceExhausted,
		humanize.IBytes(uint64(p.outstanding(current))), humanize.IBytes(uint64(missing)), p.catalogue.path, p.minFreePercent)
}

// checkSizes returns ErrResourceExhausted if the missing blobs would not fit on an empty disk, or if one is larger than a layer
// may be. The sizes are from an untrusted source: after checkSizes, the sum of all sizes does not overflow.
func (p *puller) checkSizes(current *pull) error {
	usage, err := linux.FileSystemUsage(p.catalogue.root)
	if err != nil {
		return err
	}
	left := usage.Bytes.Total - usage.Bytes.Total/100*int64(p.minFreePercent)
	seen := map[blobKey]bool{}
	for _, blob := range current.blobs {
		size := blob.Descriptor.Size
		// The layer of a blob that is present may be removed before the pull needs it, so that its size counts too if it is too large.
		isMissing := !seen[keyOf(blob)] && !p.catalogue.has(blob, current.mayUse)
		if size > usage.Bytes.Total || (isMissing && size > left) {
			return fmt.Errorf("%w: the image has more to download than can ever fit on the disk of %s, which has %s; "+
				"layer %s of %d bytes does not fit",
				errdefs.ErrResourceExhausted, p.catalogue.path, humanize.IBytes(uint64(usage.Bytes.Total)), blob.Descriptor.Digest, size)
		}
		if !isMissing {
			continue
		}
		if p.maxLayerBytes > 0 && size > p.maxLayerBytes {
			return fmt.Errorf("%w: layer %s has %d bytes to download, and a layer may have %d; raise --max-layer-size",
				errdefs.ErrResourceExhausted, blob.Descriptor.Digest, size, p.maxLayerBytes)
		}
		seen[keyOf(blob)] = true
		left -= size
	}
	return nil
}

// tryReserve reserves the disk space for a pull. It returns the number of bytes that are missing, and reserves nothing if there
// are any.
func (p *puller) tryReserve(current *pull) (missing int64, _ error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	own := p.outstandingLocked([]*pull{current})
	all, fast := []*pull{current}, []*pull{current}
	var ofSlow int64
	for _, other := range p.pulls {
		if other.reserved == nil || other == current {
			continue
		}
		all = append(all, other)
		left := p.outstandingLocked([]*pull{other})
		if ahead := other.reserved.ahead(left, other.inSlot.elapsed()); ahead < left {
			ofSlow += ahead
			continue
		}
		fast = append(fast, other)
	}
	// What a slow pull keeps may be of layers that others want too. Together they write no more than all of them have left.
	outstanding := min(p.outstandingLocked(all), p.outstandingLocked(fast)+ofSlow)
	// The usage is read last: what the other pulls write before that counts twice, and not as free.
	usage, err := linux.FileSystemUsage(p.catalogue.root)
	if err != nil {
		return 0, err
	}
	available := usage.Bytes.Available - usage.Bytes.Total/100*int64(p.minFreePercent)
	if missing := outstanding - available; missing > 0 && own > 0 {
		return missing, nil
	}
	current.reserved = &reservation{own}
	return 0, nil
}

// reservation is the disk space that a pull reserves before its layers have slots.
type reservation struct{ bytes int64 }

// ahead returns how many of the bytes that a pull has left it may keep from others: all of them if it waits for a slot or has just begun,
// and then what it will write in the next hour. A registry that declares much and sends little keeps little.
func (r *reservation) ahead(left int64, inSlot time.Duration) int64 {
	if inSlot < reserveFor {
		return left
	}
	return min(left, int64(float64(max(r.bytes-left, 0))/inSlot.Seconds()*reserveAhead.Seconds()))
}

func (p *puller) outstanding(current *pull) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.outstandingLocked([]*pull{current})
}

// outstandingLocked returns the number of bytes that pulls will still write at least: their missing layers, which are hardly
// ever smaller than their blobs, and the blobs of as many layers as are fetched at the same time, which go when these are unpacked.
func (p *puller) outstandingLocked(pulls []*pull) int64 {
	var total int64
	var downloads []int64
	seen := map[fetchKey]bool{}
	for _, current := range pulls {
		for _, blob := range current.blobs {
			key := fetchKeyOf(blob, current.from)
			if seen[key.shared()] || p.catalogue.has(blob, current.mayUse) {
				continue
			}
			seen[key.shared()] = true
			size := blob.Descriptor.Size
			received, unpacked := p.fetcher.progress(blob, current.from)
			// A layer of others is only read and verified.
			if !p.catalogue.has(blob, anyLayer) {
				total += max(size-unpacked, 0)
			}
			if current.from.host != "" {
				downloads = append(downloads, max(size-max(received, current.onDisk[key]), 0))
			}
		}
	}
	slices.SortFunc(downloads, func(a, b int64) int { return cmp.Compare(b, a) })
	for _, download := range downloads[:min(len(downloads), max(p.parallel, 1))] {
		total += download
	}
	return total
}

// hold protects the work directories of the layers of a pull, with what is downloaded of them, until release is called.
func (p *puller) hold(current *pull, blobs []image.LayerBlob) (release func()) {
	onDisk := map[fetchKey]int64{}
	var names []string
	for _, blob := range blobs {
		key := fetchKeyOf(blob, current.from)
		shared := key.shared()
		for _, name := range []string{key.workDirName(), shared.workDirName()} {
			names = append(names, name)
			onDisk[key] = max(onDisk[key], p.collector.workDirs.downloaded(name))
		}
	}
	p.collector.workDirs.hold(names)
	p.mu.Lock()
	defer p.mu.Unlock()
	current.blobs, current.onDisk = blobs, onDisk
	return func() { p.collector.workDirs.unhold(names) }
}

// isNoRoom reports whether the reason for an error is a lack of disk space, which the removal of layers may mend.
func isNoRoom(err error) bool { return isDiskFull(err) || errors.Is(err, unpack.ErrNoFreeSpace) }

// fetchWithRoom fetches a layer. If the disk is full amid that, it removes unused layers and fetches the layer again: how large a
// layer is, is known only when it is unpacked.
func (f *fetcher) fetchWithRoom(current *fetch, key fetchKey, blob image.LayerBlob, from origin) (layer Layer, err error) {
	ctx := klog.NewContext(current.ctx, klog.FromContext(current.ctx).WithValues(keyLayer, blob.Descriptor.Digest))
	err = f.collector.withRoom(ctx, blob.Descriptor.Size, func() (err error) {
		layer, err = f.fetchInSlot(current, key, blob, from)
		return err
	})
	return layer, err
}

// withRoom calls do, which writes to the disk what size bytes decompress to. If the disk is full amid that, it removes unused layers and
// calls do again.
func (c *collector) withRoom(ctx context.Context, size int64, do func() error) error {
	for tries := 0; ; tries++ {
		err := do()
		if !isNoRoom(err) || tries == maxRoomTries {
			return err
		}
		ratio := int64(usualRatio)
		if tries > 0 {
			ratio = mostRatio
		}
		request, failed := c.requestFor(min(max(size, 1), math.MaxInt64/ratio) * ratio)
		if failed != nil {
			return errors.Join(err, failed)
		}
		klog.FromContext(ctx).Info("Removing unused layers for what is unpacked", keyReason, err.Error())
		collected, failed := c.collect(ctx, request)
		if failed != nil || collected.Bytes+collected.Downloads+collected.Caches == 0 {
			return errors.Join(err, failed)
		}
		c.awaitTrash(ctx)
	}
}

// requestFor returns the request to make room for a tar of size bytes, or for as many files as it usually has if the disk is shorter of
// inodes.
func (c *collector) requestFor(size int64) (GCRequest, error) {
	usage, err := linux.FileSystemUsage(c.catalogue.root)
	free := func(space linux.Space) float64 { return float64(space.Available) / float64(max(space.Total, 1)) }
	// Some file systems have no limit of inodes: both numbers are 0.
	if usage.Inodes.Total > 0 && free(usage.Inodes) < free(usage.Bytes) {
		return GCRequest{Inodes: size/usualFileSize + 1}, err
	}
	return GCRequest{Bytes: size}, err
}

// makeRoom removes abandoned downloads and unused layers of the given size, and waits until they are deleted. It removes nothing if
// all of them together are smaller.
func (c *collector) makeRoom(ctx context.Context, bytes int64) error {
	collectable, err := c.collect(ctx, GCRequest{DryRun: true, Bytes: bytes})
	if err != nil || collectable.Bytes+collectable.Downloads+collectable.Caches < bytes {
		return err
	}
	if _, err := c.collect(ctx, GCRequest{Bytes: bytes}); err != nil {
		return err
	}
	c.awaitTrash(ctx)
	return nil
}

// awaitTrash waits until what was discarded is deleted, at most for trashWait.
func (c *collector) awaitTrash(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, trashWait)
	defer cancel()
	if err := c.trash.AwaitDeleted(ctx); err != nil {
		klog.FromContext(ctx).Info("The trash is not deleted yet", keyReason, err.Error())
	}
}
