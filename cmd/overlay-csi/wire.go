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
	"k8s.io/klog/v2"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
	mount "k8s.io/mount-utils"
	"k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/admin"
	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/driver"
	"github.com/overlay-csi/overlay-csi/pkg/kubeapi"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// run makes the driver's objects, one on top of the other, and serves until ctx is done.
func run(ctx context.Context, opts options) error {
	logger := klog.FromContext(ctx)
	lock, err := lockDataRoot(ctx, opts.dataRoot)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := upper.Probe(lock.Dir()); err != nil {
		return fmt.Errorf("data root: %w", err)
	}
	features, err := probeKernel(lock.Path(), opts)
	if err != nil {
		return err
	}
	mounter, err := newMounter(lock.Path(), features)
	if err != nil {
		return err
	}
	defer mounter.Close()
	detached, err := overlay.NewDetachedRoot(features)
	if err != nil {
		logger.Info("Detached root mount unavailable; publish latency will grow with the number of mounts", "reason", err.Error())
		detached = &overlay.DetachedRoot{}
	}
	defer detached.Close()
	root, err := lock.Open(detached.Reopen)
	if err != nil {
		return err
	}
	defer root.Close()
	records := record.NewStore(root.VolumesDir())
	api, err := newAPI(opts)
	if err != nil {
		return err
	}
	layers, err := newStore(ctx, root, records, opts)
	if err != nil {
		return err
	}
	defer layers.Close()
	manager, err := newManager(root, records, mounter, detached, api, layers, opts)
	if err != nil {
		return err
	}

	server, err := driver.NewServer(opts.endpoint, logger)
	if err != nil {
		return err
	}
	csi.RegisterIdentityServer(server, driver.NewIdentity(opts.driverName, version, manager.Ready))
	csi.RegisterControllerServer(server, driver.NewController(driver.ControllerConfig{
		DriverName: opts.driverName,
		NodeID:     opts.nodeID,
		Volumes:    manager,
		Claims:     api,
		Health:     opts.volumeHealth,
	}))
	csi.RegisterNodeServer(server, driver.NewNode(driver.NodeConfig{
		DriverName:          opts.driverName,
		NodeID:              opts.nodeID,
		Volumes:             manager,
		AllowedMountOptions: opts.allowedMountOptions,
		Health:              opts.volumeHealth,
	}))

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { manager.Run(ctx); return nil })
	group.Go(func() error { root.RunDeleter(ctx); return nil })
	group.Go(func() error { layers.Run(ctx); return nil })
	group.Go(func() error { return admin.Serve(ctx, opts.adminSocket, admin.NewHandler(layers, manager, records)) })
	group.Go(func() error { return server.Serve(ctx) })
	if opts.httpEndpoint != "" {
		group.Go(func() error {
			listener, err := net.Listen("tcp", opts.httpEndpoint)
			if err != nil {
				return fmt.Errorf("--http-endpoint: %w", err)
			}
			return driver.ServeHealth(ctx, listener, manager.Ready)
		})
	}
	if opts.register {
		registration, err := newRegistration(opts, logger)
		if err != nil {
			return err
		}
		group.Go(func() error { return registration.Serve(ctx) })
	}
	logger.Info("Started", "version", version, "driver", opts.driverName, "node", opts.nodeID, "endpoint", opts.endpoint)
	return group.Wait()
}

// lockDataRoot locks the data root. It waits for an earlier process that is still stopping.
func lockDataRoot(ctx context.Context, path string) (*dataroot.Lock, error) {
	for {
		lock, err := dataroot.Acquire(path)
		if !errors.Is(err, dataroot.ErrInUse) {
			return lock, err
		}
		klog.FromContext(ctx).Info("Waiting for another process to end", "reason", err.Error())
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Second):
		}
	}
}

// probeKernel finds out what the kernel can do, once.
func probeKernel(dataRoot string, opts options) (overlay.Features, error) {
	dir := filepath.Join(dataRoot, dataroot.Mounter)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return overlay.Features{}, fmt.Errorf("make the mounter's directory: %w", err)
	}
	features, err := overlay.Probe(dir)
	if err != nil {
		return overlay.Features{}, err
	}
	if features, err = features.Without(opts.disabledFeatures...); err != nil {
		return overlay.Features{}, fmt.Errorf("--disable-kernel-features: %w", err)
	}
	klog.Background().Info("Probed the kernel", "features", features.String(), "fallbacks", features.Fallbacks())
	return features, nil
}

func newMounter(dataRoot string, features overlay.Features) (*overlay.Mounter, error) {
	dir := filepath.Join(dataRoot, dataroot.Mounter)
	return overlay.NewMounter(overlay.Config{Dir: dir, Features: features, MountUtils: mount.NewWithoutSystemd(""), Commands: exec.New()})
}

func newManager(
	root *dataroot.Root, records *record.Store, mounter *overlay.Mounter, detached *overlay.DetachedRoot, api kubeapi.Reader,
	layers *store.Store, opts options,
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
	backends := upper.NewBackends(upper.Config{
		Root:     root.Dir(),
		MountDir: opts.upperMountDir,
		Discard:  root.Discard,
		Commands: exec.New(),
		Mounter:  mounter,
		InUse:    volume.UpperInUse(records),
	})
	klog.Background().Info("Volume size enforcement", "backends", backends.Enforcing())
	return volume.NewManager(volume.Config{
		Node:              opts.nodeID,
		BootID:            bootID,
		ReconcileInterval: opts.reconcile,
		Overcommit:        opts.overcommit,
		Root:              root,
		Records:           records,
		Mounter:           mounter,
		Layers:            layer.NewResolver(roots, podVolumes, layers),
		PodVolumes:        podVolumes,
		Pods:              kubeletDir,
		Backends:          backends,
	}), nil
}

// newStore opens the layer store.
func newStore(ctx context.Context, root *dataroot.Root, records *record.Store, opts options) (*store.Store, error) {
	if opts.registry.CredentialsFile != "" {
		if _, err := registry.ReadCredentials(opts.registry.CredentialsFile); err != nil {
			return nil, fmt.Errorf("--registry-config: %w", err)
		}
	}
	return store.New(ctx, root, records, registry.NewClient(opts.registry), opts.store)
}

// newAPI returns a reader of the API server. There may be none to read.
func newAPI(opts options) (kubeapi.Reader, error) {
	api, err := kubeapi.New(opts.kubeconfig)
	if err != nil && opts.kubeconfig != "" {
		return nil, fmt.Errorf("--kubeconfig: %w", err)
	}
	if api == (kubeapi.None{}) {
		klog.Background().Info("No API server: volume:// finds no claims of a pod, and claims cannot name their layers")
	}
	return api, err
}

func newRegistration(opts options, logger klog.Logger) (*driver.Server, error) {
	csiSocket := opts.registrationPath
	if csiSocket == "" {
		var err error
		if csiSocket, err = driver.SocketPath(opts.endpoint); err != nil {
			return nil, err
		}
	}
	server, err := driver.NewServer(filepath.Join(opts.kubeletDir, "plugins_registry", opts.driverName+"-reg.sock"), logger)
	if err != nil {
		return nil, err
	}
	registerapi.RegisterRegistrationServer(server, kubelet.NewRegistration(opts.driverName, csiSocket))
	return server, nil
}
