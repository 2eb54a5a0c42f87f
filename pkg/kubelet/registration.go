package kubelet

import (
	"context"
	"fmt"
	"sync/atomic"

	"k8s.io/klog/v2"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// csiVersion is the version of the CSI specification that kubelet is told (it takes any 1.x).
const csiVersion = "1.0.0"

// Registration answers kubelet's plugin watcher, so that no node-driver-registrar is needed: kubelet finds its socket
// in <kubelet>/plugins_registry, asks for the driver's name and socket, and says whether it took the driver
// (k8s.io/kubelet/pkg/apis/pluginregistration/v1).
type Registration struct {
	registerapi.UnimplementedRegistrationServer
	driverName string
	endpoint   string
	registered atomic.Bool
}

// NewRegistration returns the answers for one driver. endpoint is the path of the CSI socket as kubelet sees it.
func NewRegistration(driverName, endpoint string) *Registration {
	return &Registration{driverName: driverName, endpoint: endpoint}
}

// GetInfo tells kubelet who is there.
func (r *Registration) GetInfo(ctx context.Context, _ *registerapi.InfoRequest) (*registerapi.PluginInfo, error) {
	return &registerapi.PluginInfo{
		Type:              registerapi.CSIPlugin,
		Name:              r.driverName,
		Endpoint:          r.endpoint,
		SupportedVersions: []string{csiVersion},
	}, nil
}

// NotifyRegistrationStatus takes kubelet's answer. Where kubelet refused, an operator has to see why.
func (r *Registration) NotifyRegistrationStatus(ctx context.Context, status *registerapi.RegistrationStatus) (*registerapi.RegistrationStatusResponse, error) {
	r.registered.Store(status.PluginRegistered)
	if !status.PluginRegistered {
		klog.FromContext(ctx).Error(fmt.Errorf("%s", status.Error), "Kubelet refused the driver", "driver", r.driverName)
	} else {
		klog.FromContext(ctx).Info("Kubelet registered the driver", "driver", r.driverName)
	}
	return &registerapi.RegistrationStatusResponse{}, nil
}

// Registered reports whether kubelet has taken the driver.
func (r *Registration) Registered() bool { return r.registered.Load() }
