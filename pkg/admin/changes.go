package admin

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs/pkg/errhttp"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/pkg/diff"
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
	writeTar(w, "application/vnd.oci.image.layer.v1.tar", func(to io.Writer) error {
		return diff.WriteLayer(changes.Context(), changes.Tree, to)
	})
}

// writeTar answers with what write writes. The trailer says whether it is complete.
func writeTar(w http.ResponseWriter, mediaType string, write func(io.Writer) error) {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Trailer", api.ErrorTrailer+", "+api.EndTrailer)
	to := patientWriter{w, clientPatience}
	defer to.extend()
	buffer := bufio.NewWriterSize(to, answerBuffer)
	err := write(buffer)
	if err == nil {
		err = buffer.Flush()
	}
	if err != nil {
		// A trailer has one line.
		w.Header().Set(api.ErrorTrailer, strings.Join(strings.Fields(err.Error()), " "))
		return
	}
	w.Header().Set(api.EndTrailer, "true")
}

// clientPatience is how long an answer waits for a client that does not read. While it waits, the frozen uppers that it reads are kept.
const clientPatience = 5 * time.Minute

// patientWriter writes to a client, and gives it up if it does not read for too long: the context of its request is done then.
type patientWriter struct {
	http.ResponseWriter
	patience time.Duration
}

// Write writes to the client.
func (w patientWriter) Write(data []byte) (int, error) {
	w.extend()
	return w.ResponseWriter.Write(data)
}

// extend gives the client its time again.
func (w patientWriter) extend() {
	// A test's response has no deadline.
	_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(w.patience))
}
