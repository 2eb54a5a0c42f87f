// Package admin is what an operator asks a running driver, on a socket of its own that only root can open: JSON over HTTP.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errhttp"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// Layer is a layer of the store, and the volumes that use it.
type Layer struct {
	store.LayerUse
	Volumes []string `json:"volumes,omitempty"`
}

// PullEvent is one line of the answer to a pull. The last one has Image or Error.
type PullEvent struct {
	Progress *store.Progress `json:"progress,omitempty"`
	Image    *store.Image    `json:"image,omitempty"`
	Error    string          `json:"error,omitempty"`
}

// layers is what is asked of the layer store.
type layers interface {
	Layers() []store.LayerUse
	Images() []store.Image
	Resolve(ctx context.Context, named reference.Named, credentials store.Credentials) (digest.Digest, error)
	Pull(ctx context.Context, named reference.Canonical, credentials store.Credentials, path string) (*store.Use, error)
	Progress(id digest.Digest) (store.Progress, bool)
	Collect(ctx context.Context, request store.CollectRequest) (store.Collected, error)
}

// volumes is what is asked of the volumes.
type volumes interface {
	Describe(ctx context.Context, id string) (volume.Description, error)
	IDs() ([]string, error)
	LayerUsers() (map[digest.Digest][]string, error)
}

type handler struct {
	layers  layers
	volumes volumes
}

// NewHandler returns what answers the operator's questions.
func NewHandler(layers layers, volumes volumes) http.Handler {
	h := &handler{layers, volumes}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/layers", answer(h.listLayers))
	mux.HandleFunc("GET /v1/images", answer(h.listImages))
	mux.HandleFunc("GET /v1/volumes", answer(h.listVolumes))
	mux.HandleFunc("GET /v1/volumes/{id}", answer(h.describe))
	mux.HandleFunc("POST /v1/gc", answer(h.collect))
	mux.HandleFunc("POST /v1/pull", h.pull)
	return mux
}

// answer writes what a function returns as JSON, or its error with the HTTP status of its kind.
func answer[T any](do func(r *http.Request) (T, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		value, err := do(r)
		if err != nil {
			http.Error(w, err.Error(), errhttp.ToHTTP(err))
			return
		}
		w.Header().Set("Content-Type", "application/json")
		// The one who asked is gone.
		_ = json.NewEncoder(w).Encode(value)
	}
}

func (h *handler) listLayers(*http.Request) ([]Layer, error) {
	users, err := h.volumes.LayerUsers()
	if err != nil {
		return nil, err
	}
	list := []Layer{}
	for _, layer := range h.layers.Layers() {
		list = append(list, Layer{layer, users[layer.DiffID]})
	}
	return list, nil
}

func (h *handler) listImages(*http.Request) ([]store.Image, error) {
	return append([]store.Image{}, h.layers.Images()...), nil
}

func (h *handler) listVolumes(*http.Request) ([]string, error) { return h.volumes.IDs() }

func (h *handler) describe(r *http.Request) (volume.Description, error) {
	return h.volumes.Describe(r.Context(), r.PathValue("id"))
}

func (h *handler) collect(r *http.Request) (store.Collected, error) {
	query := r.URL.Query()
	return h.layers.Collect(r.Context(), store.CollectRequest{DryRun: query.Has("dryRun"), All: query.Has("all")})
}

// progressEvery is the time between two lines about a pull's progress.
const progressEvery = 100 * time.Millisecond

// pull answers with a line of JSON now and then, until the image is here.
func (h *handler) pull(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	encoder := json.NewEncoder(w)
	send := func(event PullEvent) {
		_ = encoder.Encode(event)
		_ = http.NewResponseController(w).Flush()
	}
	image, err := h.pullImage(r.Context(), r.URL.Query().Get("image"), send)
	if err != nil {
		send(PullEvent{Error: err.Error()})
		return
	}
	send(PullEvent{Image: image})
}

func (h *handler) pullImage(ctx context.Context, name string, send func(PullEvent)) (*store.Image, error) {
	named, err := store.ParseName(strings.TrimPrefix(name, "oci://"))
	if err != nil {
		return nil, err
	}
	id, err := h.layers.Resolve(ctx, named, store.Credentials{})
	if err != nil {
		return nil, err
	}
	pinned, err := reference.WithDigest(named, id)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	type result struct {
		use *store.Use
		err error
	}
	done := make(chan result, 1)
	go func() {
		use, err := h.layers.Pull(ctx, pinned, store.Credentials{}, "")
		done <- result{use, err}
	}()
	ticker := time.NewTicker(progressEvery)
	defer ticker.Stop()
	for {
		select {
		case r := <-done:
			if r.err != nil {
				return nil, r.err
			}
			defer r.use.Close()
			return &r.use.Image, nil
		case <-ticker.C:
			if progress, ok := h.layers.Progress(id); ok {
				send(PullEvent{Progress: &progress})
			}
		}
	}
}

// Serve answers on the socket at path until ctx is done.
func Serve(ctx context.Context, path string, handler http.Handler) error {
	// The data root is this process's: a socket there is of one that has ended.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the admin socket of an earlier process: %w", err)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("--admin-socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("--admin-socket: %w", err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, BaseContext: func(net.Listener) context.Context {
		return klog.NewContext(context.Background(), klog.FromContext(ctx))
	}}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the admin socket: %w", err)
	}
	return nil
}
