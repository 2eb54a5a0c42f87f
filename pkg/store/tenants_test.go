package store_test

import (
	"net/http"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

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
