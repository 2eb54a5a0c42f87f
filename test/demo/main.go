// Command demo plays what happens on a node when pods use overlay volumes: it starts the real driver, speaks CSI to it
// as kubelet does, and shows each step with the directories that the kernel really has. It exits with 1 if any step is
// not as it says.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: demo DRIVER-BINARY")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	out := newPrinter(os.Stdout)
	if err := run(ctx, out, os.Args[1]); err != nil {
		out.failed(err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out *printer, binary string) (err error) {
	dir, remove, err := drivertest.WorkDir()
	if err != nil {
		return err
	}
	defer func() {
		if removeErr := remove(); err == nil {
			err = removeErr
		}
	}()
	node, err := drivertest.NewNode(dir, binary)
	if err != nil {
		return err
	}
	if err := node.Start(ctx); err != nil {
		return err
	}
	defer func() {
		if stopErr := node.Stop(); err == nil {
			err = stopErr
		}
	}()
	out.dir = dir
	s := &story{node: node, out: out}
	for _, chapter := range []func(context.Context) error{
		s.layers, s.publish, s.copyUp, s.whiteout, s.neighbour, s.claim, s.cleanUp,
	} {
		if err := chapter(ctx); err != nil {
			return fmt.Errorf("%w\n\nThe driver's log:\n%s", err, node.Log())
		}
	}
	out.done()
	return nil
}
