package driver

import (
	"context"
	"errors"
	"syscall"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// kinds maps errors to the codes that the CSI specification has for them ("Error Scheme"). The first row that matches
// applies. Kubelet assumes that an operation may still be running after Aborted, Canceled, DeadlineExceeded,
// ResourceExhausted and Unavailable, and that it did nothing after any other code.
var kinds = []struct {
	is   func(error) bool
	code codes.Code
	hint string
}{
	{is: isA(context.DeadlineExceeded), code: codes.DeadlineExceeded},
	{is: isA(context.Canceled), code: codes.Canceled},
	{is: errdefs.IsInvalidArgument, code: codes.InvalidArgument},
	{is: errdefs.IsNotImplemented, code: codes.InvalidArgument},
	{is: errdefs.IsAlreadyExists, code: codes.AlreadyExists},
	{is: errdefs.IsOutOfRange, code: codes.OutOfRange},
	{is: errdefs.IsAborted, code: codes.Aborted},
	{is: errdefs.IsDataLoss, code: codes.DataLoss},
	{is: isA(syscall.ENOSPC), code: codes.ResourceExhausted, hint: "free space or inodes there"},
	{is: isA(syscall.EDQUOT), code: codes.ResourceExhausted, hint: "raise the quota there"},
	{is: errdefs.IsResourceExhausted, code: codes.ResourceExhausted},
	{is: isA(syscall.EROFS), code: codes.FailedPrecondition, hint: "it is mounted read-only; if that is not intended, see the kernel log"},
	{is: errdefs.IsFailedPrecondition, code: codes.FailedPrecondition},
	{is: errdefs.IsUnauthorized, code: codes.Unauthenticated},
	{is: errdefs.IsPermissionDenied, code: codes.PermissionDenied},
	{is: errdefs.IsUnavailable, code: codes.Unavailable},
	{is: errdefs.IsNotFound, code: codes.NotFound},
}

func isA(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

// toStatus converts an error into a gRPC status. No other function does that. It returns a status of gRPC itself unchanged.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	for _, kind := range kinds {
		if !kind.is(err) {
			continue
		}
		message := err.Error()
		if kind.hint != "" {
			message += "; " + kind.hint
		}
		return status.Error(kind.code, message)
	}
	return status.Error(codes.Internal, err.Error())
}
