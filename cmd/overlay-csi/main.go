package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"
)

// version is set by the linker (see Makefile).
var version = "development"

func main() {
	opts, err := parseFlags(os.Args[1:], os.Stderr)
	if errors.Is(err, pflag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "overlay-csi:", err)
		os.Exit(2)
	}
	if opts.printVersion {
		fmt.Println("overlay-csi", version)
		return
	}
	logger := newLogger(opts)
	ctx, stop := signal.NotifyContext(klog.NewContext(context.Background(), logger), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, opts); err != nil {
		logger.Error(err, "Driver failed")
		klog.Flush()
		os.Exit(1)
	}
	logger.Info("Stopped; mounted views remain")
	klog.Flush()
}
