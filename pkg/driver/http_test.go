package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

func TestServeHTTP(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var ready atomic.Bool
	check := func() error {
		if !ready.Load() {
			return errors.New("not yet")
		}
		return nil
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	served := make(chan error, 1)
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "up 1") })
	go func() { served <- ServeHTTP(ctx, listener, HTTPConfig{Ready: check, Metrics: metrics}) }()
	for _, c := range []struct {
		name, method, path string
		ready              bool
		code               int
		body               string
	}{
		{"alive before it is ready", http.MethodGet, "/healthz", false, http.StatusOK, "ok\n"},
		{"not ready", http.MethodGet, "/readyz", false, http.StatusServiceUnavailable, "not yet\n"},
		{"ready", http.MethodGet, "/readyz", true, http.StatusOK, "ok\n"},
		{"alive", http.MethodGet, "/healthz", true, http.StatusOK, "ok\n"},
		{"metrics before it is ready", http.MethodGet, "/metrics", false, http.StatusOK, "up 1\n"},
		{"profiles that nobody asked for", http.MethodGet, "/debug/pprof/", true, http.StatusNotFound, "404 page not found\n"},
		{"another path", http.MethodGet, "/layers", true, http.StatusNotFound, "404 page not found\n"},
		{"another method", http.MethodPost, "/readyz", true, http.StatusMethodNotAllowed, "Method Not Allowed\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ready.Store(c.ready)
			req, err := http.NewRequestWithContext(t.Context(), c.method, "http://"+listener.Addr().String()+c.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			response, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			body, err := io.ReadAll(response.Body)
			if err != nil {
				t.Fatal(err)
			}
			if response.StatusCode != c.code || string(body) != c.body {
				t.Errorf("%d %q; want %d %q", response.StatusCode, body, c.code, c.body)
			}
		})
	}
	stop()
	if err := <-served; err != nil {
		t.Errorf("ServeHTTP returns %v after its context is done", err)
	}
	if conn, err := net.Dial("tcp", listener.Addr().String()); err == nil {
		conn.Close()
		t.Error("the listener is open after ServeHTTP returned")
	}
}

// TestServeHTTPGivesUpClientsThatDoNotRead: any pod may ask for metrics, and must not keep Prometheus out.
func TestServeHTTPGivesUpClientsThatDoNotRead(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for {
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				ended <- err
				return
			}
		}
	})
	served := make(chan error, 1)
	go func() {
		served <- ServeHTTP(ctx, listener, HTTPConfig{Metrics: metrics, answerTimeout: 100 * time.Millisecond})
	}()
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := fmt.Fprint(client, "GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the answer ended with %v", err)
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestServeHTTPReportsAListenerThatFails(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	if err := ServeHTTP(t.Context(), listener, HTTPConfig{Metrics: http.NotFoundHandler()}); err == nil {
		t.Error("ServeHTTP on a closed listener returns nil")
	}
}
