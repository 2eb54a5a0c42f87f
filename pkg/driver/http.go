package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"
)

const (
	// readHeaderTimeout bounds how long a client may take to send its request's header.
	readHeaderTimeout = 5 * time.Second
	// answerTimeout bounds how long an answer may take, with the time that the client takes to read it. A profile takes that long beside
	// what the client asks for. Few scrapes are served at a time, and a client that does not read must not keep the others out.
	answerTimeout = 30 * time.Second
	// idleTimeout is how long a connection is kept between two requests: a scrape interval or two. Any pod can make connections, and each
	// takes a file descriptor of the driver.
	idleTimeout = 2 * time.Minute
)

// HTTPConfig has what is served over HTTP.
type HTTPConfig struct {
	// Ready returns an error that says why the driver is not ready.
	Ready func() error
	// Metrics serves /metrics.
	Metrics http.Handler
	// Profiles has profiles served beneath /debug/pprof/ (net/http/pprof).
	Profiles bool

	// answerTimeout is in place of the constant in tests.
	answerTimeout time.Duration
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
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: readHeaderTimeout, WriteTimeout: cmp.Or(config.answerTimeout, answerTimeout), IdleTimeout: idleTimeout,
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve HTTP on %s: %w", listener.Addr(), err)
	}
	return nil
}
