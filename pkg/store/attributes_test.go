package store_test

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestAttributesNeedNoSlot: a layer of attributes is not downloaded, and waits for no download.
func TestAttributesNeedNoSlot(t *testing.T) {
	n := newNode(t, func(n *node) { n.config.MaxConcurrentLayerPulls, n.registry.StallTimeout = 1, time.Minute })
	r, slow := n.startRegistry(registrytest.Options{}), n.startRegistry(registrytest.Options{})
	for i, l := range privateLayers(t) {
		n.pullUnused(push(t, r, fmt.Sprintf("single/%d:1", i), image(t, l)))
	}
	large, l := random(t, "large", 8<<20)
	halfway, release := stopHalfway(t, slow, l)
	defer release()
	var others sync.WaitGroup
	defer others.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pinned := push(t, slow, "large:1", large)
	others.Go(func() { _, _ = n.pullWith(ctx, pinned) })
	<-halfway
	ctx, cancel = context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	lease, err := n.pullWith(ctx, push(t, r, "a:1", image(t, privateLayers(t)...)))
	must(t, err)
	defer lease.Release()
	if len(lease.Image.Layers) != 3 {
		t.Errorf("the image has %d layers", len(lease.Image.Layers))
	}
}

// TestAttributesOfAPublishedImage: a repository that wanted a login becomes public. The layers of its image are public, because others
// pulled them from elsewhere, but nobody has pulled the image without the login before.
func TestAttributesOfAPublishedImage(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	pinned := push(t, r, "team/data:1", image(t, privateLayers(t)...))
	r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		_, _, ok := request.BasicAuth()
		if isPrivate := strings.HasPrefix(request.URL.Path, "/v2/team/"); ok || !isPrivate {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		http.Error(w, "", http.StatusUnauthorized)
		return true
	})
	credentials, err := registry.ParseCredentials(map[string]string{".dockerconfigjson": r.DockerConfig("u", "p")})
	must(t, err)
	lease, err := n.pull(pinned, "", credentials)
	must(t, err)
	defer lease.Release()
	for i, l := range privateLayers(t) {
		n.pullUnused(push(t, r, fmt.Sprintf("public/%d:1", i), image(t, l)))
	}
	if _, err := n.pull(pinned, "", registry.Credentials{}); !errdefs.IsUnauthorized(err) {
		t.Errorf("before it is public: %v", err)
	}
	r.SetFault(nil)
	n.pullUnused(pinned)
	r.Requests()
	n.pullUnused(pinned)
	if requests := r.Requests(); len(requests) > 0 {
		t.Errorf("the registry is asked again for a public image: %q", requests)
	}
}

// TestTooManyDirectoriesWithoutEntries: a layer that has more of them than can be listed needs no list where nothing is below it.
func TestTooManyDirectoriesWithoutEntries(t *testing.T) {
	deep := strings.Repeat(strings.Repeat("n", 39)+"/", 80)
	var long []registrytest.Entry
	for i := range 70 {
		long = append(long, registrytest.File(fmt.Sprint(i, "/", deep, "f"), ""))
	}
	many, private := layer(t, long...), privateLayers(t)
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	n.pullUnused(push(t, r, "alone:1", image(t, many)))
	lease := n.mustPull(push(t, r, "lowest:1", image(t, many, private[0], private[1])))
	if got := attributesOf(t, filepath.Join(view(t, lease), "lib")); got != privateDir {
		t.Errorf("the directory is %s, want %s", got, privateDir)
	}
	_, err := n.pull(push(t, r, "upper:1", image(t, private[0], many)), "", registry.Credentials{})
	wantError(t, err, "directories without entries")
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("%v, want ResourceExhausted", err)
	}
}

// TestAttributesTakeShortTurns: an image whose layer of attributes goes to the store delays no other image.
func TestAttributesTakeShortTurns(t *testing.T) {
	first, n := newNode(t), newNode(t)
	r := first.startRegistry(registrytest.Options{})
	pinned := push(t, r, "slow:1", image(t, privateLayers(t)...))
	top := first.mustPull(pinned).Image.Layers[2].DiffID
	begun, end := make(chan struct{}), make(chan struct{})
	var once sync.Once
	n.onDiscard = func(path string) {
		// The work directory of the layer is emptied before it is unpacked.
		if strings.Contains(path, top.Encoded()) {
			once.Do(func() { close(begun); <-end })
		}
	}
	r = n.startRegistry(registrytest.Options{})
	slow := push(t, r, "slow:1", image(t, privateLayers(t)...))
	other := push(t, r, "other:1", image(t, layer(t, owned("etc", 0o700, 1)), layer(t, registrytest.File("etc/c", "c"))))
	pull := func(ctx context.Context, pinned string) {
		lease, err := n.pullWith(ctx, pinned)
		if err != nil {
			t.Errorf("pull %s: %v", pinned, err)
			return
		}
		lease.Release()
	}
	var pulling sync.WaitGroup
	pulling.Go(func() { pull(t.Context(), slow) })
	select {
	case <-begun:
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		pull(ctx, other)
		cancel()
	case <-time.After(10 * time.Second):
		t.Error("the layer was not unpacked")
	}
	close(end)
	pulling.Wait()
}
