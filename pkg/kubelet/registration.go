package kubelet

import (
	"context"
	"errors"

	"k8s.io/klog/v2"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// csiVersion is the version of the CSI specification that kubelet gets. It accepts any 1.x.
const csiVersion = "1.0.0"

// logDriver is the log key of the driver's name.
const logDriver = "driver"

// Registration serves kubelet's plugin watcher, which makes node-driver-registrar unnecessary. Kubelet finds its socket in
// <kubelet>/plugins_registry, gets the driver's name and CSI socket, and reports whether it accepted the driver
// (k8s.io/kubelet/pkg/apis/pluginregistration/v1).
type Registration struct {
	registerapi.UnimplementedRegistrationServer
	driverName string
	endpoint   string
}

// NewRegistration returns the registration of a driver. endpoint is the path of its CSI socket as kubelet sees it.
func NewRegistration(driverName, endpoint string) *Registration {
	return &Registration{driverName: driverName, endpoint: endpoint}
}

// GetInfo returns the driver's name and CSI socket.
func (r *Registration) GetInfo(ctx context.Context, _ *registerapi.InfoRequest) (*registerapi.PluginInfo, error) {
	return &registerapi.PluginInfo{
		Type:              registerapi.CSIPlugin,
		Name:              r.driverName,
		Endpoint:          r.endpoint,
		SupportedVersions: []string{csiVersion},
	}, nil
}

// NotifyRegistrationStatus logs whether kubelet accepted the driver.
func (r *Registration) NotifyRegistrationStatus(
	ctx context.Context, status *registerapi.RegistrationStatus,
) (*registerapi.RegistrationStatusResponse, error) {
	if !status.PluginRegistered {
		klog.FromContext(ctx).Error(errors.New(status.Error), "Kubelet refused the driver", logDriver, r.driverName)
	} else {
		klog.FromContext(ctx).Info("Kubelet registered the driver", logDriver, r.driverName)
	}
	return &registerapi.RegistrationStatusResponse{}, nil
}
