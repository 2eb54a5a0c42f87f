package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// imageBytes is the size of a claim with a disk image.
const imageBytes = 16 << 20

// manyImages makes and publishes many claims with disk images.
func manyImages(ctx context.Context, b *bench, o options) error {
	kind := "sparse"
	if o.reserve {
		kind = "reserved"
	}
	fmt.Printf("\n## %d claims with %s disk images of %d MiB\n\n%s", o.images, kind, imageBytes>>20, seriesHead)
	before, err := b.read("before")
	if err != nil {
		return err
	}
	views, err := b.makeImages(ctx, o.images)
	if err != nil {
		return err
	}
	full, err := b.read(fmt.Sprintf("%d images", o.images))
	if err != nil {
		return err
	}
	if err := b.each(ctx, "NodeGetVolumeStats", views, b.stats); err != nil {
		return err
	}
	// Again, on the image that is there: it is looked for among the loop devices.
	var again, unpublished series
	for _, v := range views[:min(edge, len(views))] {
		err := unpublished.time(func() error { return b.unpublish(ctx, v) })
		if err == nil {
			err = again.time(func() error { return b.publish(ctx, v) })
		}
		if err != nil {
			return err
		}
	}
	unpublished.print("NodeUnpublishVolume, the others mounted")
	again.print("NodePublishVolume again, the others mounted")
	goroutines, took, err := b.restart(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("| start of the driver, which had %d goroutines | 1 | %s | | | | |\n", goroutines, seconds(took))
	started, err := b.read("started again")
	if err != nil {
		return err
	}
	if err := b.removeImages(ctx, views); err != nil {
		return err
	}
	after, err := b.read("deleted")
	if err != nil {
		return err
	}
	printGauges(before, full, started, after)
	return nil
}

// makeImages makes claims one after the other, and publishes each.
func (b *bench) makeImages(ctx context.Context, n int) ([]view, error) {
	parameters := attributes("layers", b.layers, "sizeEnforcement", "image")
	var created, published, capacity series
	var views []view
	for i := range n {
		var volume drivertest.Volume
		err := created.time(func() (err error) {
			volume, err = b.claim(ctx, "claim-"+strconv.Itoa(i), imageBytes, parameters)
			return err
		})
		if err != nil {
			return nil, err
		}
		v, err := b.newView(volume)
		if err != nil {
			return nil, err
		}
		if err := published.time(func() error { return b.publish(ctx, v) }); err != nil {
			return nil, err
		}
		if err := capacity.time(func() error { return b.capacity(ctx) }); err != nil {
			return nil, err
		}
		views = append(views, v)
	}
	created.print("CreateVolume")
	published.print("NodePublishVolume, which makes the image")
	capacity.print("GetCapacity")
	return views, nil
}

// removeImages unpublishes and deletes the claims.
func (b *bench) removeImages(ctx context.Context, views []view) error {
	if err := b.each(ctx, "NodeUnpublishVolume", views, b.unpublish); err != nil {
		return err
	}
	err := b.each(ctx, "DeleteVolume", views, func(ctx context.Context, v view) error { return b.delete(ctx, v.volume) })
	if err != nil {
		return err
	}
	return errors.Join(b.settle(ctx), discard(views), b.checkEmpty())
}
