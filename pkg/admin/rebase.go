package admin

import (
	"bufio"
	"encoding/json"
	"net/http"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs/pkg/errhttp"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/pkg/rebase"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// rebase answers with lines of JSON, one for each conflict between what was written to a volume and other layers. The last one says that
// there are no more, or why.
func (h *handler) rebase(w http.ResponseWriter, r *http.Request) {
	layers, err := reference.ParseList(strings.Join(r.URL.Query()["layer"], "\n"))
	if err != nil {
		http.Error(w, "--layers: "+err.Error(), errhttp.ToHTTP(err))
		return
	}
	opened, err := h.volumes.ReadRebase(r.Context(), r.PathValue("id"), layers)
	if err != nil {
		http.Error(w, err.Error(), errhttp.ToHTTP(err))
		return
	}
	defer opened.Close()
	defer endWrites(opened.Context(), w)()
	w.Header().Set("Content-Type", "application/x-ndjson")
	buffer := bufio.NewWriterSize(w, answerBuffer)
	encoder := json.NewEncoder(buffer)
	_, err = rebase.Find(opened.Context(), opened.Tree, rebase.Fail, func(c rebase.Conflict) error {
		return encoder.Encode(api.RebaseEvent{Conflict: wireConflict(c)})
	})
	last := api.RebaseEvent{End: err == nil}
	if err != nil {
		last.Error = err.Error()
	}
	// An error means that the client has gone, or that the volume is wanted.
	_ = encoder.Encode(last)
	_ = buffer.Flush()
}

func wireConflict(c rebase.Conflict) *api.Conflict {
	wire := &api.Conflict{Path: c.Path, Upper: c.Upper.String(), Layers: c.Layers.String()}
	if !utf8.ValidString(c.Path) {
		wire.Path, wire.RawPath = strings.ToValidUTF8(c.Path, "\uFFFD"), []byte(c.Path)
	}
	return wire
}
