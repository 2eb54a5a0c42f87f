// Package registrytest runs a real registry, with TLS and a password if wanted, that fails on demand, and makes images for
// it: what the tests, the benchmarks and the end-to-end tests share.
package registrytest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Options say what registry there is to be.
type Options struct {
	// Address to listen on; "" is a free port of 127.0.0.1.
	Address string
	// TLS has it answer by HTTPS, with a certificate of its own CA.
	TLS bool
	// User and Password are wanted of everybody, if they are set, or with Private only for repositories beneath that.
	User, Password, Private string
	// BlobDir keeps blobs on disk instead of in memory.
	BlobDir string
	// Handler is the registry, in place of go-containerregistry's.
	Handler http.Handler
}

// Fault may answer a request in the registry's place. It reports whether it did.
type Fault func(w http.ResponseWriter, r *http.Request) bool

// Registry is a running registry.
type Registry struct {
	// Host is its name in references.
	Host string

	options  Options
	server   *httptest.Server
	handler  http.Handler
	mu       sync.Mutex
	fault    Fault
	requests []string
}

// Start starts a registry.
func Start(options Options) (*Registry, error) {
	quiet := []registry.Option{registry.Logger(log.New(io.Discard, "", 0))}
	if options.BlobDir != "" {
		quiet = append(quiet, registry.WithBlobHandler(registry.NewDiskBlobHandler(options.BlobDir)))
	}
	r := &Registry{options: options, handler: options.Handler}
	if r.handler == nil {
		r.handler = registry.New(quiet...)
	}
	address := options.Address
	if address == "" {
		address = "127.0.0.1:0"
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	r.server = &httptest.Server{Listener: listener, Config: &http.Server{Handler: r, ErrorLog: log.New(io.Discard, "", 0)}}
	if options.TLS {
		r.server.TLS = &tls.Config{}
		if host, _, err := net.SplitHostPort(address); err == nil && host != "127.0.0.1" {
			certificate, err := selfSigned(host)
			if err != nil {
				return nil, err
			}
			r.server.TLS.Certificates = []tls.Certificate{certificate}
		}
		r.server.StartTLS()
	} else {
		r.server.Start()
	}
	r.Host = listener.Addr().String()
	return r, nil
}

// Close stops the registry.
func (r *Registry) Close() {
	r.server.CloseClientConnections()
	r.server.Close()
}

// SetFault has fault look at each request first. nil has none.
func (r *Registry) SetFault(fault Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = fault
}

// Requests are those since the last call: method and path.
func (r *Registry) Requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	requests := r.requests
	r.requests = nil
	return requests
}

// Bypass has the registry answer a request without its password and its faults.
func (r *Registry) Bypass(w http.ResponseWriter, request *http.Request) {
	r.handler.ServeHTTP(w, request)
}

// ServeHTTP is the registry behind its password and its faults.
func (r *Registry) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	r.mu.Lock()
	fault := r.fault
	r.requests = append(r.requests, request.Method+" "+request.URL.Path)
	r.mu.Unlock()
	if r.options.User != "" && (strings.HasPrefix(request.URL.Path, "/v2/"+r.options.Private)) {
		user, password, ok := request.BasicAuth()
		if !ok || user != r.options.User || password != r.options.Password {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
			return
		}
	}
	cutting := &ResponseWriter{ResponseWriter: w, left: -1}
	if fault != nil && fault(cutting, request) {
		return
	}
	// go-containerregistry knows ranges with an end only.
	var offset int64
	if _, err := fmt.Sscanf(request.Header.Get("Range"), "bytes=%d-", &offset); err == nil && r.options.Handler == nil {
		request.Header.Del("Range")
		r.handler.ServeHTTP(&rangeWriter{ResponseWriter: cutting, offset: offset}, request)
		return
	}
	r.handler.ServeHTTP(cutting, request)
}

// rangeWriter leaves out what comes before an offset.
type rangeWriter struct {
	http.ResponseWriter
	offset, written int64
}

func (w *rangeWriter) WriteHeader(code int) {
	size, err := strconv.ParseInt(w.Header().Get("Content-Length"), 10, 64)
	if code == http.StatusOK && err == nil {
		w.Header().Set("Content-Length", strconv.FormatInt(size-w.offset, 10))
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", w.offset, size-1, size))
		code = http.StatusPartialContent
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *rangeWriter) Write(data []byte) (int, error) {
	skip := min(max(w.offset-w.written, 0), int64(len(data)))
	w.written += int64(len(data))
	n, err := w.ResponseWriter.Write(data[skip:])
	return n + int(skip), err
}

// ResponseWriter is what faults write to. It can stop in the middle of the registry's answer.
type ResponseWriter struct {
	http.ResponseWriter
	left int
	stop func()
}

// CutAfter cuts the connection after so many bytes of the answer.
func (w *ResponseWriter) CutAfter(bytes int) {
	w.StopAfter(bytes, func() { panic(http.ErrAbortHandler) })
}

// StopAfter calls stop after so many bytes of the answer have been sent. The rest follows when stop returns.
func (w *ResponseWriter) StopAfter(bytes int, stop func()) { w.left, w.stop = bytes, stop }

// Unwrap is for http.ResponseController.
func (w *ResponseWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *ResponseWriter) Write(data []byte) (int, error) {
	if w.left < 0 || len(data) < w.left {
		if w.left > 0 {
			w.left -= len(data)
		}
		return w.ResponseWriter.Write(data)
	}
	before := w.left
	w.left = -1
	if n, err := w.ResponseWriter.Write(data[:before]); err != nil {
		return n, err
	}
	_ = http.NewResponseController(w.ResponseWriter).Flush()
	w.stop()
	n, err := w.ResponseWriter.Write(data[before:])
	return before + n, err
}

// CA is the certificate in PEM that the registry's own is of.
func (r *Registry) CA() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.server.Certificate().Raw})
}

// Configure writes certs.d/<host> for the registry, as containerd has it.
func (r *Registry) Configure(certsDir string) error {
	host, port, err := net.SplitHostPort(r.Host)
	if err != nil {
		return err
	}
	dir := filepath.Join(certsDir, host+"_"+port+"_")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	scheme, ca := "http", ""
	if r.options.TLS {
		scheme, ca = "https", "ca = \"ca.crt\"\n"
		if err := os.WriteFile(filepath.Join(dir, "ca.crt"), r.CA(), 0o644); err != nil {
			return err
		}
	}
	toml := fmt.Sprintf("server = %q\n%s", scheme+"://"+r.Host, ca)
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(toml), 0o644)
}

// DockerConfig is a Docker config.json with a login for the registry.
func (r *Registry) DockerConfig(user, password string) string {
	return fmt.Sprintf(`{"auths":{%q:{"username":%q,"password":%q}}}`, r.Host, user, password)
}

// Push pushes an image or an index under a name such as team/data:1, and returns the reference with its digest.
func (r *Registry) Push(ctx context.Context, repository string, what remote.Taggable) (string, error) {
	r.mu.Lock()
	fault := r.fault
	r.fault = nil
	r.mu.Unlock()
	defer r.SetFault(fault)
	ref, err := name.ParseReference(r.Host+"/"+repository, name.Insecure)
	if err != nil {
		return "", err
	}
	pool := x509.NewCertPool()
	if r.options.TLS {
		ref, err = name.ParseReference(r.Host + "/" + repository)
		if err != nil {
			return "", err
		}
		pool.AddCert(r.server.Certificate())
	}
	options := []remote.Option{
		remote.WithContext(ctx),
		remote.WithTransport(&http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}),
		remote.WithAuth(authn.FromConfig(authn.AuthConfig{Username: r.options.User, Password: r.options.Password})),
	}
	var hash v1.Hash
	switch what := what.(type) {
	case v1.Image:
		if err := remote.Write(ref, what, options...); err != nil {
			return "", err
		}
		hash, err = what.Digest()
	case v1.ImageIndex:
		if err := remote.WriteIndex(ref, what, options...); err != nil {
			return "", err
		}
		hash, err = what.Digest()
	default:
		return "", fmt.Errorf("neither an image nor an index: %T", what)
	}
	r.Requests()
	return ref.Context().Name() + "@" + hash.String(), err
}

// IsBlob reports whether a request is for the content of a blob, or of the one whose digest has this in it.
func IsBlob(r *http.Request, digest string) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") && strings.Contains(r.URL.Path, digest)
}
