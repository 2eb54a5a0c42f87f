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

	"github.com/overlay-csi/overlay-csi/pkg/linux/sandbox"
)

// version is set by the linker (see Makefile).
var version = "development"

func main() {
	if len(os.Args) > 1 && os.Args[1] == sandboxCommand {
		os.Exit(sandbox.Main(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "controller" {
		opts, err := parseControllerFlags(os.Args[2:], os.Stderr)
		exitUnlessParsed(err)
		serve(opts.log, "Stopped", func(ctx context.Context) error { return runController(ctx, opts) })
		return
	}
	opts, err := parseFlags(os.Args[1:], os.Stderr)
	exitUnlessParsed(err)
	if opts.printVersion {
		fmt.Println("overlay-csi", version)
		return
	}
	serve(opts.log, "Stopped; mounted views remain", func(ctx context.Context) error { return run(ctx, opts) })
}

// exitUnlessParsed ends the process if the command line was not parsed, or asked for help.
func exitUnlessParsed(err error) {
	switch {
	case errors.Is(err, pflag.ErrHelp):
		os.Exit(0)
	case err != nil:
		fmt.Fprintln(os.Stderr, "overlay-csi:", err)
		os.Exit(2)
	}
}

// serve runs until the process is asked to end.
func serve(log logOptions, stopped string, run func(ctx context.Context) error) {
	logger := newLogger(log)
	ctx, stop := signal.NotifyContext(klog.NewContext(context.Background(), logger), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		logger.Error(err, "Driver failed")
		klog.Flush()
		os.Exit(1)
	}
	logger.Info(stopped)
	klog.Flush()
}
