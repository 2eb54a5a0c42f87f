package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"
)

// readHeaderTimeout bounds how long a client may take to send its request's header.
const readHeaderTimeout = 5 * time.Second

// HTTPConfig has what is served over HTTP.
type HTTPConfig struct {
	// Ready returns an error that says why the driver is not ready.
	Ready func() error
	// Metrics serves /metrics.
	Metrics http.Handler
	// Profiles has profiles served beneath /debug/pprof/ (net/http/pprof).
	Profiles bool
}

// ServeHTTP serves on listener until ctx is done, and closes listener. /healthz answers 200 until then. /readyz answers 503 while the
// driver is not ready, with the error's text.
func ServeHTTP(ctx context.Context, listener net.Listener, config HTTPConfig) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := config.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("GET /metrics", config.Metrics)
	if config.Profiles {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: readHeaderTimeout}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve HTTP on %s: %w", listener.Addr(), err)
	}
	return nil
}
