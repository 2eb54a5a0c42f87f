package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes/scheme"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/driver"
	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/kubeapi"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/metrics"
	"github.com/overlay-csi/overlay-csi/pkg/overlaynode"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
)

// cleanInterval is the time between two looks for nodes that are gone.
const cleanInterval = time.Minute

// keepBytesOfGone is how many bytes the requests may take that wait for nodes that are gone: about 30,000 deletions.
const keepBytesOfGone = 16 << 20

// runController creates the central controller's objects, and serves until ctx is done.
func runController(ctx context.Context, opts controllerOptions) error {
	config, err := kubeapi.Config(opts.kubeconfig)
	if err != nil {
		return fmt.Errorf("find the API server: %w; run the controller in a pod with a ServiceAccount or set --kubeconfig", err)
	}
	config.UserAgent = "overlay-csi-controller/" + version
	// The controller makes a few requests for each call of the provisioner, which has a limit of its own. With the default of 5 a second
	// it would be the one that counts.
	config.QPS = -1
	api, err := kubeapi.NewClient(config)
	if err != nil {
		return err
	}
	client, err := overlaynode.NewClient(config, opts.namespace, opts.driverName)
	if err != nil {
		return err
	}
	recorder, stop, err := newRecorder(ctx, config, opts.driverName)
	if err != nil {
		return err
	}
	defer stop()
	dispatcher := overlaynode.NewDispatcher(ctx, client)
	gone := &overlaynode.GoneNodes{Dispatcher: dispatcher, Exists: api.NodeExists, Grace: opts.gracePeriod, KeepBytes: keepBytesOfGone}
	measured := metrics.New(version)
	server, err := driver.NewServer(opts.endpoint, klog.FromContext(ctx), measured)
	if err != nil {
		return err
	}
	registries, documents := registry.NewClient(opts.registry), image.NewDocuments()
	csi.RegisterIdentityServer(server, driver.NewIdentity(opts.driverName, version, func() bool { return true }))
	csi.RegisterNodeServer(server, driver.CentralNode{})
	csi.RegisterControllerServer(server, driver.NewCentral(driver.CentralConfig{
		DriverName: opts.driverName,
		Nodes:      dispatcher,
		Gone:       gone,
		Cluster:    api,
		Tags:       layer.NewTags(registry.NewTags(registries, documents)),
		Portable:   portable.NewRegistry(registries, documents),
		Events:     recorder,
	}))

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Serve(ctx) })
	group.Go(func() error { cleanGoneNodes(ctx, gone); return nil })
	if opts.httpEndpoint != "" {
		listener, err := net.Listen("tcp", opts.httpEndpoint)
		if err != nil {
			return fmt.Errorf("--http-endpoint: %w", err)
		}
		group.Go(func() error {
			return driver.ServeHTTP(ctx, listener, driver.HTTPConfig{
				Ready: server.Check, Metrics: measured.Handler(), Profiles: opts.profiles,
			})
		})
	}
	klog.FromContext(ctx).Info("Started", logVersion, version, logDriver, opts.driverName, logEndpoint, opts.endpoint)
	return group.Wait()
}

// newNodeRecorder returns a recorder of events, nil without an API server.
func newNodeRecorder(ctx context.Context, opts options) (_ record.EventRecorder, stop func(), err error) {
	config, err := kubeapi.Config(opts.kubeconfig)
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, func() {}, nil
	}
	if err != nil {
		return nil, nil, err
	}
	return newRecorder(ctx, config, opts.driverName)
}

// newRecorder returns a recorder of events. stop has it send no more.
func newRecorder(ctx context.Context, config *rest.Config, driverName string) (_ record.EventRecorder, stop func(), err error) {
	client, err := corev1client.NewForConfig(config)
	if err != nil {
		return nil, nil, fmt.Errorf("create a client of the API server for events: %w", err)
	}
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	broadcaster.StartRecordingToSink(&corev1client.EventSinkImpl{Interface: client.Events("")})
	return broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: driverName}), broadcaster.Shutdown, nil
}

// cleanGoneNodes removes what nodes that are gone have left in the API server, until ctx is done.
func cleanGoneNodes(ctx context.Context, gone *overlaynode.GoneNodes) {
	wait.UntilWithContext(ctx, func(ctx context.Context) {
		if err := gone.Clean(ctx); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Could not clean up after nodes that are gone")
		}
	}, cleanInterval)
}
