package main

import (
	"context"
	"path/filepath"

	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/overlay-csi/overlay-csi/pkg/driver"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/metrics"
)

// registrar registers the driver with kubelet. With --register=false it has no server, and somebody else does that.
type registrar struct {
	registration *kubelet.Registration
	server       *driver.Server
}

func newRegistrar(ctx context.Context, opts options, measured *metrics.Metrics) (*registrar, error) {
	if !opts.register {
		return &registrar{}, nil
	}
	csiSocket := opts.registrationPath
	if csiSocket == "" {
		var err error
		if csiSocket, err = driver.SocketPath(opts.endpoint); err != nil {
			return nil, err
		}
	}
	socket := filepath.Join(opts.kubeletDir, "plugins_registry", opts.driverName+"-reg.sock")
	server, err := driver.NewServer(socket, klog.FromContext(ctx), measured)
	if err != nil {
		return nil, err
	}
	registration := kubelet.NewRegistration(opts.driverName, csiSocket)
	server.OnRemake = registration.Reset
	registerapi.RegisterRegistrationServer(server, registration)
	return &registrar{registration: registration, server: server}, nil
}

// run serves the socket by which kubelet finds the driver, until ctx is done.
func (r *registrar) run(ctx context.Context) error {
	if r.server == nil {
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { r.registration.Run(ctx, r.server.Renew); return nil })
	group.Go(func() error { return r.server.Serve(ctx) })
	return group.Wait()
}

// check returns an error that says why kubelet does not have the driver.
func (r *registrar) check() error {
	if r.server == nil {
		return nil
	}
	if err := r.server.Check(); err != nil {
		return err
	}
	return r.registration.Registered()
}
