package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errhttp"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	corev1 "k8s.io/api/core/v1"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/pkg/commit"
	"github.com/overlay-csi/overlay-csi/pkg/diff"
	"github.com/overlay-csi/overlay-csi/pkg/image/compose"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// maxSecret is the maximum size of a Docker config.json in bytes. That of a Secret is as much.
const maxSecret = 1 << 20

// committer is what makes images of volumes.
type committer interface {
	WriteArchive(
		ctx context.Context, to io.Writer, v commit.Volume, name string, credentials registry.Credentials, details compose.Details,
	) error
	Push(
		ctx context.Context, v commit.Volume, to reference.NamedTagged, credentials registry.Credentials, details compose.Details,
		progress *commit.Progress,
	) (digest.Digest, error)
}

// push answers with lines of JSON about the progress until the image is in its registry. The body of the request is a Docker config.json
// with the login, or empty.
func (h *handler) push(w http.ResponseWriter, r *http.Request) {
	to, credentials, err := parsePush(w, r)
	if err != nil {
		http.Error(w, err.Error(), errhttp.ToHTTP(err))
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	encoder := json.NewEncoder(patientWriter{w, clientPatience})
	send := func(event api.PushEvent) {
		// An error ends the context of the request.
		_ = encoder.Encode(event)
		_ = http.NewResponseController(w).Flush()
	}
	// Before the first event: a client whose driver ends knows that it pushed.
	send(api.PushEvent{Progress: &api.PushProgress{}})
	id, err := h.pushVolume(r.Context(), r.PathValue("id"), to, credentials, send)
	if err != nil {
		send(api.PushEvent{Error: err.Error()})
		return
	}
	send(api.PushEvent{Image: &api.PushedImage{Name: to.String(), Digest: id}})
}

// parsePush returns the image that a request names, and its credentials. Those of the node may be used beside them.
func parsePush(w http.ResponseWriter, r *http.Request) (reference.NamedTagged, registry.Credentials, error) {
	named, err := registry.ParseName(strings.TrimPrefix(r.URL.Query().Get("image"), "oci://"))
	if err != nil {
		return nil, registry.Credentials{}, err
	}
	to, ok := named.(reference.NamedTagged)
	if _, isDigest := named.(reference.Digested); !ok || isDigest {
		return nil, registry.Credentials{}, fmt.Errorf("%w: %s has a digest; an image is pushed to a tag, and its digest follows",
			errdefs.ErrInvalidArgument, named)
	}
	credentials, err := readSecret(w, r)
	return to, credentials, err
}

// readSecret returns the credentials in the body of a request.
func readSecret(w http.ResponseWriter, r *http.Request) (registry.Credentials, error) {
	secret, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxSecret))
	if err != nil {
		return registry.Credentials{}, fmt.Errorf("%w: read the secret: %w", errdefs.ErrInvalidArgument, err)
	}
	if len(secret) == 0 {
		return registry.Operator(), nil
	}
	credentials, err := registry.ParseCredentials(map[string]string{corev1.DockerConfigJsonKey: string(secret)})
	return credentials.AsOperator(), err
}

// capture opens what was written to a volume, for an image of it. The caller closes the changes.
func (h *handler) capture(ctx context.Context, id string) (commit.Volume, compose.Details, *volume.Changes, error) {
	description, err := h.volumes.Describe(ctx, id)
	if err != nil {
		return commit.Volume{}, compose.Details{}, nil, err
	}
	changes, err := h.volumes.CaptureChanges(ctx, id)
	if err != nil {
		return commit.Volume{}, compose.Details{}, nil, err
	}
	changes.Tree.MaxBytes = h.maxLayerBytes
	captured := commit.Volume{
		Layers: description.Spec.Layers, Resolved: description.Resolved,
		WriteTar: func(ctx context.Context, to io.Writer) error { return diff.WriteLayer(ctx, changes.Tree, to) },
	}
	return captured, compose.Details{Created: time.Now().Truncate(time.Second), CreatedBy: "overlayctl commit " + id}, changes, nil
}

// writeArchive answers with an OCI archive of an image of a volume. The body of the request is that of a push. The trailer says whether the
// archive is complete.
func (h *handler) writeArchive(w http.ResponseWriter, r *http.Request) {
	credentials, err := readSecret(w, r)
	if err != nil {
		http.Error(w, err.Error(), errhttp.ToHTTP(err))
		return
	}
	captured, details, changes, err := h.capture(r.Context(), r.PathValue("id"))
	if err != nil {
		http.Error(w, err.Error(), errhttp.ToHTTP(err))
		return
	}
	defer changes.Close()
	writeTar(w, "application/x-tar", func(to io.Writer) error {
		return h.committer.WriteArchive(changes.Context(), to, captured, r.URL.Query().Get("name"), credentials, details)
	})
}

func (h *handler) pushVolume(
	ctx context.Context, id string, to reference.NamedTagged, credentials registry.Credentials, send func(api.PushEvent),
) (digest.Digest, error) {
	captured, details, changes, err := h.capture(ctx, id)
	if err != nil {
		return "", err
	}
	defer changes.Close()
	type result struct {
		id  digest.Digest
		err error
	}
	progress, done := &commit.Progress{}, make(chan result, 1)
	go func() {
		id, err := h.committer.Push(changes.Context(), captured, to, credentials, details, progress)
		done <- result{id, err}
	}()
	ticker := time.NewTicker(progressInterval)
	defer ticker.Stop()
	for {
		select {
		case r := <-done:
			return r.id, r.err
		case <-ticker.C:
			send(api.PushEvent{Progress: &api.PushProgress{Sent: progress.Sent.Load(), Total: progress.Total.Load()}})
		}
	}
}
