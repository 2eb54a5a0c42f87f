package registry

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// TestManifestsThatHeadDoesNotShow resolves and fetches manifests of registries that answer GET alone, and manifests that are larger than
// containerd takes.
func TestManifestsThatHeadDoesNotShow(t *testing.T) {
	for name, c := range map[string]struct {
		// head is the status of the answer to HEAD, and get that to GET.
		head, get, size int
		// withoutDigest has the registry leave out the digest.
		withoutDigest bool
		word          string
	}{
		"HEAD is forbidden":         {head: http.StatusForbidden, get: http.StatusOK, size: 100},
		"HEAD finds nothing":        {head: http.StatusNotFound, get: http.StatusOK, size: 100},
		"HEAD is not allowed":       {head: http.StatusMethodNotAllowed, get: http.StatusOK, size: 6 << 20},
		"large":                     {head: http.StatusOK, get: http.StatusOK, size: 6 << 20},
		"large, without its digest": {head: http.StatusOK, get: http.StatusOK, size: image.MaxDocumentSize, withoutDigest: true},
		"too large":                 {head: http.StatusOK, get: http.StatusOK, size: image.MaxDocumentSize + 1, word: "maximum is 8388608"},
		"too large, no HEAD":        {head: http.StatusForbidden, get: http.StatusOK, size: image.MaxDocumentSize + 1, word: "more than 8388608"},
		"absent":                    {head: http.StatusNotFound, get: http.StatusNotFound, word: "not found"},
		"forbidden":                 {head: http.StatusForbidden, get: http.StatusForbidden, word: "permission denied"},
	} {
		t.Run(name, func(t *testing.T) {
			manifest := bytes.Repeat([]byte(" "), c.size)
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				status := c.get
				if r.Method == http.MethodHead {
					status = c.head
				}
				if status != http.StatusOK {
					w.WriteHeader(status)
					return
				}
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				w.Header().Set("Content-Length", strconv.Itoa(c.size))
				if !c.withoutDigest {
					w.Header().Set("Docker-Content-Digest", digest.FromBytes(manifest).String())
				}
				if r.Method == http.MethodGet {
					_, _ = w.Write(manifest)
				}
			}))
			defer server.Close()
			repository := newRepository(t, strings.TrimPrefix(server.URL, "http://"))
			descriptor, err := repository.Resolve(t.Context())
			if err == nil {
				if descriptor.Digest != digest.FromBytes(manifest) || descriptor.Size != int64(c.size) {
					t.Errorf("got %s of %d bytes", descriptor.Digest, descriptor.Size)
				}
				_, err = repository.Fetch(t.Context(), descriptor)
			}
			if c.word == "" && err != nil || c.word != "" && (err == nil || !strings.Contains(err.Error(), c.word)) {
				t.Errorf("the error is %v; want %q", err, c.word)
			}
		})
	}
}
