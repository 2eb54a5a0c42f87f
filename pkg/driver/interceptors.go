package driver

import (
	"context"
	"fmt"
	"path"
	"regexp"
	"runtime/debug"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

// Keys of log messages.
const (
	logMethod   = "method"
	logVolume   = "volume"
	logSnapshot = "snapshot"
	logPod      = "pod"
	logTarget   = "target"
	logNode     = "node"
	logDuration = "duration"
	logCode     = "code"
	logRequest  = "request"
	logStack    = "stack"
)

// An RPC that changes something is always logged. A read-only RPC and the text of a request, without its secrets, are
// logged from these verbosities on.
const (
	verbosityReadOnly = 4
	verbosityRequest  = 6
)

// withStatus converts the errors and panics of handlers into statuses.
func withStatus(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (response any, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			klog.FromContext(ctx).Error(fmt.Errorf("%v", cause), "A handler panicked", logStack, string(debug.Stack()))
			err = toStatus(fmt.Errorf("internal error: handler panicked: %v (see driver log)", cause))
		}
	}()
	response, err = handler(ctx, req)
	return response, toStatus(err)
}

// withLog logs each RPC, and has observer learn of it. The handler's context has a logger with the request's volume, pod and target.
func withLog(logger klog.Logger, observer rpcObserver) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		begin := time.Now()
		logger := logger.WithValues(requestLogValues(req)...)
		if v := logger.V(verbosityRequest); v.Enabled() {
			v.Info("Request", logMethod, info.FullMethod, logRequest, protosanitizer.StripSecrets(req).String())
		}
		response, err := handler(klog.NewContext(ctx, logger), req)
		took, code := time.Since(begin), status.Code(err).String()
		observer.RPCEnded(path.Base(info.FullMethod), code, took)
		values := []any{logMethod, info.FullMethod, logDuration, took.String(), logCode, code}
		switch {
		case err != nil:
			logger.Error(err, "RPC", values...)
		case !readOnlyRPC.MatchString(info.FullMethod):
			logger.Info("RPC", values...)
		default:
			logger.V(verbosityReadOnly).Info("RPC", values...)
		}
		return response, err
	}
}

// readOnlyRPC matches the full method names of RPCs that change nothing.
var readOnlyRPC = regexp.MustCompile(`/(Get|NodeGet|ControllerGet|Validate|List|ControllerList|Probe)[^/]*$`)

// requestLogValues returns the volume, the snapshot, the pod and the target of a request as log values.
func requestLogValues(req any) []any {
	var values []any
	if r, ok := req.(interface{ GetVolumeId() string }); ok {
		values = append(values, logVolume, r.GetVolumeId())
	} else if r, ok := req.(*csi.CreateSnapshotRequest); ok {
		values = append(values, logVolume, r.GetSourceVolumeId(), logSnapshot, r.GetName())
	} else if r, ok := req.(interface{ GetName() string }); ok {
		values = append(values, logVolume, r.GetName())
	} else if r, ok := req.(interface{ GetSnapshotId() string }); ok {
		values = append(values, logSnapshot, r.GetSnapshotId())
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
