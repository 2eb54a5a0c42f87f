package driver

import (
	"context"
	"errors"
	"syscall"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// kinds are the meanings of errors below this package and the codes that the CSI specification has for them ("Error
// Scheme"). The first that fits counts. Kubelet takes Aborted, Canceled, DeadlineExceeded, ResourceExhausted and
// Unavailable for an operation that may be going on, and everything else for one that did nothing.
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
	{is: isA(syscall.EROFS), code: codes.FailedPrecondition, hint: "it is mounted read-only: the kernel log says why, if nobody meant it"},
	{is: errdefs.IsFailedPrecondition, code: codes.FailedPrecondition},
	{is: errdefs.IsUnauthorized, code: codes.Unauthenticated},
	{is: errdefs.IsPermissionDenied, code: codes.PermissionDenied},
	{is: errdefs.IsUnavailable, code: codes.Unavailable},
	{is: errdefs.IsNotFound, code: codes.NotFound},
}

func isA(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

// toStatus turns an error into a gRPC status: the one place where that is done. An error that already is a status, of
// gRPC itself, stays what it is.
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
			message += ": " + kind.hint
		}
		return status.Error(kind.code, message)
	}
	return status.Error(codes.Internal, err.Error())
}
