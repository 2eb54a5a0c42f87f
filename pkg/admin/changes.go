package admin

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs/pkg/errhttp"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/pkg/diff"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// answerBuffer is how many bytes of an answer are sent at once.
const answerBuffer = 64 << 10

// diff answers with lines of JSON, one for each change. The last one says that there are no more, or why.
func (h *handler) diff(w http.ResponseWriter, r *http.Request) {
	changes, err := h.volumes.ReadChanges(r.Context(), r.PathValue("id"), r.URL.Query().Get("pod"))
	if err != nil {
		http.Error(w, err.Error(), errhttp.ToHTTP(err))
		return
	}
	defer changes.Close()
	defer endWrites(changes.Context(), w)()
	w.Header().Set("Content-Type", "application/x-ndjson")
	buffer := bufio.NewWriterSize(w, answerBuffer)
	encoder := json.NewEncoder(buffer)
	err = diff.Walk(changes.Context(), changes.Tree, func(change diff.Change) error {
		return encoder.Encode(api.DiffEvent{Change: wireChange(change)})
	})
	last := api.DiffEvent{End: err == nil}
	if err != nil {
		last.Error = err.Error()
	}
	// An error means that the client has gone, or that the volume is wanted.
	_ = encoder.Encode(last)
	_ = buffer.Flush()
}

// endWrites has a write that waits for the client end when the changes must be closed.
func endWrites(ctx context.Context, w http.ResponseWriter) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Second)) })
}

func wireChange(change diff.Change) *api.Change {
	wire := &api.Change{Path: change.Path, Kind: change.Kind.String(), Mode: change.Type.String(), Size: change.Size}
	if !utf8.ValidString(change.Path) {
		wire.Path, wire.RawPath = strings.ToValidUTF8(change.Path, "\uFFFD"), []byte(change.Path)
	}
	return wire
}

// writeLayer answers with the tar of the layer that has what was written to the volume. The trailer says whether it is complete.
func (h *handler) writeLayer(w http.ResponseWriter, r *http.Request) {
	changes, err := h.volumes.CaptureChanges(r.Context(), r.PathValue("id"))
	if err != nil {
		http.Error(w, err.Error(), errhttp.ToHTTP(err))
		return
	}
	defer changes.Close()
	changes.Tree.MaxBytes = h.maxLayerBytes
	w.Header().Set("Content-Type", "application/vnd.oci.image.layer.v1.tar")
	w.Header().Set("Trailer", api.ErrorTrailer+", "+api.EndTrailer)
	if err := writeLayer(changes, w); err != nil {
		// A trailer has one line.
		w.Header().Set(api.ErrorTrailer, strings.Join(strings.Fields(err.Error()), " "))
		return
	}
	w.Header().Set(api.EndTrailer, "true")
}

func writeLayer(changes *volume.Changes, w http.ResponseWriter) error {
	buffer := bufio.NewWriterSize(w, answerBuffer)
	if err := diff.WriteLayer(changes.Context(), changes.Tree, buffer); err != nil {
		return err
	}
	return buffer.Flush()
}
