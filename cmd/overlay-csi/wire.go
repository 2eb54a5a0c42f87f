package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
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
	"github.com/overlay-csi/overlay-csi/pkg/driver"
	"github.com/overlay-csi/overlay-csi/pkg/kubeapi"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// run makes the driver's objects, one on top of the other, and serves until ctx is done.
func run(ctx context.Context, opts options) error {
	logger := klog.FromContext(ctx)
	root, err := takeDataRoot(ctx, opts.dataRoot)
	if err != nil {
		return err
	}
	defer root.Close()
	features, err := probeKernel(root.Path(), opts)
	if err != nil {
		return err
	}
	mounter, err := newMounter(root.Path(), features)
	if err != nil {
		return err
	}
	defer mounter.Close()
	detached, err := overlay.NewDetachedRoot(features)
	if err != nil {
		logger.Info("Layers are used on the mounts that they are on", "reason", err.Error())
		detached = &overlay.DetachedRoot{}
	}
	defer detached.Close()
	if quiet := detached.Reopen(root.Dir()); quiet != nil {
		root.UseMount(quiet)
	}
	api, err := newAPI(opts)
	if err != nil {
		return err
	}
	layers, err := newStore(ctx, root, opts)
	if err != nil {
		return err
	}
	defer layers.Close()
	manager, err := newManager(root, mounter, detached, api, layers, opts)
	if err != nil {
		return err
	}

	server, err := driver.NewServer(opts.endpoint, logger)
	if err != nil {
		return err
	}
	csi.RegisterIdentityServer(server, driver.NewIdentity(opts.driverName, version, manager.Ready))
	csi.RegisterControllerServer(server, driver.NewController(opts.driverName, opts.nodeID, manager, api, opts.volumeHealth))
	csi.RegisterNodeServer(server, driver.NewNode(opts.driverName, opts.nodeID, manager, opts.allowedMountOptions, opts.volumeHealth))

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { manager.Run(ctx); return nil })
	group.Go(func() error { layers.Run(ctx); return nil })
	group.Go(func() error { return admin.Serve(ctx, opts.adminSocket, admin.NewHandler(layers, manager)) })
	group.Go(func() error { return server.Serve(ctx) })
	if opts.httpEndpoint != "" {
		group.Go(func() error { return serveHealth(ctx, opts.httpEndpoint, manager.Ready) })
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

// takeDataRoot waits for a predecessor that is still stopping: only one process works on a data root.
func takeDataRoot(ctx context.Context, path string) (*volume.DataRoot, error) {
	for {
		root, err := volume.OpenDataRoot(path)
		if !errors.Is(err, volume.ErrInUse) {
			return root, err
		}
		klog.FromContext(ctx).Info("Waiting for another process to end", "reason", err.Error())
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Second):
		}
	}
}

// mounterName is the directory of the data root that the mounter works in.
const mounterName = "mounter"

// probeKernel finds out what the kernel can do, once.
func probeKernel(dataRoot string, opts options) (overlay.Features, error) {
	dir := filepath.Join(dataRoot, mounterName)
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
	dir := filepath.Join(dataRoot, mounterName)
	return overlay.NewMounter(overlay.Config{Dir: dir, Features: features, MountUtils: mount.NewWithoutSystemd(""), Commands: exec.New()})
}

func newManager(root *volume.DataRoot, mounter *overlay.Mounter, detached *overlay.DetachedRoot, api kubeapi.Reader,
	layers *store.Store, opts options) (*volume.Manager, error) {
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
	bootID, err := volume.BootID()
	if err != nil {
		return nil, err
	}
	backends := upper.NewBackends(upper.Config{
		Root:     root.Dir(),
		MountDir: opts.upperMountDir,
		Discard:  root.Discard,
		Commands: exec.New(),
		Mounter:  mounter,
		InUse:    volume.UpperInUse(root),
	})
	klog.Background().Info("Volume size enforcement", "backends", backends.Enforcing())
	config := volume.Config{Node: opts.nodeID, BootID: bootID, ReconcileInterval: opts.reconcile, Overcommit: opts.overcommit}
	return volume.NewManager(config, root, mounter, layer.NewResolver(roots, podVolumes, layers), podVolumes, kubeletDir, backends), nil
}

// newStore opens the layer store.
func newStore(ctx context.Context, root *volume.DataRoot, opts options) (*store.Store, error) {
	if opts.registry.CredentialsFile != "" {
		if _, err := registry.ReadCredentials(opts.registry.CredentialsFile); err != nil {
			return nil, fmt.Errorf("--registry-config: %w", err)
		}
	}
	return store.New(ctx, root, volume.NewRecords(root), registry.NewClient(opts.registry), opts.store)
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

// serveHealth answers /healthz while the process lives and /readyz once the driver works.
func serveHealth(ctx context.Context, address string, ready func() bool) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !ready() {
			http.Error(w, "making good what an earlier process left", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("--http-endpoint: %w", err)
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve /healthz and /readyz: %w", err)
	}
	return nil
}
