package store_test

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestManyAskForOneImage checks that concurrent pulls download each layer once.
func TestManyAskForOneImage(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	shared := layer(t, incompressible(1<<20))
	own := layer(t, registrytest.File("f", "x"))
	pinned := push(t, r, "a:1", image(t, shared, own))
	other := push(t, r, "b:1", image(t, shared))
	var group sync.WaitGroup
	for i := range 50 {
		group.Go(func() {
			name := pinned
			if i%5 == 0 {
				name = other
			}
			lease, err := n.pull(name, "", registry.Credentials{})
			if err != nil {
				t.Error(err)
				return
			}
			lease.Release()
		})
	}
	group.Wait()
	downloads := map[string]int{}
	for _, request := range r.Requests() {
		if strings.HasPrefix(request, "GET ") && strings.Contains(request, "/blobs/") {
			downloads[request[strings.LastIndex(request, ":"):]]++
		}
	}
	for _, hex := range []string{mustHex(t, shared), mustHex(t, own)} {
		if downloads[":"+hex] != 1 {
			t.Errorf("layer %s was downloaded %d times", hex, downloads[":"+hex])
		}
	}
}

// TestPullOutlivesItsRequest checks that a pull continues after its request has ended.
func TestPullOutlivesItsRequest(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	l := layer(t, incompressible(1<<20))
	pinned := push(t, r, "a:1", image(t, l))
	release, begun := make(chan struct{}), make(chan struct{})
	var downloads atomic.Int64
	r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, mustHex(t, l)) {
			if downloads.Add(1) == 1 {
				close(begun)
			}
			<-release
		}
		return false
	})
	for try := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if try == 0 {
			// This one gives up when the layer is on its way, however long that takes.
			cancel()
			ctx, cancel = context.WithCancel(t.Context())
			go func() {
				<-begun
				cancel()
			}()
		}
		_, err := n.pullWith(ctx, pinned)
		wantError(t, err, "still being pulled", "0 of 1 layers")
		if !errdefs.IsUnavailable(err) {
			t.Error(err)
		}
		cancel()
	}
	close(release)
	n.mustPull(pinned)
	if downloads.Load() != 1 {
		t.Errorf("%d downloads", downloads.Load())
	}
}

// downloaded returns the number of bytes that are on the disk of the download of a layer.
func (n *node) downloaded(l v1.Layer) int64 {
	n.t.Helper()
	var bytes int64
	for _, blob := range mustGlob(n.t, filepath.Join(n.dir, "layers/incoming", mustHex(n.t, l)+"-*", "blob")) {
		if info, err := os.Stat(blob); err == nil {
			bytes += info.Size()
		}
	}
	return bytes
}

// TestDownloadGoesOnAfterRestart checks that a new store resumes the download of an earlier one.
func TestDownloadGoesOnAfterRestart(t *testing.T) {
	const size = 8 << 20
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	l := layer(t, incompressible(size))
	pinned := push(t, r, "a:1", image(t, l))
	halfway := make(chan struct{})
	var once sync.Once
	r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		if !registrytest.IsBlob(request, mustHex(t, l)) {
			return false
		}
		body, err := l.Compressed()
		must(t, err)
		half := make([]byte, size/2)
		_, err = body.Read(half)
		must(t, err)
		w.Header().Set("Content-Length", strconv.FormatInt(mustSize(t, l), 10))
		_, _ = w.Write(half)
		_ = http.NewResponseController(w).Flush()
		once.Do(func() { close(halfway) })
		<-request.Context().Done()
		return true
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = n.pullWith(ctx, pinned)
	}()
	<-halfway
	eventually(t, func() bool { return n.downloaded(l) >= size/4 })
	cancel()
	<-done
	var ranges []string
	r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, mustHex(t, l)) {
			ranges = append(ranges, request.Header.Get("Range"))
		}
		return false
	})
	n.restart()
	lease := n.mustPull(pinned)
	wantFileSize(t, filepath.Join(lease.Dirs[0].Name(), "random"), size)
	if len(ranges) != 1 || !strings.HasPrefix(ranges[0], "bytes=") || ranges[0] == "bytes=0-" {
		t.Errorf("the rest was asked for with %q", ranges)
	}
}
