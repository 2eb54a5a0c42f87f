package registry

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestPauses has a registry that cuts each connection, or is too busy. It must not be asked again at once.
func TestPauses(t *testing.T) {
	const size, pause = 1 << 20, 50 * time.Millisecond
	blob := strings.Repeat("x", size)
	for name, answer := range map[string]func(w http.ResponseWriter, offset, count int){
		"cut": func(w http.ResponseWriter, offset, _ int) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", offset, size-1, size))
			w.Header().Set("Content-Length", strconv.Itoa(size-offset))
			if offset > 0 {
				w.WriteHeader(http.StatusPartialContent)
			}
			_, _ = w.Write([]byte(blob[offset:min(offset+size/16, size)]))
		},
		"busy": func(w http.ResponseWriter, _, count int) {
			if count < 10 {
				http.Error(w, "", http.StatusTooManyRequests)
				return
			}
			_, _ = w.Write([]byte(blob))
		},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var at []time.Time
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				at = append(at, time.Now())
				count := len(at)
				mu.Unlock()
				offset := 0
				_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &offset)
				answer(w, offset, count)
			}))
			defer server.Close()
			named, err := ParseName(strings.TrimPrefix(server.URL, "http://") + "/team/data:1")
			must(t, err)
			repository := NewClient(Config{StallTimeout: 10 * time.Second, Backoff: pause}).Repository(named, Credentials{})
			spool, err := OpenSpool(filepath.Join(t.TempDir(), "blob"))
			must(t, err)
			defer spool.Close()
			descriptor := ocispec.Descriptor{Digest: digest.FromString(blob), Size: size}
			must(t, repository.Download(t.Context(), descriptor, spool, &Progress{}))
			if len(at) < 10 {
				t.Errorf("only %d requests", len(at))
			}
			for i := 1; i < len(at); i++ {
				if waited := at[i].Sub(at[i-1]); waited < pause*9/10 {
					t.Errorf("request %d came %s after the last one", i, waited)
				}
			}
		})
	}
}
