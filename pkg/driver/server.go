package driver

import (
	"context"
	"fmt"
	"math"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"
)

// socketInterval is the time between two looks whether the socket is there.
const socketInterval = 2 * time.Second

// remakeDelay returns the times between two tries to make a lost socket again. They grow, so that whatever removes the socket again
// and again does not keep kubelet busy.
func remakeDelay() wait.DelayFunc {
	return wait.Backoff{Duration: socketInterval, Factor: 2, Steps: math.MaxInt32, Cap: 5 * time.Minute}.
		DelayWithReset(clock.RealClock{}, time.Hour)
}

// logSocket is the log key of the path of a socket.
const logSocket = "socket"

// stopTimeout is how long a stopping server waits for RPCs that have begun.
const stopTimeout = 20 * time.Second

const (
	streamWorkers = 8
	// windowSize is gRPC's own default in bytes. CSI's messages are far smaller.
	windowSize = 1 << 16
)

// Server serves gRPC on a unix socket.
type Server struct {
	*grpc.Server
	// OnRemake, if it is set before Serve, is called before the socket is made again.
	OnRemake func()

	path  string
	renew chan struct{}
	// problem is why clients do not find the socket, nil if they do.
	problem atomic.Pointer[error]
}

// rpcObserver learns of each RPC that has ended, by the name of its method without the service.
type rpcObserver interface {
	RPCEnded(method, code string, duration time.Duration)
}

// NewServer returns a server on the socket that endpoint names (unix:///path or /path). It logs to logger, and observer learns of each
// RPC. Services must be registered before Serve.
func NewServer(endpoint string, logger klog.Logger, observer rpcObserver) (*Server, error) {
	path, err := SocketPath(endpoint)
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer(
		grpc.ChainUnaryInterceptor(withLog(logger, observer), withStatus),
		// Workers reuse their stacks, and windows of a fixed size need no pings that measure the socket. Together they
		// save an eighth of an RPC's time. If all workers are busy, an RPC gets a goroutine of its own.
		grpc.NumStreamWorkers(streamWorkers),
		grpc.StaticStreamWindowSize(windowSize),
		grpc.StaticConnWindowSize(windowSize),
	)
	return &Server{Server: server, path: path, renew: make(chan struct{}, 1)}, nil
}

// SocketPath returns the path of the socket that an endpoint names.
func SocketPath(endpoint string) (string, error) {
	path := strings.TrimPrefix(endpoint, "unix://")
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("endpoint %q is not unix:// and an absolute path", endpoint)
	}
	return path, nil
}

// Serve serves RPCs until ctx is done. It then waits for RPCs that have begun, and removes the socket. It makes the socket again if
// another process has removed or replaced it, unless that process listens on one of its own; Check reports that.
func (s *Server) Serve(ctx context.Context) error {
	current, err := listen(s.path)
	if err != nil {
		return err
	}
	served := s.serveOn(current)
	delay := remakeDelay()
	// The file is looked at, and not watched by inotify(7): a watch is lost with the directory, and whether the file that is there now
	// is this process's must be looked at in any case.
	look := time.NewTimer(socketInterval)
	defer look.Stop()
	for {
		renew := false
		select {
		case <-ctx.Done():
			current.remove()
			timer := time.AfterFunc(stopTimeout, s.Stop)
			defer timer.Stop()
			s.GracefulStop()
			return nil
		case err := <-served:
			current.remove()
			return fmt.Errorf("serve on %s: %w", s.path, err)
		case <-s.renew:
			renew = true
		case <-look.C:
		}
		next := socketInterval
		switch {
		case current.isThere() && !renew:
			s.setProblem(ctx, nil)
		case !current.isThere() && current.isTaken(ctx):
			s.setProblem(ctx, fmt.Errorf("the socket %s belongs to another process; end that, or give one of the two another --driver-name",
				s.path))
		default:
			if !renew {
				next = delay()
			}
			current, served = s.replace(ctx, current, served)
		}
		look.Reset(next)
	}
}

// Renew has Serve make the socket again, although it is there: kubelet asks a registration socket once.
func (s *Server) Renew() {
	select {
	case s.renew <- struct{}{}:
	default:
		// It is asked for already.
	}
}

// Check returns an error that says why clients do not find the socket.
func (s *Server) Check() error {
	if problem := s.problem.Load(); problem != nil {
		return *problem
	}
	return nil
}

// setProblem stores what Check returns, and logs it if it is new.
func (s *Server) setProblem(ctx context.Context, err error) {
	if err == nil {
		s.problem.Store(nil)
		return
	}
	if old := s.problem.Swap(&err); old == nil || (*old).Error() != err.Error() {
		klog.FromContext(ctx).Error(err, "Clients do not find the socket", logSocket, s.path)
	}
}

// serveOn serves RPCs on a socket. The channel gets the error with which that ends.
func (s *Server) serveOn(listener net.Listener) <-chan error {
	served := make(chan error, 1)
	go func() { served <- s.Server.Serve(listener) }()
	return served
}

// replace makes the socket again and serves on it. It returns the old one if that is not possible.
func (s *Server) replace(ctx context.Context, old *socket, served <-chan error) (*socket, <-chan error) {
	if s.OnRemake != nil {
		s.OnRemake()
	}
	made, err := listen(s.path)
	if err != nil {
		s.setProblem(ctx, fmt.Errorf("make the socket again: %w", err))
		return old, served
	}
	s.setProblem(ctx, nil)
	klog.FromContext(ctx).Info("Socket made again", logSocket, s.path)
	served = s.serveOn(made)
	// RPCs that came by the old socket go on.
	old.Close()
	return made, served
}
