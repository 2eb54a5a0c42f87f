package main

import (
	"errors"
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
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/store/access"
)

// options are the parsed and checked flags.
type options struct {
	driverName          string
	nodeID              string
	endpoint            string
	httpEndpoint        string
	profiles            bool
	dataRoot            string
	upperMountDir       string
	overcommit          float64
	volumeHealth        bool
	kubeletDir          string
	kubeconfig          string
	register            bool
	registrationPath    string
	layerRoots          map[string]layer.Root
	allowedMountOptions []string
	adminSocket         string
	registry            registry.Config
	store               store.Config
	gzipProgram         string
	maxCacheBytes       int64
	maxPushes           int
	podVolumeWait       time.Duration
	reconcile           time.Duration
	disabledFeatures    []string
	overlayNodes        string
	capacityReport      time.Duration
	log                 logOptions
	printVersion        bool
}

// parseFlags parses the command line. For --help it writes the help to output and returns pflag.ErrHelp.
func parseFlags(args []string, output io.Writer) (options, error) {
	opts, roots, submounts, maxLayerSize, maxCacheSize := options{}, []string{}, []string{}, "", ""
	flags := pflag.NewFlagSet("overlay-csi", pflag.ContinueOnError)
	flags.SetOutput(output)
	flags.SortFlags = false
	flags.Usage = func() {
		fmt.Fprintf(output, "%s\n\nUsage:\n  overlay-csi [flags]\n  overlay-csi controller [flags]\n\nFlags:\n%s",
			"overlay-csi is the node plugin of a CSI driver for overlay volumes, and its central controller.", flags.FlagUsagesWrapped(120))
	}
	addDriverName(flags, &opts.driverName)
	flags.StringVar(&opts.nodeID, "node-id", "", "`name` of this node in the cluster (default: the host name)")
	flags.StringVar(&opts.endpoint, "endpoint", "", "CSI `socket`, unix:///path (default <kubelet-dir>/plugins/<driver-name>/csi.sock)")
	flags.StringVar(&opts.kubeletDir, "kubelet-dir", "/var/lib/kubelet",
		"kubelet's root `directory`, mounted into the driver at the same path with mount propagation Bidirectional")
	flags.BoolVar(&opts.register, "register", true, "register with kubelet through <kubelet-dir>/plugins_registry")
	flags.StringVar(&opts.registrationPath, "registration-path", "",
		"`path` of the CSI socket as kubelet sees it (default: that of --endpoint)")
	flags.StringVar(&opts.kubeconfig, "kubeconfig", "",
		"kubeconfig `file` for the API server (default: the pod's ServiceAccount; outside of a cluster: no API server)")
	flags.StringVar(&opts.dataRoot, "data-root", "/var/lib/overlay-csi",
		"`directory` for all data of the driver, on ext4, xfs, btrfs or tmpfs")
	flags.StringVar(&opts.upperMountDir, "upper-mount-dir", "",
		"`directory` where disk images and tmpfs of uppers are mounted (default <kubelet-dir>/plugins/<driver-name>/uppers)")
	flags.Float64Var(&opts.overcommit, "overcommit", 1,
		"`factor` by which the sizes of all volumes together may exceed the data root's disk")
	flags.StringSliceVar(&opts.allowedMountOptions, "allow-mount-option", nil,
		"mount `options` that volumes may set although they give untrusted layers more rights: "+strings.Join(overlay.LooseningOptions(), ", "))
	flags.StringVar(&opts.overlayNodes, "overlay-node-namespace", "",
		"`namespace` of the OverlayNode by which a central controller reaches this node; empty: there is none")
	flags.DurationVar(&opts.capacityReport, "capacity-report-interval", time.Minute,
		"time between two looks at the disk, for the capacity in the OverlayNode")
	flags.DurationVar(&opts.podVolumeWait, "pod-volume-wait", 10*time.Second,
		"how long a publish waits until kubelet has mounted a volume named by volume://")
	flags.DurationVar(&opts.reconcile, "reconcile-interval", time.Minute, "time between two cleanups of what deleted pods left")
	flags.StringArrayVar(&roots, "layer-root", nil,
		"`NAME=PATH` of a directory that dir://NAME/... and archive://NAME/... refer to; repeatable")
	flags.StringArrayVar(&submounts, "layer-root-allow-submounts", nil,
		"`NAME` of a layer root in which paths may lead into other mounts beneath it; repeatable")
	addStoreFlags(flags, &opts, &maxLayerSize)
	flags.StringVar(&maxCacheSize, "cache-max-size", "10Gi",
		"maximum `size` of all caches together, of which the least recently used are removed; 0: nothing is committed")
	flags.IntVar(&opts.maxPushes, "max-concurrent-snapshot-pushes", 2,
		"`number` of snapshots that are pushed to registries at the same time")
	flags.BoolVar(&opts.volumeHealth, "volume-health", false, "serve the health RPCs, which are alpha in CSI 1.13")
	addHTTPFlags(flags, ":9808", &opts.httpEndpoint, &opts.profiles)
	flags.StringVar(&opts.adminSocket, "admin-socket", "", "`socket` for overlayctl (default <data-root>/overlayctl.sock)")
	flags.StringSliceVar(&opts.disabledFeatures, "disable-kernel-features", nil,
		"kernel `features` to treat as missing, to test the fallbacks: "+strings.Join(overlay.FeatureNames(), ", "))
	addLogFlags(flags, &opts.log)
	flags.BoolVar(&opts.printVersion, "version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		return options{}, err
	}
	if flags.NArg() > 0 {
		return options{}, fmt.Errorf("unexpected argument %q; the command takes only flags, see --help", flags.Arg(0))
	}
	var err error
	if opts.layerRoots, err = parseLayerRoots(roots, submounts); err != nil {
		return options{}, err
	}
	if opts.store.MaxLayerBytes, err = parseSize(maxLayerSize); err != nil {
		return options{}, fmt.Errorf("--max-layer-size %q: %w", maxLayerSize, err)
	}
	if opts.maxCacheBytes, err = parseSize(maxCacheSize); err != nil {
		return options{}, fmt.Errorf("--cache-max-size %q: %w", maxCacheSize, err)
	}
	return opts, opts.complete()
}

// addStoreFlags adds the flags of the layer store.
func addStoreFlags(flags *pflag.FlagSet, opts *options, maxLayerSize *string) {
	config := &opts.store
	addRegistryFlags(flags, &opts.registry)
	flags.StringVar((*string)(&config.Access.Policy), "image-pull-credentials-verification-policy", string(access.NeverVerifyPreloadedImages),
		fmt.Sprintf("`policy` of verifying credentials for images on the node, as kubelet's: %q; preloaded are those of --prefetch",
			access.Policies()))
	flags.StringSliceVar(&config.Access.Allowlist, "preloaded-images-verification-allowlist", nil,
		"`images` of --prefetch, without tags, that NeverVerifyAllowlistedImages does not verify; may end with /*")
	flags.StringArrayVar(&config.Prefetch, "prefetch", nil,
		"`image` (registry/repository:tag) to pull at start and not to collect; repeatable")
	flags.IntVar(&config.MaxConcurrentLayerPulls, "max-concurrent-layer-pulls", 4,
		"`number` of layers that are downloaded and unpacked at the same time")
	flags.StringVar(&opts.gzipProgram, "gzip-program", "/usr/bin/igzip",
		"`path` of igzip, which decompresses large layers in a process without rights; empty or missing: the driver does so itself")
	flags.StringVar(maxLayerSize, "max-layer-size", "1Ti", "maximum `size` of one unpacked layer; 0: unlimited")
	flags.Int64Var(&config.MaxLayerEntries, "max-layer-entries", 10_000_000,
		"maximum `number` of files, directories and links in one layer; 0: unlimited")
	flags.IntVar(&config.MinFreeDiskPercent, "min-free-disk-percent", 5,
		"`percent` of the data root's disk that pulls leave free for the volumes")
	flags.IntVar(&config.GC.HighThreshold, "layer-gc-high-threshold", 85,
		"disk usage in `percent` at which garbage collection of unused layers starts")
	flags.IntVar(&config.GC.LowThreshold, "layer-gc-low-threshold", 80, "disk usage in `percent` at which garbage collection stops")
	flags.DurationVar(&config.GC.MinAge, "layer-gc-min-age", 2*time.Minute, "how long a layer must be unused before it is collected")
	flags.DurationVar(&config.GC.Interval, "layer-gc-interval", 5*time.Minute, "time between two checks of the disk usage")
}

// addRegistryFlags adds the flags of access to registries.
func addRegistryFlags(flags *pflag.FlagSet, config *registry.Config) {
	flags.StringVar(&config.CertsDir, "certs-dir", "",
		"`directory` with <host>/hosts.toml, containerd's configuration of registries: mirrors, CAs, plain HTTP")
	flags.StringVar(&config.CredentialsFile, "registry-config", "",
		"Docker config.json `file` with registry credentials, for images that a volume's own secret does not cover")
	flags.StringSliceVar(&config.CredentialsNamespaces, "registry-config-namespaces", []string{registry.AllNamespaces},
		"`namespaces` whose pods and claims may use --registry-config; *: all; empty: only --prefetch and overlayctl use it")
	flags.DurationVar(&config.StallTimeout, "pull-stall-timeout", 30*time.Second,
		"how long a registry may send almost nothing before the request is retried")
	config.Backoff, config.UserAgent = 500*time.Millisecond, "overlay-csi/"+version
}

// checkRegistry checks the flags of access to registries.
func checkRegistry(config registry.Config) error {
	if config.StallTimeout < time.Second {
		return fmt.Errorf("--pull-stall-timeout %s: must be at least 1s", config.StallTimeout)
	}
	return nil
}

func addDriverName(flags *pflag.FlagSet, name *string) {
	flags.StringVar(name, "driver-name", "overlay-csi.github.io", "`name` of the CSI driver, and prefix of its topology key")
}

// logOptions say how to log.
type logOptions struct {
	format    string
	verbosity int
}

func addLogFlags(flags *pflag.FlagSet, opts *logOptions) {
	flags.StringVar(&opts.format, "log-format", "text", "`format` of the log: text or json")
	flags.IntVarP(&opts.verbosity, "v", "v", 0,
		"`level` of the log: 4 adds read-only RPCs, 6 the text of all requests, without their secrets")
}

func (o logOptions) check() error {
	if o.format != "text" && o.format != "json" {
		return fmt.Errorf("--log-format %q: must be text or json", o.format)
	}
	return nil
}

// parseSize parses a Kubernetes quantity of bytes.
func parseSize(text string) (int64, error) {
	quantity, err := resource.ParseQuantity(text)
	if err != nil {
		return 0, err
	}
	if quantity.Sign() < 0 {
		return 0, errors.New("must not be negative")
	}
	return quantity.Value(), nil
}

// completeStore checks the flags of the layer store.
func (o *options) completeStore() error {
	for i, name := range o.store.Prefetch {
		named, err := registry.ParseName(strings.TrimPrefix(name, "oci://"))
		if err != nil {
			return fmt.Errorf("--prefetch: %w", err)
		}
		o.store.Prefetch[i] = named.String()
	}
	if err := o.store.Access.Check(); err != nil {
		return fmt.Errorf("--image-pull-credentials-verification-policy, --preloaded-images-verification-allowlist: %w", err)
	}
	percent := func(p int) bool { return p >= 0 && p <= 100 }
	gc := o.store.GC
	switch {
	case !percent(gc.HighThreshold) || !percent(gc.LowThreshold) || gc.LowThreshold > gc.HighThreshold:
		return fmt.Errorf("--layer-gc-low-threshold %d, --layer-gc-high-threshold %d: 0 <= low <= high <= 100 is required",
			gc.LowThreshold, gc.HighThreshold)
	case o.store.MinFreeDiskPercent < 0 || o.store.MinFreeDiskPercent > 90:
		return fmt.Errorf("--min-free-disk-percent %d: must be from 0 to 90", o.store.MinFreeDiskPercent)
	case o.store.MaxConcurrentLayerPulls < 1:
		return fmt.Errorf("--max-concurrent-layer-pulls %d: must be at least 1", o.store.MaxConcurrentLayerPulls)
	case gc.Interval <= 0:
		return fmt.Errorf("--layer-gc-interval %s: must be positive", gc.Interval)
	case gc.MinAge < 0:
		return fmt.Errorf("--layer-gc-min-age %s: must not be negative", gc.MinAge)
	case o.store.MaxLayerEntries < 0:
		return fmt.Errorf("--max-layer-entries %d: must not be negative", o.store.MaxLayerEntries)
	}
	return nil
}

// complete sets the defaults that depend on other flags, and checks all flags.
func (o *options) complete() error {
	if o.nodeID == "" {
		hostname, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("get the host name: %w; set --node-id", err)
		}
		o.nodeID = hostname
	}
	if o.endpoint == "" {
		o.endpoint = "unix://" + filepath.Join(o.kubeletDir, "plugins", o.driverName, "csi.sock")
	}
	if o.upperMountDir == "" {
		o.upperMountDir = filepath.Join(o.kubeletDir, "plugins", o.driverName, "uppers")
	}
	if o.adminSocket == "" {
		o.adminSocket = filepath.Join(o.dataRoot, "overlayctl.sock")
	}
	if err := o.completeStore(); err != nil {
		return err
	}
	for _, name := range o.allowedMountOptions {
		if !slices.Contains(overlay.LooseningOptions(), name) {
			return fmt.Errorf("--allow-mount-option %q: must be one of %s", name, strings.Join(overlay.LooseningOptions(), ", "))
		}
	}
	switch {
	case o.driverName == "":
		return errors.New("--driver-name must not be empty")
	case !filepath.IsAbs(o.dataRoot):
		return fmt.Errorf("--data-root %q: must be an absolute path", o.dataRoot)
	case !filepath.IsAbs(o.kubeletDir):
		return fmt.Errorf("--kubelet-dir %q: must be an absolute path", o.kubeletDir)
	case !filepath.IsAbs(o.upperMountDir) || o.upperMountDir == o.dataRoot || strings.HasPrefix(o.upperMountDir, o.dataRoot+"/"):
		return fmt.Errorf("--upper-mount-dir %q: must be an absolute path outside of the data root", o.upperMountDir)
	case !(o.overcommit >= 1 && o.overcommit <= 1000):
		return fmt.Errorf("--overcommit %g: must be from 1 to 1000", o.overcommit)
	case o.maxPushes < 1:
		return fmt.Errorf("--max-concurrent-snapshot-pushes %d: must be at least 1", o.maxPushes)
	case o.podVolumeWait < 0:
		return fmt.Errorf("--pod-volume-wait %s: must not be negative", o.podVolumeWait)
	case o.reconcile <= 0:
		return fmt.Errorf("--reconcile-interval %s: must be positive", o.reconcile)
	case o.capacityReport <= 0:
		return fmt.Errorf("--capacity-report-interval %s: must be positive", o.capacityReport)
	}
	return errors.Join(checkRegistry(o.registry), o.log.check())
}

func parseLayerRoots(roots, submounts []string) (map[string]layer.Root, error) {
	parsed := map[string]layer.Root{}
	for _, root := range roots {
		name, path, ok := strings.Cut(root, "=")
		if !ok || name == "" || path == "" {
			return nil, fmt.Errorf("--layer-root %q: must be NAME=PATH", root)
		}
		if _, twice := parsed[name]; twice {
			return nil, fmt.Errorf("--layer-root %q: duplicate name", root)
		}
		parsed[name] = layer.Root{Path: path, AllowSubmounts: slices.Contains(submounts, name)}
	}
	for _, name := range submounts {
		if _, ok := parsed[name]; !ok {
			return nil, fmt.Errorf("--layer-root-allow-submounts %q: no --layer-root has this name", name)
		}
	}
	return parsed, nil
}

// newLogger configures klog and returns its logger.
func newLogger(opts logOptions) klog.Logger {
	var level klog.Level
	if err := level.Set(strconv.Itoa(opts.verbosity)); err != nil {
		// It is a number: the flag was parsed as one.
		panic(err)
	}
	if opts.format == "json" {
		// Verbosity 4 of klog is level -4 of slog (package logr).
		klog.SetSlogLogger(slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.Level(-opts.verbosity)})))
	}
	return klog.Background()
}

// addHTTPFlags adds the flags of what is served over HTTP.
func addHTTPFlags(flags *pflag.FlagSet, address string, endpoint *string, profiles *bool) {
	flags.StringVar(endpoint, "http-endpoint", address, "`address` of /healthz, /readyz and /metrics; empty: none")
	flags.BoolVar(profiles, "enable-pprof", false, "serve profiles of the process at the address of --http-endpoint, to whoever reaches it")
}
