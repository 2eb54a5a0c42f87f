package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/store"
)

// options are the flags, read and checked.
type options struct {
	driverName       string
	nodeID           string
	endpoint         string
	httpEndpoint     string
	dataRoot         string
	upperMounts      string
	overcommit       float64
	volumeHealth     bool
	kubeletDir       string
	kubeconfig       string
	register         bool
	registrationPath string
	layerRoots       map[string]layer.Root
	permittedOptions []string
	certsDir         string
	registryConfig   string
	adminSocket      string
	store            store.Config
	podVolumeWait    time.Duration
	reconcile        time.Duration
	withoutFeatures  []string
	logFormat        string
	verbosity        int
	printVersion     bool
}

// parseFlags reads the command line. With --help it writes the help to output and returns pflag.ErrHelp.
func parseFlags(args []string, output io.Writer) (options, error) {
	opts, roots, rootMounts, maxLayerSize := options{}, []string{}, []string{}, ""
	flags := pflag.NewFlagSet("overlay-csi", pflag.ContinueOnError)
	flags.SetOutput(output)
	flags.SortFlags = false
	flags.Usage = func() {
		fmt.Fprintf(output, "overlay-csi: a CSI driver for overlay volumes, the plugin of one node\n\nUsage:\n  overlay-csi [flags]\n\nFlags:\n%s", flags.FlagUsagesWrapped(120))
	}
	flags.StringVar(&opts.driverName, "driver-name", "overlay-csi.github.io", "`name` of the CSI driver, and prefix of its topology key")
	flags.StringVar(&opts.nodeID, "node-id", "", "`name` of this node in the cluster (default: the host name)")
	flags.StringVar(&opts.endpoint, "endpoint", "", "CSI `socket`, unix:///path (default <kubelet-dir>/plugins/<driver-name>/csi.sock)")
	flags.StringVar(&opts.dataRoot, "data-root", "/var/lib/overlay-csi", "`directory` for everything that the driver keeps: ext4, xfs, btrfs or tmpfs")
	flags.StringVar(&opts.upperMounts, "upper-mounts", "", "`directory` in which the file systems of uppers in disk images and in memory are mounted (default <kubelet-dir>/plugins/<driver-name>/uppers)")
	flags.Float64Var(&opts.overcommit, "overcommit", 1, "how many `times` the data root's disk may be promised to volumes with a size")
	flags.BoolVar(&opts.volumeHealth, "volume-health", false, "answer the health RPCs, which are alpha in CSI 1.13: NodeGetVolumeHealth, NodeGetStorageHealth, ControllerGetVolumeHealth, ControllerListVolumeHealth")
	flags.StringVar(&opts.kubeletDir, "kubelet-dir", "/var/lib/kubelet", "kubelet's root `directory`; mounted into the driver at the same path, with mount propagation Bidirectional")
	flags.StringArrayVar(&roots, "layer-root", nil, "`NAME=PATH` of a directory that dir://NAME/... layers and archive://NAME/... archives are taken from; repeatable")
	flags.StringArrayVar(&rootMounts, "layer-root-mounts", nil, "`NAME` of a layer root in which layers may lie on other mounts beneath it; repeatable")
	addStoreFlags(flags, &opts, &maxLayerSize)
	flags.StringSliceVar(&opts.permittedOptions, "permit-mount-option", nil, "mount `options` that volumes may name although they loosen what untrusted layers may do: "+strings.Join(overlay.LooseningOptions(), ", "))
	flags.BoolVar(&opts.register, "register", true, "register with kubelet through <kubelet-dir>/plugins_registry")
	flags.StringVar(&opts.registrationPath, "registration-path", "", "`path` of the CSI socket as kubelet sees it (default: that of --endpoint)")
	flags.StringVar(&opts.kubeconfig, "kubeconfig", "", "`file` for access to the API server, which finds claims that volume:// names (default: the pod's ServiceAccount; outside of a cluster: none)")
	flags.StringVar(&opts.httpEndpoint, "http-endpoint", ":9808", "`address` of /healthz and /readyz; empty: none")
	flags.DurationVar(&opts.podVolumeWait, "pod-volume-wait", 10*time.Second, "how long a publish waits for kubelet to mount a volume that volume:// names")
	flags.DurationVar(&opts.reconcile, "reconcile-interval", time.Minute, "time between two looks for what pods that are gone have left")
	flags.StringSliceVar(&opts.withoutFeatures, "without-kernel-features", nil, "`features` that the kernel is taken to lack ("+strings.Join(overlay.FeatureNames(), ", ")+"), to try the fallbacks")
	flags.StringVar(&opts.logFormat, "log-format", "text", "`format` of the log: text or json")
	flags.IntVarP(&opts.verbosity, "v", "v", 0, "`level` of the log: 4 adds RPCs that only ask, 6 the requests without their secrets")
	flags.BoolVar(&opts.printVersion, "version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		return options{}, err
	}
	if flags.NArg() > 0 {
		return options{}, fmt.Errorf("unexpected argument %q: there are only flags, see --help", flags.Arg(0))
	}
	var err error
	if opts.layerRoots, err = parseLayerRoots(roots, rootMounts); err != nil {
		return options{}, err
	}
	if opts.store.Limits.LayerBytes, err = parseSize(maxLayerSize); err != nil {
		return options{}, fmt.Errorf("--max-layer-size %q: %w", maxLayerSize, err)
	}
	return opts, opts.complete()
}

// addStoreFlags adds the flags of the layer store.
func addStoreFlags(flags *pflag.FlagSet, opts *options, maxLayerSize *string) {
	config := &opts.store
	flags.StringVar(&opts.certsDir, "certs-dir", "", "`directory` with <host>/hosts.toml for registries, in containerd's form: mirrors, CAs, plain HTTP (/etc/containerd/certs.d)")
	flags.StringVar(&opts.registryConfig, "registry-config", "", "`file` with the node's credentials for registries, a Docker config.json, read again for each pull; volumes' own secrets come first")
	flags.StringArrayVar(&config.Keep, "prefetch", nil, "`image` (registry/repository:tag) that is pulled at start with the node's credentials, and kept; repeatable")
	flags.IntVar(&config.Parallel, "pull-parallel", 4, "`number` of layers that are downloaded and unpacked at the same time")
	flags.DurationVar(&config.StallTimeout, "pull-stall-timeout", 30*time.Second, "how long a registry may send next to nothing before a request is tried again")
	flags.StringVar(maxLayerSize, "max-layer-size", "1Ti", "`size` of the files of one layer, at most; 0: any")
	flags.Int64Var(&config.Limits.LayerEntries, "max-layer-entries", 10_000_000, "`number` of files, directories and links in one layer, at most; 0: any")
	flags.IntVar(&config.Limits.ReservePercent, "layer-disk-reserve", 5, "`percent` of the data root's disk that pulls leave free for the volumes")
	flags.IntVar(&config.Collect.HighPercent, "layer-gc-high", 85, "`percent` of the data root's disk in use from which layers that no volume uses are collected")
	flags.IntVar(&config.Collect.LowPercent, "layer-gc-low", 80, "`percent` of the disk in use down to which they are collected")
	flags.DurationVar(&config.Collect.MinAge, "layer-gc-min-age", 2*time.Minute, "how long a layer must not have been used before it is collected")
	flags.DurationVar(&config.Collect.Interval, "layer-gc-interval", 5*time.Minute, "time between two looks at how full the disk is")
	flags.StringVar(&opts.adminSocket, "admin-socket", "", "`socket` that overlayctl talks to (default <data-root>/overlayctl.sock)")
	config.Backoff = 500 * time.Millisecond
}

// parseSize reads a Kubernetes quantity of bytes.
func parseSize(text string) (int64, error) {
	quantity, err := resource.ParseQuantity(text)
	if err != nil {
		return 0, err
	}
	if quantity.Sign() < 0 {
		return 0, fmt.Errorf("it must not be negative")
	}
	return quantity.Value(), nil
}

// completeStore refuses what the layer store cannot do.
func (o *options) completeStore() error {
	for i, name := range o.store.Keep {
		named, err := store.ParseName(strings.TrimPrefix(name, "oci://"))
		if err != nil {
			return fmt.Errorf("--prefetch: %w", err)
		}
		o.store.Keep[i] = named.String()
	}
	percent := func(p int) bool { return p >= 0 && p <= 100 }
	collect, limits := o.store.Collect, o.store.Limits
	switch {
	case !percent(collect.HighPercent) || !percent(collect.LowPercent) || collect.LowPercent > collect.HighPercent:
		return fmt.Errorf("--layer-gc-high %d and --layer-gc-low %d: they are percentages, and the low mark is not above the high one", collect.HighPercent, collect.LowPercent)
	case limits.ReservePercent < 0 || limits.ReservePercent > 90:
		return fmt.Errorf("--layer-disk-reserve %d: it is a percentage of at most 90", limits.ReservePercent)
	case o.store.Parallel < 1 || o.store.StallTimeout < time.Second || collect.Interval <= 0 || collect.MinAge < 0 || limits.LayerEntries < 0:
		return fmt.Errorf("--pull-parallel is at least 1, --pull-stall-timeout at least 1s, --layer-gc-interval positive, --layer-gc-min-age and --max-layer-entries not negative")
	}
	return nil
}

// complete fills in what follows from other flags, and refuses what cannot be.
func (o *options) complete() error {
	if o.nodeID == "" {
		hostname, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("read the host name (or name the node with --node-id): %w", err)
		}
		o.nodeID = hostname
	}
	if o.endpoint == "" {
		o.endpoint = "unix://" + filepath.Join(o.kubeletDir, "plugins", o.driverName, "csi.sock")
	}
	if o.upperMounts == "" {
		o.upperMounts = filepath.Join(o.kubeletDir, "plugins", o.driverName, "uppers")
	}
	if o.adminSocket == "" {
		o.adminSocket = filepath.Join(o.dataRoot, "overlayctl.sock")
	}
	if err := o.completeStore(); err != nil {
		return err
	}
	for _, name := range o.permittedOptions {
		if !slices.Contains(overlay.LooseningOptions(), name) {
			return fmt.Errorf("--permit-mount-option %q: there are %s", name, strings.Join(overlay.LooseningOptions(), ", "))
		}
	}
	switch {
	case o.driverName == "":
		return fmt.Errorf("--driver-name is empty: name the driver")
	case !filepath.IsAbs(o.dataRoot) || !filepath.IsAbs(o.kubeletDir):
		return fmt.Errorf("--data-root %q and --kubelet-dir %q must be absolute paths", o.dataRoot, o.kubeletDir)
	case !filepath.IsAbs(o.upperMounts) || o.upperMounts == o.dataRoot || strings.HasPrefix(o.upperMounts, o.dataRoot+"/"):
		return fmt.Errorf("--upper-mounts %q: it is an absolute path, and not in the data root", o.upperMounts)
	case !(o.overcommit >= 1 && o.overcommit <= 1000):
		return fmt.Errorf("--overcommit %g: it is a number from 1 to 1000", o.overcommit)
	case o.podVolumeWait < 0 || o.reconcile <= 0:
		return fmt.Errorf("--pod-volume-wait %s must not be negative and --reconcile-interval %s must be positive", o.podVolumeWait, o.reconcile)
	case o.logFormat != "text" && o.logFormat != "json":
		return fmt.Errorf("--log-format %q: there are text and json", o.logFormat)
	}
	return nil
}

func parseLayerRoots(roots, mounts []string) (map[string]layer.Root, error) {
	parsed := map[string]layer.Root{}
	for _, root := range roots {
		name, path, ok := strings.Cut(root, "=")
		if !ok || name == "" || path == "" {
			return nil, fmt.Errorf("--layer-root %q: write NAME=PATH", root)
		}
		if _, twice := parsed[name]; twice {
			return nil, fmt.Errorf("--layer-root %q: there is another root of that name", root)
		}
		parsed[name] = layer.Root{Path: path, Mounts: slices.Contains(mounts, name)}
	}
	for _, name := range mounts {
		if _, ok := parsed[name]; !ok {
			return nil, fmt.Errorf("--layer-root-mounts %q: no --layer-root has that name", name)
		}
	}
	return parsed, nil
}

// newLogger makes klog write as asked, and returns its logger.
func newLogger(opts options) klog.Logger {
	var level klog.Level
	if err := level.Set(strconv.Itoa(opts.verbosity)); err != nil {
		// It is a number: the flag was parsed as one.
		panic(err)
	}
	if opts.logFormat == "json" {
		// Verbosity 4 of klog is level -4 of slog (package logr).
		klog.SetSlogLogger(slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.Level(-opts.verbosity)})))
	}
	return klog.Background()
}
