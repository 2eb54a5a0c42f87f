package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// version is set by the linker (see Makefile).
var version = "development"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := newCommand(connect).ExecuteContext(ctx); err != nil {
		// What overlayctl printed says the rest.
		if !errors.Is(err, errRemote) {
			fmt.Fprintln(os.Stderr, "kubectl overlay:", err)
		}
		os.Exit(1)
	}
}

// options are the flags that all commands have.
type options struct {
	kubeconfig string
	overrides  clientcmd.ConfigOverrides
	driver     driverOptions
}

// cluster is what the commands need of a cluster.
type cluster struct {
	finder
	// config is how it is reached.
	config *rest.Config
}

// connect connects to the cluster of the user's configuration.
func connect(opts *options) (*cluster, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = opts.kubeconfig
	loaded := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &opts.overrides)
	config, err := loaded.ClientConfig()
	if err != nil {
		return nil, err
	}
	namespace, _, err := loaded.Namespace()
	if err != nil {
		return nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	return &cluster{finder{client, namespace, opts.driver}, config}, nil
}

func newCommand(connect func(*options) (*cluster, error)) *cobra.Command {
	opts := &options{}
	root := &cobra.Command{
		Use:   "kubectl-overlay",
		Short: "Look at what pods wrote to overlay volumes, and keep it",
		Long: `Look at what pods wrote to volumes of the overlay-csi driver, and keep it.

A volume is named by the pod that has it and its name in the pod, or by its claim:

  kubectl overlay diff POD VOLUME
  kubectl overlay diff pvc/NAME

The commands run overlayctl in the driver's pod on the node of the volume, and need
the right to do so: create on pods/exec in the namespace of the driver.`,
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl overlay"},
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&opts.kubeconfig, "kubeconfig", "", "the kubeconfig `file` (default as kubectl)")
	clientcmd.BindOverrideFlags(&opts.overrides, flags, clientcmd.RecommendedConfigOverrideFlags(""))
	flags.StringVar(&opts.driver.namespace, "driver-namespace", "overlay-csi", "the `namespace` of the driver's pods")
	flags.StringVar(&opts.driver.selector, "driver-selector", "app.kubernetes.io/name=overlay-csi", "the `labels` of the driver's pods")
	flags.StringVar(&opts.driver.name, "driver-name", "overlay-csi.github.io", "the `name` of the driver")
	root.AddCommand(lsCommand(opts, connect), inspectCommand(opts, connect), diffCommand(opts, connect), commitCommand(opts, connect))
	return root
}
