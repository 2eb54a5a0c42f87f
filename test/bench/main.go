// Command bench compares the driver, over its socket, with the raw system calls that a view cannot do without, in the
// same run and interleaved, and prints the table of docs/performance.md. It judges nothing: numbers are for people.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

func main() {
	var opts options
	flag.IntVar(&opts.rounds, "rounds", 2000, "publishes and unpublishes that are timed one by one")
	flag.IntVar(&opts.views, "views", 5000, "views that are mounted for the measurements on a full node")
	flag.IntVar(&opts.parallel, "parallel", 32, "publishers at once")
	flag.BoolVar(&opts.throughput, "throughput", false, "measure only the publishers at once")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, opts); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	rounds, views, parallel int
	throughput              bool
}

func run(ctx context.Context, opts options) (err error) {
	dir, remove, err := drivertest.WorkDir()
	if err != nil {
		return err
	}
	defer func() {
		if removeErr := remove(); err == nil {
			err = removeErr
		}
	}()
	binary, err := drivertest.Build(dir)
	if err != nil {
		return err
	}
	node, err := drivertest.NewNode(dir, binary)
	if err != nil {
		return err
	}
	if err := node.Start(ctx); err != nil {
		return err
	}
	defer node.Stop()
	b, err := newBench(node, opts)
	if err != nil {
		return err
	}
	return b.run(ctx)
}
