package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	kuberecord "k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	mount "k8s.io/mount-utils"
	"k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/admin"
	"github.com/overlay-csi/overlay-csi/pkg/commit"
	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/driver"
	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/kubeapi"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/metrics"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
)

// Keys of log messages.
const (
	logReason    = "reason"
	logVersion   = "version"
	logDriver    = "driver"
	logNode      = "node"
	logEndpoint  = "endpoint"
	logFeatures  = "features"
	logFallbacks = "fallbacks"
	logBackends  = "backends"
)

// run creates the driver's objects, each from those before it, and serves until ctx is done.
func run(ctx context.Context, opts options) error {
	// No other process uses the data root from here on.
	lock, err := lockDataRoot(ctx, opts.dataRoot)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := probeDataRoot(ctx, lock); err != nil {
		return err
	}

	// What mounts views.
	features, err := probeKernel(lock.Path(), opts)
	if err != nil {
		return err
	}
	mounter, err := newMounter(lock.Path(), features)
	if err != nil {
		return err
	}
	defer mounter.Close()
	detached := newDetachedRoot(ctx, features)
	defer detached.Close()

	// What is stored in the data root.
	root, err := lock.Open(detached.Reopen)
	if err != nil {
		return err
	}
	defer root.Close()
	records := record.NewStore(root.VolumesDir(), opts.kubeletDir, lock.Ballast())
	measured := metrics.New(version)
	measured.AddStore()
	opts.store.Observer = measured
	layers, err := newStore(ctx, root, records, opts)
	if err != nil {
		return err
	}
	defer layers.Close()

	// The volumes of the node, and their CSI services.
	api, err := newAPI(opts)
	if err != nil {
		return err
	}
	backends := newBackends(root, records, mounter, opts)
	pushes := portable.NewPushes(ctx, opts.maxPushes)
	defer pushes.Close()
	manager, err := newManager(root, lock.Ballast(), records, mounter, detached, api, layers, backends, pushes, opts)
	if err != nil {
		return err
	}
	layers.ReclaimFirst(manager.Caches().Reclaim)
	registrar, err := newRegistrar(ctx, opts, measured)
	if err != nil {
		return err
	}
	key, err := overlaynode.NewKey()
	if err != nil {
		return err
	}
	events, stopEvents, err := newNodeRecorder(ctx, opts)
	if err != nil {
		return err
	}
	defer stopEvents()
	controller := newController(opts, manager, api, key, events)
	agent, err := newAgent(ctx, opts, manager, controller, key, measured)
	if err != nil {
		return err
	}
	server, err := newCSIServer(ctx, opts, manager, controller, registrar, measured)
	if err != nil {
		return err
	}

	node := measured.AddNode(metrics.NodeConfig{
		CensusConfig: metrics.CensusConfig{
			Records: records, Volumes: manager, Caches: manager.Caches(), FrozenUppers: backends.ListFrozen, Interval: opts.reconcile,
		},
		DataRoot: root.Path(), Store: layers, Discarded: root.Discarded, Features: features, Ready: manager.Ready,
		Registered: registrar.check,
	})
	handler := admin.NewHandler(layers, manager, records, manager.Caches(), newCommitter(root, opts), opts.store.MaxLayerBytes)

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { manager.Run(ctx); return nil })
	group.Go(func() error { manager.Caches().Run(ctx); return nil })
	group.Go(func() error { root.RunDeleter(ctx); return nil })
	group.Go(func() error { layers.Run(ctx); return nil })
	group.Go(func() error { return admin.Serve(ctx, opts.adminSocket, handler) })
	group.Go(func() error { return server.Serve(ctx) })
	if opts.httpEndpoint != "" {
		group.Go(func() error { return serveHTTP(ctx, opts, measured, manager, server, registrar) })
		group.Go(func() error { node.Run(ctx); return nil })
	}
	group.Go(func() error { return registrar.run(ctx) })
	group.Go(func() error { agent(ctx); return nil })
	klog.FromContext(ctx).Info("Started",
		logVersion, version, logDriver, opts.driverName, logNode, opts.nodeID, logEndpoint, opts.endpoint)
	return group.Wait()
}

// lockDataRoot locks the data root. It waits until an earlier process has ended, or until ctx is done.
func lockDataRoot(ctx context.Context, path string) (*dataroot.Lock, error) {
	for {
		lock, err := dataroot.Acquire(path)
		if !errors.Is(err, dataroot.ErrInUse) {
			return lock, err
		}
		klog.FromContext(ctx).Info("Waiting for another process to end", logReason, err.Error())
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Second):
		}
	}
}

// probeDataRoot returns an error if the data root is on a file system that cannot hold an upper. One that cannot be written to is no
// reason to end: pods of this node must be able to end, and what is deleted makes room.
func probeDataRoot(ctx context.Context, lock *dataroot.Lock) error {
	err := lock.Ballast().With(func() error { return upper.Probe(lock.Dir()) })
	if errors.Is(err, upper.ErrNotWritable) {
		klog.FromContext(ctx).Error(err, "The data root cannot be written to; no volume can be published before it can")
		return nil
	}
	if err != nil {
		return fmt.Errorf("data root: %w", err)
	}
	return nil
}

// probeKernel returns the kernel features that the driver may use.
func probeKernel(dataRoot string, opts options) (overlay.Features, error) {
	dir := filepath.Join(dataRoot, dataroot.Mounter)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return overlay.Features{}, fmt.Errorf("create the mounter's directory: %w", err)
	}
	features, err := overlay.Probe(dir)
	if err != nil {
		return overlay.Features{}, err
	}
	if features, err = features.Without(opts.disabledFeatures...); err != nil {
		return overlay.Features{}, fmt.Errorf("--disable-kernel-features: %w", err)
	}
	klog.Background().Info("Kernel probed", logFeatures, features.String(), logFallbacks, features.Fallbacks())
	return features, nil
}

// newMounter returns a mounter of views, which has a directory of its own in the data root.
func newMounter(dataRoot string, features overlay.Features) (*overlay.Mounter, error) {
	dir := filepath.Join(dataRoot, dataroot.Mounter)
	return overlay.NewMounter(overlay.Config{Dir: dir, Features: features, MountUtils: mount.NewWithoutSystemd(""), Commands: exec.New()})
}

// newDetachedRoot returns a copy of the root mount, or one that reopens nothing if the kernel refuses to make a copy.
func newDetachedRoot(ctx context.Context, features overlay.Features) *overlay.DetachedRoot {
	detached, err := overlay.NewDetachedRoot(features)
	if err != nil {
		klog.FromContext(ctx).Info("Detached root mount unavailable; publish latency will grow with the number of mounts",
			logReason, err.Error())
		return &overlay.DetachedRoot{}
	}
	return detached
}

// newStore opens the layer store. It fails at once if the credentials cannot be read, not at the first pull.
func newStore(ctx context.Context, root *dataroot.Root, records *record.Store, opts options) (*store.Store, error) {
	if opts.registry.CredentialsFile != "" {
		if _, err := registry.ReadCredentials(opts.registry.CredentialsFile); err != nil {
			return nil, fmt.Errorf("--registry-config: %w", err)
		}
	}
	opts.store.Gunzip = newGunzip(ctx, opts)
	return store.New(ctx, root, records, newRegistryClient(root, opts), opts.store)
}

// newRegistryClient returns a client of registries that has room on the disk for large manifests.
func newRegistryClient(root *dataroot.Root, opts options) *registry.Client {
	config := opts.registry
	config.SpoolDir, config.SpoolReserve = root.Path(), opts.store.MinFreeDiskPercent
	return registry.NewClient(config)
}

// newCommitter returns what makes images of volumes.
func newCommitter(root *dataroot.Root, opts options) *commit.Committer {
	return commit.New(newRegistryClient(root, opts), image.NewDocuments())
}

// newAPI returns a reader of the API server. Outside of a cluster and without --kubeconfig it is kubeapi.None.
func newAPI(opts options) (kubeapi.Reader, error) {
	api, err := kubeapi.New(opts.kubeconfig)
	if err != nil && opts.kubeconfig != "" {
		return nil, fmt.Errorf("--kubeconfig: %w", err)
	}
	if api == (kubeapi.None{}) {
		klog.Background().Info("No API server; volume:// does not find claims of a pod, claims cannot name their layers, and nothing is " +
			"committed to caches")
	}
	return api, err
}

// newBackends returns the backends of uppers.
func newBackends(root *dataroot.Root, records *record.Store, mounter *overlay.Mounter, opts options) *upper.Backends {
	backends := upper.NewBackends(upper.Config{
		Root:     root.Dir(),
		MountDir: opts.upperMountDir,
		Discard:  root.Discard,
		Sparse:   opts.overcommit > 1,
		Commands: exec.New(),
		Mounter:  mounter,
		InUse:    volume.UpperInUse(records),
	})
	klog.Background().Info("Volume size enforcement", logBackends, backends.Enforcing())
	return backends
}

// newManager returns the manager of the node's volumes, with the resolver of their layers.
func newManager(
	root *dataroot.Root, ballast *dataroot.Ballast, records *record.Store, mounter *overlay.Mounter, detached *overlay.DetachedRoot,
	api kubeapi.Reader, layers *store.Store, backends *upper.Backends, pushes *portable.Pushes, opts options,
) (*volume.Manager, error) {
	protected, err := layer.NewProtectedDir(root.Path())
	if err != nil {
		return nil, err
	}
	roots, err := layer.NewRoots(opts.layerRoots, protected, detached)
	if err != nil {
		return nil, err
	}
	kubeletDir := kubelet.Dir(opts.kubeletDir)
	podVolumes := layer.NewPodVolumes(kubelet.NewPodVolumes(kubeletDir, api, opts.podVolumeWait), protected)
	bootID, err := linux.BootID()
	if err != nil {
		return nil, err
	}
	return volume.NewManager(volume.Config{
		Node:              opts.nodeID,
		BootID:            bootID,
		ReconcileInterval: opts.reconcile,
		Overcommit:        opts.overcommit,
		MaxCacheBytes:     opts.maxCacheBytes,
		Root:              root,
		Ballast:           ballast,
		Records:           records,
		Mounter:           mounter,
		Layers:            layer.NewResolver(roots, podVolumes, layers),
		PodVolumes:        podVolumes,
		Pods:              kubeletDir,
		PodPhases:         api,
		Backends:          backends,
		Portable: volume.Portable{
			Registry: portable.NewRegistry(newRegistryClient(root, opts), image.NewDocuments()), Pushes: pushes,
			MaxLayerBytes: opts.store.MaxLayerBytes,
		},
	}), nil
}

// newController returns the controller service of this node.
func newController(
	opts options, manager *volume.Manager, api kubeapi.Reader, key *overlaynode.Key, events kuberecord.EventRecorder,
) *driver.Controller {
	return driver.NewController(driver.ControllerConfig{
		DriverName: opts.driverName,
		NodeID:     opts.nodeID,
		Volumes:    manager,
		Snapshots:  manager,
		Cluster:    api,
		Key:        key,
		Events:     events,
		Health:     opts.volumeHealth,
	})
}

// newAgent returns a function that carries out the requests of a central controller until its context is done. Without
// --overlay-node-namespace it does nothing.
func newAgent(
	ctx context.Context, opts options, manager *volume.Manager, controller *driver.Controller, key *overlaynode.Key,
	measured *metrics.Metrics,
) (run func(context.Context), err error) {
	if opts.overlayNodes == "" {
		return func(context.Context) {}, nil
	}
	config, err := kubeapi.Config(opts.kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("--overlay-node-namespace: %w", err)
	}
	client, err := overlaynode.NewClient(config, opts.overlayNodes, opts.driverName)
	if err != nil {
		return nil, err
	}
	agent, err := overlaynode.NewAgent(overlaynode.AgentConfig{
		Client:         client,
		Node:           opts.nodeID,
		Handle:         driver.ForwardedTo(controller, klog.FromContext(ctx), measured),
		Capacity:       manager.Capacity,
		PublicKey:      key.Public(),
		ReportInterval: opts.capacityReport,
	})
	if err != nil {
		return nil, err
	}
	return agent.Run, nil
}

// newCSIServer returns the server of the CSI socket with its three services.
func newCSIServer(
	ctx context.Context, opts options, manager *volume.Manager, controller *driver.Controller, registrar *registrar,
	measured *metrics.Metrics,
) (*driver.Server, error) {
	server, err := driver.NewServer(opts.endpoint, klog.FromContext(ctx), measured)
	if err != nil {
		return nil, err
	}
	csi.RegisterIdentityServer(server, driver.NewIdentity(opts.driverName, version, manager.Ready))
	csi.RegisterControllerServer(server, controller)
	csi.RegisterNodeServer(server, driver.NewNode(driver.NodeConfig{
		DriverName:          opts.driverName,
		NodeID:              opts.nodeID,
		Volumes:             manager,
		AllowedMountOptions: opts.allowedMountOptions,
		Health:              opts.volumeHealth,
		Registered:          registrar.check,
	}))
	return server, nil
}

// serveHTTP serves /healthz, /readyz and /metrics on a TCP address until ctx is done.
func serveHTTP(
	ctx context.Context, opts options, measured *metrics.Metrics, manager *volume.Manager, server *driver.Server, registrar *registrar,
) error {
	listener, err := net.Listen("tcp", opts.httpEndpoint)
	if err != nil {
		return fmt.Errorf("--http-endpoint: %w", err)
	}
	ready := func() error {
		if !manager.Ready() {
			return errors.New("cleaning up after an earlier process")
		}
		return errors.Join(server.Check(), registrar.check())
	}
	return driver.ServeHTTP(ctx, listener, driver.HTTPConfig{Ready: ready, Metrics: measured.Handler(), Profiles: opts.profiles})
}
