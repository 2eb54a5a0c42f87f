package kubelet

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"time"
	"unicode"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/klog/v2"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
	"k8s.io/utils/clock"
)

// csiVersion is the version of the CSI specification that kubelet gets. It accepts any 1.x.
const csiVersion = "1.0.0"

// logDriver is the log key of the driver's name.
const logDriver = "driver"

// maxReason is how many bytes of kubelet's reason to refuse the driver are kept.
const maxReason = 1 << 10

// errNotAsked means that kubelet has not answered yet since the socket was made.
var errNotAsked = errors.New("kubelet has not registered the driver yet")

// Registration serves kubelet's plugin watcher, which makes node-driver-registrar unnecessary. Kubelet finds its socket in
// <kubelet>/plugins_registry, gets the driver's name and CSI socket, and reports whether it accepted the driver
// (k8s.io/kubelet/pkg/apis/pluginregistration/v1). Kubelet drops the driver when the socket is removed.
type Registration struct {
	registerapi.UnimplementedRegistrationServer
	driverName string
	endpoint   string
	// refused gets a value when kubelet refuses the driver.
	refused chan struct{}

	mu sync.Mutex
	// status is nil if kubelet has the driver, or says why it does not.
	status error
}

// NewRegistration returns the registration of a driver. endpoint is the path of its CSI socket as kubelet sees it.
func NewRegistration(driverName, endpoint string) *Registration {
	return &Registration{driverName: driverName, endpoint: endpoint, refused: make(chan struct{}, 1), status: errNotAsked}
}

// Registered returns nil if kubelet has the driver, or an error of at most about 1 KiB that says why it does not.
func (r *Registration) Registered() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}

// Reset makes Registered wait for kubelet's next answer. It is called before the socket is made again. A refusal stays known until then.
func (r *Registration) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.status == nil {
		r.status = errNotAsked
	}
}

func (r *Registration) set(status error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status = status
}

// Run calls renew, which makes the socket again, some time after kubelet has refused the driver: kubelet asks a socket once, and only
// newer versions try again by themselves. The time between two calls grows to five minutes. Run returns when ctx is done.
func (r *Registration) Run(ctx context.Context, renew func()) {
	delay := wait.Backoff{Duration: time.Second, Factor: 2, Steps: math.MaxInt32, Cap: 5 * time.Minute}.
		DelayWithReset(clock.RealClock{}, time.Hour)
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.refused:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay()):
		}
		// Kubelet may have tried again by itself.
		if err := r.Registered(); err != nil && !errors.Is(err, errNotAsked) {
			renew()
		}
	}
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

// NotifyRegistrationStatus takes and logs kubelet's answer, whether it accepted the driver.
func (r *Registration) NotifyRegistrationStatus(
	ctx context.Context, status *registerapi.RegistrationStatus,
) (*registerapi.RegistrationStatusResponse, error) {
	if status.PluginRegistered {
		r.set(nil)
		klog.FromContext(ctx).Info("Kubelet registered the driver", logDriver, r.driverName)
	} else {
		err := fmt.Errorf("kubelet refused the driver: %s", clean(status.Error))
		r.set(err)
		klog.FromContext(ctx).Error(err, "Driver not registered", logDriver, r.driverName)
		select {
		case r.refused <- struct{}{}:
		default:
		}
	}
	return &registerapi.RegistrationStatusResponse{}, nil
}

// clean returns the first maxReason bytes of a text, without control characters.
func clean(text string) string {
	if len(text) > maxReason {
		text = text[:maxReason] + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, strings.ToValidUTF8(text, ""))
}
