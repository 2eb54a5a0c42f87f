package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// manyViews mounts many views, and as many bind mounts for comparison.
func manyViews(ctx context.Context, b *bench, o options) error {
	fmt.Printf("\n## %d views\n\n%s", o.views, seriesHead)
	columns, err := b.fill(ctx, o.views, drivertest.Volume{Attributes: attributes("layers", b.layers)}, o.idle)
	if err != nil {
		return err
	}
	bound, err := b.bindMounts(filepath.Join(b.node.Dir, "bound"), o.views)
	if err != nil {
		return err
	}
	printGauges(append(columns, bound...)...)
	return nil
}

// manyLayers mounts views with many layers.
func manyLayers(ctx context.Context, b *bench, o options) error {
	names := make([]string, o.layers)
	for i := range names {
		names[i] = "layer" + strconv.Itoa(i)
		if _, err := b.node.Layer(names[i], map[string]string{names[i]: names[i]}); err != nil {
			return err
		}
	}
	fmt.Printf("\n## %d views with %d layers each\n\n%s", o.layered, o.layers, seriesHead)
	columns, err := b.fill(ctx, o.layered, drivertest.Volume{Attributes: attributes("layers", drivertest.Layers(names...))}, 0)
	if err != nil {
		return err
	}
	printGauges(columns...)
	return nil
}

// fill publishes one volume for each of n pods, asks for them, starts the driver again and unpublishes them.
func (b *bench) fill(ctx context.Context, n int, volume drivertest.Volume, idle time.Duration) ([]gauges, error) {
	before, err := b.read("before")
	if err != nil {
		return nil, err
	}
	views, err := b.newViews(n, volume)
	if err != nil {
		return nil, err
	}
	if err := b.each(ctx, "NodePublishVolume", views, b.publish); err != nil {
		return nil, err
	}
	full, err := b.read(fmt.Sprintf("%d views", n))
	if err != nil {
		return nil, err
	}
	if err := b.each(ctx, "NodeGetVolumeStats", views, b.stats); err != nil {
		return nil, err
	}
	var capacity series
	for range 10 {
		if err := capacity.time(func() error { return b.capacity(ctx) }); err != nil {
			return nil, err
		}
	}
	capacity.print("GetCapacity, all mounted")
	columns := []gauges{before, full}
	if idle > 0 {
		rested, err := b.rest(ctx, idle)
		if err != nil {
			return nil, err
		}
		columns = append(columns, rested...)
	}
	goroutines, took, err := b.restart(ctx)
	if err != nil {
		return nil, err
	}
	fmt.Printf("| start of the driver, which had %d goroutines | 1 | %s | | | | |\n", goroutines, seconds(took))
	if err := b.each(ctx, "NodeUnpublishVolume", views, b.unpublish); err != nil {
		return nil, err
	}
	if err := errors.Join(b.settle(ctx), discard(views), b.checkEmpty()); err != nil {
		return nil, err
	}
	after, err := b.read("unpublished")
	return append(columns, after), err
}

// rest lets the driver go its own rounds, and returns what it has before and after.
func (b *bench) rest(ctx context.Context, idle time.Duration) ([]gauges, error) {
	before, err := b.read("all asked")
	if err != nil {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(idle):
	}
	after, err := b.read(fmt.Sprintf("%s idle", idle))
	return []gauges{before, after}, err
}

// each does something with each view, one after the other, and prints how long it took.
func (b *bench) each(ctx context.Context, name string, views []view, do func(context.Context, view) error) error {
	var took series
	for _, v := range views {
		if err := took.time(func() error { return do(ctx, v) }); err != nil {
			return err
		}
	}
	took.print(name)
	return nil
}

// bindMounts makes and removes plain bind mounts, as subPath mounts of a container are, and returns what the node has with them.
func (b *bench) bindMounts(dir string, n int) ([]gauges, error) {
	source := filepath.Join(dir, "source")
	if err := os.MkdirAll(source, 0o755); err != nil {
		return nil, err
	}
	before, err := b.readSystem("before binds")
	if err != nil {
		return nil, err
	}
	target := func(i int) string { return filepath.Join(dir, strconv.Itoa(i)) }
	var mounted, unmounted series
	for i := range n {
		if err := os.Mkdir(target(i), 0o755); err != nil {
			return nil, err
		}
		if err := mounted.time(func() error { return unix.Mount(source, target(i), "", unix.MS_BIND, "") }); err != nil {
			return nil, err
		}
	}
	mounted.print("mount --bind")
	full, err := b.readSystem(fmt.Sprintf("%d binds", n))
	if err != nil {
		return nil, err
	}
	for i := range n {
		if err := unmounted.time(func() error { return unix.Unmount(target(i), 0) }); err != nil {
			return nil, err
		}
	}
	unmounted.print("umount of a bind mount")
	after, err := b.readSystem("binds unmounted")
	return []gauges{before, full, after}, err
}
