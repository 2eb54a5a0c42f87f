package portable

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
	"github.com/overlay-csi/overlay-csi/test/registrytest/distribution"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestOtherImages: with the operator's login, images that are no snapshots are neither deleted nor copied to where a tenant may read them.
func TestOtherImages(t *testing.T) {
	server, err := registrytest.Start(registrytest.Options{Handler: distribution.New(t.Context(), true)})
	must(t, err)
	t.Cleanup(server.Close)
	certs := t.TempDir()
	must(t, server.Configure(certs))
	r := NewRegistry(
		registry.NewClient(registry.Config{CertsDir: certs, StallTimeout: time.Minute, Backoff: time.Millisecond}), image.NewDocuments())
	app, err := registrytest.ImageOf(map[string]string{"a": "1"})
	must(t, err)
	name, err := server.Push(t.Context(), "team/app:1", app)
	must(t, err)
	h, err := Parse("push:" + server.Host + "/team/app:1")
	must(t, err)
	if err := r.Delete(t.Context(), h, "", nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "no snapshot") {
		t.Errorf("an image that is no snapshot: %v", err)
	}
	if _, err := r.Get(t.Context(), h, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "no snapshot") {
		t.Errorf("it is no snapshot, and is there: %v", err)
	}

	hash, err := app.Digest()
	must(t, err)
	tagged, err := reference.Parse("oci://" + name)
	must(t, err)
	layer, err := tagged.WithDigest(digest.Digest(hash.String()))
	must(t, err)
	if h, err = New(server.Host+"/team/snapshots", "s", "n"); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		resolved reference.Digests
		layers   int
	}{
		"a volume that no pod had": {nil, 2},
		"a volume that a pod had":  {reference.Digests{layer.String(): digest.Digest(hash.String())}, 1},
	} {
		id, err := r.Push(t.Context(), Snapshot{
			Handle: h, Name: "s", Volume: "v", Layers: []reference.Reference{layer}, Resolved: c.resolved, WriteTar: EmptyTar,
		}, nil)
		must(t, err)
		made, err := r.Read(t.Context(), h, nil, "")
		must(t, err)
		// The first layer is the image of the snapshot itself, and what it consists of needs no other login.
		layers, err := made.LayersFor(nil)
		if err != nil || made.Digest != id || len(layers) != c.layers || layers[len(layers)-1] != layer && c.layers == 2 {
			t.Errorf("%s: got %v, %v", what, layers, err)
		}
		must(t, r.Delete(t.Context(), h, "", nil))
		if _, err := r.Get(t.Context(), h, nil); !errdefs.IsNotFound(err) {
			t.Errorf("%s: after its snapshot was deleted: %v", what, err)
		}
	}
}
