package driver

import (
	"context"
	"fmt"
	"regexp"
	"runtime/debug"
	"time"

	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

// Keys of the line that is logged for each RPC.
const (
	logMethod   = "method"
	logVolume   = "volume"
	logPod      = "pod"
	logTarget   = "target"
	logDuration = "duration"
	logCode     = "code"
	logRequest  = "request"
)

// Verbosity: an RPC that changes something is logged always, one that only asks from 4 on, the request's text, with
// secrets left out, from 6 on.
const (
	verbosityAsking  = 4
	verbosityRequest = 6
)

// withStatus turns the errors of handlers into statuses, and a panic into an error.
func withStatus(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (response any, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			klog.FromContext(ctx).Error(fmt.Errorf("%v", cause), "A handler panicked", "stack", string(debug.Stack()))
			err = toStatus(fmt.Errorf("the driver failed in itself (%v): its log has the place: report it", cause))
		}
	}()
	response, err = handler(ctx, req)
	return response, toStatus(err)
}

// withLog logs one line for each RPC, and gives the handler a logger that names the volume and the pod.
func withLog(logger klog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		begin := time.Now()
		logger := logger.WithValues(about(req)...)
		if v := logger.V(verbosityRequest); v.Enabled() {
			v.Info("Request", logMethod, info.FullMethod, logRequest, protosanitizer.StripSecrets(req).String())
		}
		response, err := handler(klog.NewContext(ctx, logger), req)
		values := []any{logMethod, info.FullMethod, logDuration, time.Since(begin).String(), logCode, status.Code(err).String()}
		switch {
		case err != nil:
			logger.Error(err, "RPC", values...)
		case !asking.MatchString(info.FullMethod):
			logger.Info("RPC", values...)
		default:
			logger.V(verbosityAsking).Info("RPC", values...)
		}
		return response, err
	}
}

// asking begins the names of RPCs that change nothing, behind the name of their service.
var asking = regexp.MustCompile(`/(Get|NodeGet|ControllerGet|Validate|List|ControllerList|Probe)[^/]*$`)

// about is what a request says of volume, pod and target, as log values.
func about(req any) []any {
	var values []any
	if r, ok := req.(interface{ GetVolumeId() string }); ok {
		values = append(values, logVolume, r.GetVolumeId())
	} else if r, ok := req.(interface{ GetName() string }); ok {
		values = append(values, logVolume, r.GetName())
	}
	if r, ok := req.(interface{ GetVolumeContext() map[string]string }); ok {
		if pod := r.GetVolumeContext()[keyPodName]; pod != "" {
			values = append(values, logPod, klog.KRef(r.GetVolumeContext()[keyPodNamespace], pod))
		}
	}
	if r, ok := req.(interface{ GetTargetPath() string }); ok {
		values = append(values, logTarget, r.GetTargetPath())
	}
	return values
}
