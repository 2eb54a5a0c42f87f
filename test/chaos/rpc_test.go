package chaos

import (
	"context"
	"errors"
	"math"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// transient are the answers after which a caller tries again, whatever the node is like.
var transient = []codes.Code{codes.Unavailable, codes.Aborted, codes.DeadlineExceeded, codes.Canceled}

// answers are further answers that a fault permits.
var answers = map[fault][]codes.Code{
	fullDisk:      {codes.ResourceExhausted},
	noInodes:      {codes.ResourceExhausted},
	readOnlyDisk:  {codes.FailedPrecondition},
	failedDisk:    {codes.Internal, codes.FailedPrecondition, codes.DataLoss},
	lyingRegistry: {codes.FailedPrecondition},
}

// The RPCs of a published volume. A power cut amid one would leave nothing to repeat it on.
const (
	expandVolume   = "NodeExpandVolume"
	getVolumeStats = "NodeGetVolumeStats"
)

// call makes an RPC until it is answered with OK, as kubelet and the sidecars do. The first time, the driver may be killed
// meanwhile, or the caller may hang up, or another may call beside it. Where a fault stands in the way, call returns the last error.
func (w *world) call(what string, do func(ctx context.Context) error) error {
	w.t.Helper()
	err := w.interfered(what, do)
	end := time.Now().Add(time.Minute)
	for tries := 0; err != nil; tries++ {
		w.judge(what, err)
		if w.fault != noFault && tries >= 2 {
			return err
		}
		if time.Now().After(end) {
			w.fatalf("%s is not answered with OK: %v", what, err)
		}
		time.Sleep(5 * time.Millisecond)
		err = w.once(do)
	}
	return nil
}

// mustCall is call for what no fault may stand in the way of.
func (w *world) mustCall(what string, do func(ctx context.Context) error) {
	w.t.Helper()
	w.eventually(what, func() error { return w.call(what, do) })
}

// mayRefuse is call for what the driver may also refuse for good, where may says so of the error. It returns that error.
func (w *world) mayRefuse(what string, may func(error) bool, do func(ctx context.Context) error) (refused, err error) {
	w.t.Helper()
	var last atomic.Pointer[error]
	err = w.call(what, func(ctx context.Context) error {
		err := do(ctx)
		last.Store(nil)
		if err != nil && may(err) {
			last.Store(&err)
			return nil
		}
		return err
	})
	if refusal := last.Load(); refusal != nil && err == nil {
		w.tell("  refused: %.300v", *refusal)
		w.total.refused++
		return *refusal, nil
	}
	return nil, err
}

// judge fails the test where an RPC is answered as nothing here explains.
func (w *world) judge(what string, err error) {
	w.t.Helper()
	if code := status.Code(err); !slices.Contains(transient, code) && !slices.Contains(answers[w.fault], code) {
		w.fatalf("%s: %v", what, err)
	}
}

// start makes an RPC in the background.
func (w *world) start(do func(ctx context.Context) error) <-chan error {
	w.total.rpcs++
	result := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
		defer cancel()
		result <- do(ctx)
	}()
	return result
}

// once makes an RPC with less than kubelet's patience.
func (w *world) once(do func(ctx context.Context) error) error {
	w.total.rpcs++
	timeout := 30 * time.Second
	if registryFaults[w.fault] != nil {
		timeout = time.Second
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), timeout)
	defer cancel()
	return do(ctx)
}

// interfered makes an RPC once, and may interfere with it.
func (w *world) interfered(what string, do func(ctx context.Context) error) error {
	// RPCs take between a fraction of a millisecond and seconds: each order of magnitude is as likely as the next.
	moment := time.Duration(float64(100*time.Microsecond) * math.Pow(1000, w.random.Float64()))
	switch choice := w.random.IntN(20); {
	case choice < 2 && w.fault != failedDisk:
		w.tell("  killed during %s", what)
		result := w.start(do)
		time.Sleep(moment)
		w.noteMemory()
		must(w.t, w.node.Kill())
		w.total.kills++
		err := <-result
		must(w.t, w.node.Start(w.t.Context()))
		return err
	case choice == 2 && w.fault == noFault && !slices.Contains([]string{expandVolume, getVolumeStats}, what):
		w.tell("  the power is cut during %s", what)
		result := w.start(do)
		time.Sleep(moment)
		w.cutPower()
		<-result
		return status.Error(codes.Unavailable, "the power was cut")
	case choice == 3 || choice == 4:
		w.tell("  hung up during %s", what)
		ctx, cancel := context.WithTimeout(w.t.Context(), moment)
		defer cancel()
		w.total.rpcs++
		// Kubelet does not know whether it was done.
		return errors.Join(do(ctx), status.Error(codes.Canceled, "the caller hung up"))
	case choice == 5 || choice == 6:
		w.tell("  twice at once: %s", what)
		result := w.start(do)
		err := w.once(do)
		if twin := <-result; twin != nil {
			w.judge(what, twin)
		}
		return err
	}
	return w.once(do)
}
