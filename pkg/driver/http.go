package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// readHeaderTimeout bounds how long a client of the health endpoint may take to send its request's header.
const readHeaderTimeout = 5 * time.Second

// ServeHealth serves the health endpoint on listener until ctx is done, and closes listener. /healthz answers 200 until then.
// /readyz answers 503 while ready returns an error, with the error's text.
func ServeHealth(ctx context.Context, listener net.Listener, ready func() error) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: readHeaderTimeout}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve /healthz and /readyz: %w", err)
	}
	return nil
}
