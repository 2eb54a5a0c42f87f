package store_test

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// oneByteMore is a layer that its manifest describes with a wrong size.
type oneByteMore struct{ v1.Layer }

func (l oneByteMore) Size() (int64, error) {
	size, err := l.Layer.Size()
	return size + 1, err
}

// TestSlowRegistryDelaysNobodyElse: a registry that offers a public layer and does not send it must not make the pulls from
// other registries wait, nor may who describes it wrongly.
func TestSlowRegistryDelaysNobodyElse(t *testing.T) {
	shared := layer(t, registrytest.File("f", "public"))
	for name, c := range map[string]struct {
		slow     v1.Layer
		sameHost bool
	}{
		"another registry":                    {slow: shared},
		"another size from the same registry": {slow: oneByteMore{shared}, sameHost: true},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			own := n.startRegistry(registrytest.Options{})
			slow := own
			if !c.sameHost {
				slow = n.startRegistry(registrytest.Options{})
			}
			pinned := push(t, own, "team/data:1", image(t, shared))
			pinnedSlow := push(t, slow, "evil/data:1", image(t, c.slow))
			asked, stop := make(chan struct{}), make(chan struct{})
			var first sync.Once
			slow.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
				if registrytest.IsBlob(request, mustHex(t, shared)) && strings.Contains(request.URL.Path, "/evil/") {
					first.Do(func() { close(asked) })
					select {
					case <-stop:
					case <-request.Context().Done():
					}
				}
				return false
			})
			defer close(stop)
			ofSlow := make(chan error, 1)
			go func() {
				lease, err := n.pullWith(t.Context(), pinnedSlow)
				if err == nil {
					lease.Release()
				}
				ofSlow <- err
			}()
			<-asked
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			lease, err := n.pullWith(ctx, pinned)
			if err != nil {
				t.Errorf("the pull waits for the slow one: %v", err)
			} else {
				lease.Release()
			}
			if !slices.ContainsFunc(own.Requests(), func(request string) bool {
				return strings.HasPrefix(request, "GET /v2/team/data/blobs/") && strings.Contains(request, mustHex(t, shared))
			}) {
				t.Error("the pull's own registry was not asked for the layer")
			}
			// The layer is present now, so that nothing is left to wait for.
			if err == nil && <-ofSlow != nil {
				t.Error("the slow pull did not get the layer that another one has fetched")
			}
		})
	}
}

// TestOneRegistryHasNotAllSlots: a registry that does not send leaves a slot for others.
func TestOneRegistryHasNotAllSlots(t *testing.T) {
	n := newNode(t)
	slow, own := n.startRegistry(registrytest.Options{}), n.startRegistry(registrytest.Options{})
	var layers []v1.Layer
	for i := range n.config.MaxConcurrentLayerPulls {
		layers = append(layers, layer(t, registrytest.File("f", fmt.Sprint("slow", i))))
	}
	pinned := push(t, own, "team/data:1", image(t, layer(t, registrytest.File("f", "x"))))
	pinnedSlow := push(t, slow, "evil/data:1", image(t, layers...))
	config, err := image(t, layers...).ConfigName()
	must(t, err)
	asked, stop := make(chan struct{}, 100), make(chan struct{})
	slow.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, "") && !registrytest.IsBlob(request, config.Hex) {
			asked <- struct{}{}
			select {
			case <-stop:
			case <-request.Context().Done():
			}
		}
		return false
	})
	defer close(stop)
	request, endRequest := context.WithCancel(t.Context())
	defer endRequest()
	go func() { _, _ = n.pullWith(request, pinnedSlow) }()
	for range n.config.MaxConcurrentLayerPulls - 1 {
		<-asked
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	lease, err := n.pullWith(ctx, pinned)
	if err != nil {
		t.Fatalf("one registry has all slots: %v", err)
	}
	lease.Release()
}

// TestAbandonedPullEnds: a pull ends if no request waits for it, and the next one resumes its download.
func TestAbandonedPullEnds(t *testing.T) {
	const size = 4 << 20
	n := newNode(t, func(n *node) { n.config.AbandonAfter = time.Millisecond })
	r := n.startRegistry(registrytest.Options{})
	l := layer(t, incompressible(size))
	pinned := push(t, r, "a:1", image(t, l))
	halfway, _ := stopHalfway(t, r, l)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	request := make(chan error, 1)
	go func() {
		_, err := n.pullWith(ctx, pinned)
		request <- err
	}()
	<-halfway
	eventually(t, func() bool { return n.downloaded(l) >= size/4 })
	cancel()
	wantError(t, <-request, "still being pulled")
	_, id, _ := strings.Cut(pinned, "@")
	eventually(t, func() bool {
		_, err := n.Progress(digest.Digest(id))
		return errdefs.IsNotFound(err)
	})
	if n.downloaded(l) < size/4 {
		t.Error("the download is not kept")
	}
	ranges := make(chan string, 10)
	r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, mustHex(t, l)) {
			ranges <- request.Header.Get("Range")
		}
		return false
	})
	n.mustPull(pinned)
	select {
	case got := <-ranges:
		if got == "" {
			t.Error("the next pull began again")
		}
	default:
		t.Error("the pull went on although nobody waited for it")
	}
}

// TestLayerIsCommittedTwice: garbage collection comes between the second commit of a layer and its use.
func TestLayerIsCommittedTwice(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	data := mustTar(t, registrytest.File("f", strings.Repeat("content", 10_000)))
	fast, err := registrytest.LayerOf(registrytest.Gzip(data))
	must(t, err)
	late, err := registrytest.LayerOf(registrytest.Zstd(data))
	must(t, err)
	pinnedFast, pinnedLate := push(t, r, "fast:1", image(t, fast)), push(t, r, "late:1", image(t, late))
	asked, release := make(chan struct{}), make(chan struct{})
	r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, mustHex(t, late)) {
			close(asked)
			<-release
		}
		return false
	})
	type result struct {
		lease *store.Lease
		err   error
	}
	done := make(chan result, 1)
	go func() {
		lease, err := n.pullWith(t.Context(), pinnedLate)
		done <- result{lease, err}
	}()
	<-asked
	lease, err := n.pull(pinnedFast, "", registry.Credentials{})
	must(t, err)
	lease.Release()
	// The second commit discards its directory. At that moment nobody else has a lease on the layer.
	var once sync.Once
	n.onDiscard = func(path string) {
		if strings.HasPrefix(path, filepath.Join(n.dir, "layers/incoming", mustHex(t, late))) && filepath.Base(filepath.Dir(path)) == "incoming" {
			once.Do(func() { n.collectGarbage(store.GCRequest{All: true}) })
		}
	}
	close(release)
	got := <-done
	must(t, got.err)
	defer got.lease.Release()
	wantFile(t, got.lease.Dirs[0].Name()+"/f", strings.Repeat("content", 10_000))
}
