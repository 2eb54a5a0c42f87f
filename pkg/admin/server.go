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

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/pkg/cache"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	layerref "github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// layers are the methods of the layer store that the handler calls.
type layers interface {
	Layers() []store.LayerStatus
	Images() []store.Image
	Resolve(ctx context.Context, named reference.Named, credentials registry.Credentials) (digest.Digest, error)
	Progress(id digest.Digest) (store.Progress, error)
	GC(ctx context.Context, request store.GCRequest) (store.GCResult, error)
}

// volumes are the methods of the volume manager that the handler calls.
type volumes interface {
	Describe(ctx context.Context, id string) (volume.Description, error)
	IDs() ([]string, error)
	DescribeSnapshots() ([]volume.SnapshotDescription, error)
	ReadChanges(ctx context.Context, id, pod string) (*volume.Changes, error)
	CaptureChanges(ctx context.Context, id string) (*volume.Changes, error)
	ReadRebase(ctx context.Context, id string, layers []layerref.Reference) (*volume.Rebase, error)
}

// records are the methods of the record store that the handler calls.
type records interface {
	LayersInUse() (map[digest.Digest][]string, error)
	Unreadable() ([]string, error)
}

// caches are the methods of the caches that the handler calls.
type caches interface {
	List() ([]cache.Status, error)
	Delete(ctx context.Context, key record.CacheKey) error
}

// layerStore are the layers, and a pull that returns a hold on them.
type layerStore interface {
	layers
	Pull(ctx context.Context, named reference.Canonical, credentials registry.Credentials, path string) (*store.Lease, error)
}

type handler struct {
	layers  layers
	volumes volumes
	records records
	caches  caches
	// fetch pulls an image with the node's credentials.
	fetch func(ctx context.Context, named reference.Canonical) (store.Image, error)
	// maxLayerBytes is how large a layer may be that is written, 0 for any size: the node would unpack no larger one.
	maxLayerBytes int64
	committer     committer
}

// NewHandler returns the handler of the admin socket. maxLayerBytes is how large a layer may be that is written, 0 for any size.
func NewHandler(
	layers layerStore, volumes volumes, records records, caches caches, committer committer, maxLayerBytes int64,
) http.Handler {
	fetch := func(ctx context.Context, named reference.Canonical) (store.Image, error) {
		lease, err := layers.Pull(ctx, named, registry.Operator(), "")
		if err != nil {
			return store.Image{}, err
		}
		defer lease.Release()
		return lease.Image, nil
	}
	return newMux(&handler{layers, volumes, records, caches, fetch, maxLayerBytes, committer})
}

func newMux(h *handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/layers", answer(h.listLayers))
	mux.HandleFunc("GET /v1/images", answer(h.listImages))
	mux.HandleFunc("GET /v1/volumes", answer(h.listVolumes))
	mux.HandleFunc("GET /v1/volumes/{id}", answer(h.describe))
	mux.HandleFunc("GET /v1/volumes/{id}/diff", h.diff)
	mux.HandleFunc("GET /v1/volumes/{id}/rebase", h.rebase)
	mux.HandleFunc("POST /v1/volumes/{id}/layer", h.writeLayer)
	mux.HandleFunc("POST /v1/volumes/{id}/archive", h.writeArchive)
	mux.HandleFunc("POST /v1/volumes/{id}/push", h.push)
	mux.HandleFunc("GET /v1/snapshots", answer(h.listSnapshots))
	mux.HandleFunc("GET /v1/caches", answer(h.listCaches))
	mux.HandleFunc("DELETE /v1/caches/{namespace}/{name}", answer(h.deleteCache))
	mux.HandleFunc("POST /v1/gc", answer(h.gc))
	mux.HandleFunc("POST /v1/pull", h.pull)
	return mux
}

// answer writes the result of a function as JSON, or its error with the HTTP status of its kind.
func answer[T any](do func(r *http.Request) (T, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		value, err := do(r)
		if err != nil {
			http.Error(w, err.Error(), errhttp.ToHTTP(err))
			return
		}
		w.Header().Set("Content-Type", "application/json")
		// An error means that the client has gone.
		_ = json.NewEncoder(w).Encode(value)
	}
}

func (h *handler) listLayers(*http.Request) ([]api.Layer, error) {
	volumes, err := h.records.LayersInUse()
	if err != nil {
		return nil, err
	}
	list := []api.Layer{}
	for _, layer := range h.layers.Layers() {
		list = append(list, wireLayer(layer, volumes[layer.DiffID]))
	}
	return list, nil
}

func (h *handler) listImages(*http.Request) ([]api.Image, error) {
	list := []api.Image{}
	for _, image := range h.layers.Images() {
		list = append(list, wireImage(image))
	}
	return list, nil
}

func (h *handler) listVolumes(*http.Request) ([]string, error) { return h.volumes.IDs() }

func (h *handler) describe(r *http.Request) (api.Volume, error) {
	description, err := h.volumes.Describe(r.Context(), r.PathValue("id"))
	if err != nil {
		return api.Volume{}, err
	}
	return wireVolume(description)
}

func (h *handler) listSnapshots(r *http.Request) ([]api.Snapshot, error) {
	all, err := h.volumes.DescribeSnapshots()
	if len(all) > 0 && err != nil {
		// Who comes to find out what is wrong is not to be turned away.
		klog.FromContext(r.Context()).Error(err, "The volumes that have snapshots cannot be listed")
		err = nil
	}
	list := []api.Snapshot{}
	for _, s := range all {
		list = append(list, wireSnapshot(s))
	}
	return list, err
}

func (h *handler) listCaches(*http.Request) ([]api.Cache, error) {
	all, err := h.caches.List()
	if err != nil {
		return nil, err
	}
	list := []api.Cache{}
	for _, c := range all {
		list = append(list, api.Cache{
			Namespace: c.Namespace, Name: c.Name, Versions: c.Versions, Bytes: c.Bytes, LastUsed: c.LastUsed, Volumes: c.Users,
		})
	}
	return list, nil
}

func (h *handler) deleteCache(r *http.Request) (struct{}, error) {
	return struct{}{}, h.caches.Delete(r.Context(), record.CacheKey{Namespace: r.PathValue("namespace"), Name: r.PathValue("name")})
}

func (h *handler) gc(r *http.Request) (api.GCResult, error) {
	query := r.URL.Query()
	collected, err := h.layers.GC(r.Context(), store.GCRequest{DryRun: query.Has("dryRun"), All: query.Has("all")})
	if err != nil {
		return api.GCResult{}, err
	}
	unreadable, err := h.records.Unreadable()
	if err != nil {
		return api.GCResult{}, err
	}
	result := api.GCResult{Layers: []api.Layer{}, Bytes: collected.Bytes, Caches: collected.Caches, Unreadable: unreadable}
	for _, layer := range collected.Layers {
		result.Layers = append(result.Layers, wireLayer(layer, nil))
	}
	return result, nil
}

// progressInterval is the time between two lines about a pull's progress.
const progressInterval = 100 * time.Millisecond

// pull answers with lines of JSON about the progress until the image is in the store.
func (h *handler) pull(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	encoder := json.NewEncoder(w)
	send := func(event api.PullEvent) {
		_ = encoder.Encode(event)
		_ = http.NewResponseController(w).Flush()
	}
	image, err := h.pullImage(r.Context(), r.URL.Query().Get("image"), send)
	if err != nil {
		send(api.PullEvent{Error: err.Error()})
		return
	}
	send(api.PullEvent{Image: &image})
}

func (h *handler) pullImage(ctx context.Context, name string, send func(api.PullEvent)) (api.Image, error) {
	named, err := registry.ParseName(strings.TrimPrefix(name, "oci://"))
	if err != nil {
		return api.Image{}, err
	}
	id, err := h.layers.Resolve(ctx, named, registry.Operator())
	if err != nil {
		return api.Image{}, err
	}
	resolved, err := reference.WithDigest(named, id)
	if err != nil {
		return api.Image{}, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	type result struct {
		image store.Image
		err   error
	}
	done := make(chan result, 1)
	go func() {
		image, err := h.fetch(ctx, resolved)
		done <- result{image, err}
	}()
	ticker := time.NewTicker(progressInterval)
	defer ticker.Stop()
	for {
		select {
		case r := <-done:
			if r.err != nil {
				return api.Image{}, r.err
			}
			return wireImage(r.image), nil
		case <-ticker.C:
			if progress, err := h.layers.Progress(id); err == nil {
				send(api.PullEvent{Progress: wireProgress(progress)})
			}
		}
	}
}

// listenRetry is the time after which the admin socket is made again on a disk that could not be written to.
const listenRetry = 10 * time.Second

// Serve serves the handler on the socket at path, which only root can open, until ctx is done. On a disk that is full or read-only, it
// waits until it can make the socket: the driver does its work without it.
func Serve(ctx context.Context, path string, handler http.Handler) error {
	listener, err := listen(path)
	for linux.IsNotWritable(err) {
		klog.FromContext(ctx).Error(err, "overlayctl cannot be served, will retry")
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(listenRetry):
		}
		listener, err = listen(path)
	}
	if err != nil {
		return fmt.Errorf("--admin-socket: %w", err)
	}
	baseContext := func(net.Listener) context.Context {
		return klog.NewContext(context.Background(), klog.FromContext(ctx))
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, BaseContext: baseContext}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the admin socket: %w", err)
	}
	return nil
}

func listen(path string) (net.Listener, error) {
	// This process holds the lock on the data root, so a socket there was left by one that has ended.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the socket of an earlier process: %w", err)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}
