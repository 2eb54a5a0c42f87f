package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestToStatus(t *testing.T) {
	invalid := fmt.Errorf("%w: unknown key", errdefs.ErrInvalidArgument)
	disk := &os.PathError{Op: "mkdir", Path: "/data", Err: unix.ENOSPC}
	for name, c := range map[string]struct {
		err  error
		code codes.Code
		word string
	}{
		"wrapped kind":        {fmt.Errorf("publish: %w", invalid), codes.InvalidArgument, "unknown key"},
		"not implemented":     {fmt.Errorf("%w: oci", errdefs.ErrNotImplemented), codes.InvalidArgument, "oci"},
		"full disk":           {fmt.Errorf("write the state: %w", disk), codes.ResourceExhausted, "free space"},
		"quota":               {fmt.Errorf("x: %w", unix.EDQUOT), codes.ResourceExhausted, "quota"},
		"read-only":           {fmt.Errorf("x: %w", unix.EROFS), codes.FailedPrecondition, "read-only"},
		"pending":             {fmt.Errorf("%w: busy", errdefs.ErrAborted), codes.Aborted, "busy"},
		"deadline":            {fmt.Errorf("wait: %w", context.DeadlineExceeded), codes.DeadlineExceeded, "wait"},
		"canceled":            {fmt.Errorf("wait: %w", context.Canceled), codes.Canceled, "wait"},
		"joined":              {errors.Join(fmt.Errorf("%w: first", errdefs.ErrNotFound), errors.New("second")), codes.NotFound, "second"},
		"damaged state":       {fmt.Errorf("%w: x", errdefs.ErrDataLoss), codes.DataLoss, "x"},
		"something else":      {errors.New("surprise"), codes.Internal, "surprise"},
		"a status":            {status.Error(codes.Unimplemented, "no such method"), codes.Unimplemented, "no such method"},
		"I/O error of a disk": {fmt.Errorf("x: %w", unix.EIO), codes.Internal, "input/output error"},
	} {
		t.Run(name, func(t *testing.T) { wantStatus(t, c.err, c.code, c.word) })
	}
	if toStatus(nil) != nil {
		t.Error("toStatus(nil) is an error")
	}
}

func TestNodeTopology(t *testing.T) {
	long := strings.Repeat("n", 100)
	if got := nodeTopology("d", "node-1.example").GetSegments()["d/node"]; got != "node-1.example" {
		t.Errorf("the topology value is %q; want the node's name", got)
	}
	if got := nodeTopology("d", long).GetSegments()["d/node"]; len(got) != 40 || got == nodeTopology("d", long+"x").GetSegments()["d/node"] {
		t.Errorf("a name too long for a label is %q", got)
	}
}
