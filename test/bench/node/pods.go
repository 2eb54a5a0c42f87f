package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/overlay-csi/overlay-csi/test/bench/durations"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// manyPods starts and ends pods at once, as after a reboot of a full node.
func manyPods(ctx context.Context, b *bench, o options) error {
	fmt.Printf("\n## %d pods at once\n\n", o.pods)
	fmt.Println("| what | all | p50 | p99 |\n| --- | ---: | ---: | ---: |")
	for _, kind := range []struct {
		name   string
		volume drivertest.Volume
	}{
		{"plain", drivertest.Volume{Attributes: attributes("layers", b.layers)}},
		{"with `medium: memory`", drivertest.Volume{Attributes: attributes("layers", b.layers, "sizeLimit", "16Mi", "medium", "memory")}},
		{"with a disk image", drivertest.Volume{
			Attributes: attributes("layers", b.layers, "sizeLimit", "16Mi", "sizeEnforcement", "image"),
		}},
	} {
		views, err := b.newViews(o.pods, kind.volume)
		if err != nil {
			return err
		}
		if err := atOnce(ctx, "NodePublishVolume, "+kind.name, views, b.publish); err != nil {
			return err
		}
		if err := atOnce(ctx, "NodeUnpublishVolume, "+kind.name, views, b.unpublish); err != nil {
			return err
		}
		if err := errors.Join(b.settle(ctx), discard(views)); err != nil {
			return err
		}
	}
	return b.checkEmpty()
}

// atOnce does something with all views at the same time, and prints how long it took.
func atOnce(ctx context.Context, name string, views []view, do func(context.Context, view) error) error {
	took, failed := make(series, len(views)), make([]error, len(views))
	var group sync.WaitGroup
	begin := time.Now()
	for i, v := range views {
		group.Go(func() {
			failed[i] = do(ctx, v)
			took[i] = time.Since(begin)
		})
	}
	group.Wait()
	all := time.Since(begin)
	fmt.Printf("| %s | %s | %s | %s |\n", name, durations.Milliseconds(all),
		durations.Milliseconds(durations.Quantile(took, 50)), durations.Milliseconds(durations.Quantile(took, 99)))
	return errors.Join(failed...)
}
