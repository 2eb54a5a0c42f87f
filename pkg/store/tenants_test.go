package store_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestWaitingFetchGetsNoLayerOfOthers: a registry lets the node wait for the blob of a private layer, until somebody else has pulled it.
func TestWaitingFetchGetsNoLayerOfOthers(t *testing.T) {
	n := newNode(t)
	private := layer(t, registrytest.File("f", "private"))
	owner := n.startRegistry(registrytest.Options{User: "u", Password: "p"})
	evil := n.startRegistry(registrytest.Options{})
	pinned, pinnedEvil := push(t, owner, "team/data:1", image(t, private)), push(t, evil, "evil/data:1", image(t, private))
	hex := mustHex(t, private)
	asked, stop := make(chan struct{}), make(chan struct{})
	var first sync.Once
	evil.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		if !registrytest.IsBlob(request, hex) {
			return false
		}
		first.Do(func() { close(asked) })
		select {
		case <-stop:
		case <-request.Context().Done():
		}
		http.Error(w, "", http.StatusNotFound)
		return true
	})
	ofEvil := make(chan error, 1)
	go func() {
		lease, err := n.pullWith(t.Context(), pinnedEvil)
		if err == nil {
			lease.Release()
		}
		ofEvil <- err
	}()
	<-asked
	credentials, err := registry.ParseCredentials(map[string]string{".dockerconfigjson": owner.DockerConfig("u", "p")})
	must(t, err)
	lease, err := n.pull(pinned, "", credentials)
	must(t, err)
	defer lease.Release()
	close(stop)
	if err := <-ofEvil; !errdefs.IsNotFound(err) {
		t.Errorf("the pull from the other registry: %v", err)
	}
}

// TestResumedDownloadIsNotPublic: a download that began with a login goes on where the registry asks for none.
func TestResumedDownloadIsNotPublic(t *testing.T) {
	const size = 4 << 20
	for name, c := range map[string]struct {
		first string
		whole bool
		want  bool
	}{
		"a half with a login":       {first: "private/data:1"},
		"all of it with a login":    {first: "private/data:1", whole: true},
		"a half without a login":    {first: "public/other:1", want: true},
		"all of it without a login": {first: "public/other:1", whole: true, want: true},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, func(n *node) { n.config.AbandonAfter = time.Millisecond })
			r := n.startRegistry(registrytest.Options{User: "u", Password: "p", Private: "private/"})
			evil := n.startRegistry(registrytest.Options{})
			l := layer(t, incompressible(size))
			credentials, err := registry.ParseCredentials(map[string]string{".dockerconfigjson": r.DockerConfig("u", "p")})
			must(t, err)
			first, second := push(t, r, c.first, image(t, l)), push(t, r, "public/data:1", image(t, l))
			halfway, _ := stopHalfway(t, r, l)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			named, err := registry.ParseName(first)
			must(t, err)
			canonical := named.(reference.Canonical)
			request := make(chan error, 1)
			go func() {
				_, err := n.Pull(ctx, canonical, credentials, "")
				request <- err
			}()
			<-halfway
			eventually(t, func() bool { return n.downloaded(l) >= size/4 })
			cancel()
			wantError(t, <-request, "still being pulled")
			eventually(t, func() bool {
				_, err := n.Progress(canonical.Digest())
				return errdefs.IsNotFound(err)
			})
			if c.whole {
				// The driver was killed before it had unpacked the blob.
				body, err := l.Compressed()
				must(t, err)
				content, err := io.ReadAll(body)
				must(t, err)
				blobs := mustGlob(t, filepath.Join(n.dir, "layers/incoming", mustHex(t, l)+"-*", "blob"))
				must(t, os.WriteFile(blobs[0], content, 0o600))
			}
			var ranges []string
			r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
				if registrytest.IsBlob(request, mustHex(t, l)) {
					ranges = append(ranges, request.Header.Get("Range"))
				}
				return false
			})
			lease, err := n.pull(second, "", credentials)
			must(t, err)
			lease.Release()
			if c.whole && len(ranges) != 0 || !c.whole && (len(ranges) != 1 || ranges[0] == "") {
				t.Errorf("the rest was asked for with %q", ranges)
			}
			// Whoever knows the digest names it in a registry of his own.
			pinned := push(t, evil, "evil/data:1", image(t, l))
			evil.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
				if registrytest.IsBlob(request, mustHex(t, l)) {
					http.Error(w, "", http.StatusNotFound)
					return true
				}
				return false
			})
			lease, err = n.pull(pinned, "", registry.Credentials{})
			if err == nil {
				lease.Release()
			}
			if got := err == nil; got != c.want {
				t.Errorf("everybody may use the layer: %t, %v", got, err)
			}
			// Who has the login may still use it.
			if lease, err = n.pull(first, "", credentials); err != nil {
				t.Error(err)
			} else {
				lease.Release()
			}
		})
	}
}

// TestPublicImageWithAPrivateLayer: the registry gives the manifest to everybody, and the layer was on the node for a login. Nobody has
// shown that the registry gives everybody the layer.
func TestPublicImageWithAPrivateLayer(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{User: "u", Password: "p", Private: "private/"})
	l := layer(t, registrytest.File("f", "private"))
	private := push(t, r, "private/data:1", image(t, l))
	public := push(t, r, "public/data:1", image(t, l, layer(t, registrytest.File("g", "x"))))
	credentials, err := registry.ParseCredentials(map[string]string{".dockerconfigjson": r.DockerConfig("u", "p")})
	must(t, err)
	pull := func(pinned string, credentials registry.Credentials) error {
		lease, err := n.pull(pinned, "", credentials)
		if err == nil {
			lease.Release()
		}
		return err
	}
	must(t, pull(private, credentials))
	must(t, pull(public, credentials))
	r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, mustHex(t, l)) {
			http.Error(w, "", http.StatusNotFound)
			return true
		}
		return false
	})
	if err := pull(public, registry.Credentials{}); !errdefs.IsNotFound(err) {
		t.Errorf("who has no login gets the image: %v", err)
	}
	r.Close()
	must(t, pull(public, credentials))
}

// TestAttributesForManyAtTheSameTime pulls images of the same layers from two registries. They need the same layer of attributes.
func TestAttributesForManyAtTheSameTime(t *testing.T) {
	n := newNode(t)
	private := n.startRegistry(registrytest.Options{User: "u", Password: "p"})
	public := n.startRegistry(registrytest.Options{})
	login, err := registry.ParseCredentials(map[string]string{".dockerconfigjson": private.DockerConfig("u", "p")})
	must(t, err)
	var pulls sync.WaitGroup
	for i := range 6 {
		name := fmt.Sprint("team-", i, "/data:1")
		for pinned, credentials := range map[string]registry.Credentials{
			push(t, private, name, image(t, privateLayers(t)...)): login,
			push(t, public, name, image(t, privateLayers(t)...)):  {},
		} {
			pulls.Go(func() {
				lease, err := n.pull(pinned, "", credentials)
				if err != nil {
					t.Error(err)
					return
				}
				defer lease.Release()
				if len(lease.Dirs) != 3 {
					t.Errorf("%s has %d layers", pinned, len(lease.Dirs))
				}
			})
		}
	}
	pulls.Wait()
	if layers := n.Layers(); len(layers) != 3 {
		t.Errorf("there are %d layers", len(layers))
	}
	// A pull that another one has overtaken leaves its download, and nothing of the layer of attributes.
	top := n.Images()[0].Layers[2].DiffID
	if left := mustGlob(t, filepath.Join(n.dir, "layers/incoming", top.Encoded()+"*")); len(left) > 0 {
		t.Errorf("there is still %q", left)
	}
}
