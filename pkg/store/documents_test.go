package store_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// filled returns a document of size bytes: text with item in place of ITEMS, as often as it fits.
func filled(size int, text, item string) []byte {
	before, after, _ := strings.Cut(text, "ITEMS")
	count := (size-len(text))/(len(item)+1) - 1
	data := bytes.NewBufferString(before)
	data.Grow(size)
	data.WriteString(item)
	for range count {
		data.WriteByte(',')
		data.WriteString(item)
	}
	data.WriteString(after)
	data.Write(bytes.Repeat([]byte(" "), size-data.Len()))
	return data.Bytes()
}

// withConfig returns a manifest of one layer with a configuration of size bytes.
func withConfig(config digest.Digest, size, i int) []byte {
	return fmt.Appendf(nil, `{"annotations":{"i":"%d"},"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[{"digest":%q}]}`,
		i, types.OCIConfigJSON, config, size, digest.FromString("layer"))
}

// peakHeap returns the maximum of the bytes on the heap while work runs.
func peakHeap(work func()) int64 {
	var peak int64
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for ticker := time.NewTicker(5 * time.Millisecond); ; {
			var stats runtime.MemStats
			runtime.ReadMemStats(&stats)
			peak = max(peak, int64(stats.HeapAlloc))
			select {
			case <-done:
				return
			case <-ticker.C:
			}
		}
	}()
	work()
	close(done)
	<-ended
	return peak
}

// TestMemoryOfDocuments pulls many images at once whose manifests or configurations take much more memory than their text.
func TestMemoryOfDocuments(t *testing.T) {
	if testing.Short() {
		t.Skip("the race detector takes memory of its own")
	}
	// containerd's client refuses a manifest of more than 4 MiB.
	const pulls, maxHeap, manifestSize = 6, 128 << 20, 3 << 20
	for name, c := range map[string]struct {
		isConfig bool
		data     []byte
		words    []string
	}{
		"diff IDs":  {true, filled(8<<20, `{"rootfs":{"diff_ids":[ITEMS]}}`, `""`), []string{"has 1 layers", "2796192 diff IDs"}},
		"history":   {true, filled(8<<20, `{"history":[ITEMS]}`, `{}`), []string{"has digest"}},
		"layers":    {false, filled(manifestSize, `{"config":{},"layers":[ITEMS]}`, `{}`), []string{"has 1048566 layers", "the maximum is 500"}},
		"manifests": {false, filled(manifestSize, `{"manifests":[ITEMS]}`, `{}`), []string{"has 1048569 manifests", "the maximum is 1000"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.startRegistry(registrytest.Options{})
			documents := documents{}
			id := documents.add(func() []byte { return c.data })
			var names []string
			for i := range pulls {
				pulled := id
				if c.isConfig {
					pulled = documents.add(func() []byte { return withConfig(id, len(c.data), i) })
				}
				names = append(names, fmt.Sprintf("%s/team/%d@%s", r.Host, i, pulled))
			}
			r.SetFault(documents.serve)
			before := heap()
			peak := peakHeap(func() {
				var group sync.WaitGroup
				for _, name := range names {
					group.Go(func() {
						_, err := n.pullWith(t.Context(), name)
						wantError(t, err, c.words...)
					})
				}
				group.Wait()
			})
			t.Logf("the heap had at most %d MiB more", (peak-before)>>20)
			if peak-before > maxHeap {
				t.Errorf("the heap had %d MiB more; want at most %d", (peak-before)>>20, maxHeap>>20)
			}
		})
	}
}

// TestSlowDocumentHoldsNobody checks that a registry that stops within a large configuration delays no other image, and does not delay the
// end of the driver.
func TestSlowDocumentHoldsNobody(t *testing.T) {
	n := newNode(t, func(n *node) { n.registry.StallTimeout = 5 * time.Second })
	r := n.startRegistry(registrytest.Options{})
	small := push(t, r, "small:1", image(t, layer(t, registrytest.File("f", "small"))))
	data := filled(8<<20, `{"rootfs":{"diff_ids":[ITEMS]}}`, `""`)
	documents := documents{}
	config := documents.add(func() []byte { return data })
	manifest := func(i int) string {
		id := documents.add(func() []byte { return withConfig(config, len(data), i) })
		return fmt.Sprintf("%s/team/%d@%s", r.Host, i, id)
	}
	slow, last, large := manifest(0), manifest(1), manifest(2)
	begun := make(chan struct{}, 2)
	r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		if !registrytest.IsBlob(request, config.Encoded()) || strings.Contains(request.URL.Path, "/team/2/") {
			return documents.serve(w, request)
		}
		w.(*registrytest.ResponseWriter).StopAfter(1000, func() {
			begun <- struct{}{}
			<-request.Context().Done()
		})
		return documents.serve(w, request)
	})
	pull := func(ctx context.Context, name string) chan error {
		result := make(chan error, 1)
		go func() { _, err := n.pullWith(ctx, name); result <- err }()
		return result
	}
	slowly := pull(t.Context(), slow)
	<-begun
	n.mustPull(small)
	largely := pull(t.Context(), large)
	select {
	case err := <-largely:
		wantError(t, err, "diff IDs")
		if err := <-slowly; !errdefs.IsUnavailable(err) {
			t.Errorf("the slow registry: %v", err)
		}
	case err := <-slowly:
		t.Errorf("a large image waits for the slow registry: %v", err)
		<-largely
	}

	lastly, cancel := context.WithCancel(t.Context())
	ended := pull(lastly, last)
	<-begun
	waiting := pull(lastly, large)
	cancel()
	<-ended
	<-waiting
	n.stop()
	n.Close()
	n.start()
	if _, err := n.pull(small, "", registry.Credentials{}); err != nil {
		t.Error(err)
	}
}
