// Command node fills one node: with views, with layers, with disk images, with pods that start together, and with claims that are
// made and deleted all the time. It prints the tables of docs/performance.md. The numbers are for people, but it fails where the
// driver leaves something behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"time"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// options are the sizes of the scenarios. One of size zero is left out.
type options struct {
	views, layers, layered, images, pods, rate int
	churn, idle                                time.Duration
	reserve                                    bool
}

func main() {
	var o options
	flag.IntVar(&o.views, "views", 5000, "views that are mounted together")
	flag.DurationVar(&o.idle, "idle", time.Minute, "how long the driver is watched with nothing to do but its own rounds")
	flag.IntVar(&o.layers, "layers", 500, "layers of one view")
	flag.IntVar(&o.layered, "layered", 100, "views with so many layers that are mounted together")
	flag.IntVar(&o.images, "images", 2000, "claims with a disk image that are mounted together")
	flag.BoolVar(&o.reserve, "reserve", false, "reserve the disk of these disk images, as without --overcommit; they are sparse otherwise")
	flag.IntVar(&o.pods, "pods", 110, "pods that start at once")
	flag.IntVar(&o.rate, "rate", 30, "claims in a second that are made, published, unpublished and deleted")
	flag.DurationVar(&o.churn, "churn", 3*time.Minute, "how long claims are made and deleted")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	dir, remove, err := drivertest.WorkDir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	binary, err := drivertest.Build(dir)
	if err != nil {
		return err
	}
	follower, stop := follow()
	defer func() { err = errors.Join(err, stop()) }()
	fmt.Printf("%s, %d CPUs\n", runtime.Version(), runtime.NumCPU())
	for _, scenario := range []struct {
		name string
		size int
		args []string
		run  func(context.Context, *bench, options) error
	}{
		{"views", o.views, nil, manyViews},
		{"layers", min(o.layers, o.layered), nil, manyLayers},
		{"images", o.images, imageArgs(o), manyImages},
		{"pods", o.pods, nil, manyPods},
		{"churn", min(o.rate, int(o.churn)), nil, churn},
	} {
		if scenario.size == 0 {
			continue
		}
		b, err := newBench(ctx, follower, dir, scenario.name, binary, scenario.args...)
		if err == nil {
			err = errors.Join(scenario.run(ctx, b, o), b.close())
		}
		if err != nil {
			return fmt.Errorf("%s: %w", scenario.name, err)
		}
	}
	return nil
}

// imageArgs are the driver's flags for many disk images. Two thousand reserved ones take 31 GiB of the disk.
func imageArgs(o options) []string {
	if o.reserve {
		return nil
	}
	return []string{"--overcommit=1000"}
}
