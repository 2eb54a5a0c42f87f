package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/pflag"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
)

// controllerOptions are the parsed and checked flags of the central controller.
type controllerOptions struct {
	driverName   string
	endpoint     string
	httpEndpoint string
	profiles     bool
	namespace    string
	kubeconfig   string
	gracePeriod  time.Duration
	registry     registry.Config
	log          logOptions
}

// parseControllerFlags parses the command line of the central controller, as parseFlags does that of the driver.
func parseControllerFlags(args []string, output io.Writer) (controllerOptions, error) {
	opts := controllerOptions{}
	flags := pflag.NewFlagSet("overlay-csi controller", pflag.ContinueOnError)
	flags.SetOutput(output)
	flags.SortFlags = false
	flags.Usage = func() {
		fmt.Fprintf(output, "%s\n\nUsage:\n  overlay-csi controller [flags]\n\nFlags:\n%s",
			"overlay-csi controller is the controller plugin of a CSI driver for overlay volumes.", flags.FlagUsagesWrapped(120))
	}
	addDriverName(flags, &opts.driverName)
	flags.StringVar(&opts.endpoint, "endpoint", "unix:///csi/csi.sock", "CSI `socket`, unix:///path")
	flags.StringVar(&opts.namespace, "namespace", "", "`namespace` of the OverlayNodes of the nodes")
	flags.StringVar(&opts.kubeconfig, "kubeconfig", "", "kubeconfig `file` for the API server (default: the pod's ServiceAccount)")
	flags.DurationVar(&opts.gracePeriod, "node-grace-period", time.Hour,
		"how long a Node must have been gone before volumes on it count as deleted when that is asked for")
	addRegistryFlags(flags, &opts.registry)
	addHTTPFlags(flags, ":9809", &opts.httpEndpoint, &opts.profiles)
	addLogFlags(flags, &opts.log)
	if err := flags.Parse(args); err != nil {
		return controllerOptions{}, err
	}
	switch {
	case flags.NArg() > 0:
		return controllerOptions{}, fmt.Errorf("unexpected argument %q; the command takes only flags, see --help", flags.Arg(0))
	case opts.driverName == "":
		return controllerOptions{}, errors.New("--driver-name must not be empty")
	case opts.namespace == "":
		return controllerOptions{}, errors.New("--namespace must not be empty")
	case opts.gracePeriod < 0:
		return controllerOptions{}, fmt.Errorf("--node-grace-period %s: must not be negative", opts.gracePeriod)
	}
	return opts, errors.Join(checkRegistry(opts.registry), opts.log.check())
}
