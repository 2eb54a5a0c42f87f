package store_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

func (n *node) collectGarbage(request store.GCRequest) store.GCResult {
	n.t.Helper()
	collected, err := n.GC(n.t.Context(), request)
	must(n.t, err)
	return collected
}

// TestCollect checks that garbage collection removes unused layers only.
func TestCollect(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	shared := layer(t, registrytest.File("shared", "x"))
	var pinned []string
	for i := range 4 {
		pinned = append(pinned, push(t, r, fmt.Sprint("i", i, ":1"), image(t, shared, layer(t, registrytest.File("own", fmt.Sprint(i))))))
	}
	held := n.mustPull(pinned[0])
	for _, name := range pinned[1:] {
		lease, err := n.pull(name, "", registry.Credentials{})
		must(t, err)
		lease.Release()
	}
	used, err := n.pull(pinned[1], "", registry.Credentials{})
	must(t, err)
	n.used = map[digest.Digest][]string{}
	for _, layer := range used.Image.Layers {
		n.used[layer.DiffID] = []string{"volume"}
	}
	used.Release()

	if collected := n.collectGarbage(store.GCRequest{}); len(collected.Layers) != 0 {
		t.Errorf("%d layers were collected from a disk that is not full", len(collected.Layers))
	}
	if collected := n.collectGarbage(store.GCRequest{All: true, DryRun: true}); len(collected.Layers) != 2 || len(n.Layers()) != 5 {
		t.Errorf("%d layers would be collected, %d are left", len(collected.Layers), len(n.Layers()))
	}
	if collected := n.collectGarbage(store.GCRequest{All: true}); len(collected.Layers) != 2 {
		t.Errorf("%d layers were collected", len(collected.Layers))
	}
	for _, dir := range held.Dirs {
		if _, err := os.Stat(dir.Name()); err != nil {
			t.Error(err)
		}
	}
	if images := n.Images(); len(images) != 2 {
		t.Errorf("%d images are left", len(images))
	}
	n.restart()
	if images, layers := n.Images(), n.Layers(); len(images) != 2 || len(layers) != 3 {
		t.Errorf("after a restart there are %d images and %d layers", len(images), len(layers))
	}
	n.mustPull(pinned[3])
}

// TestCollectsTheLeastRecentlyUsed checks the order of garbage collection, also after a restart.
func TestCollectsTheLeastRecentlyUsed(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	var pinned []string
	for i := range 4 {
		name := push(t, r, fmt.Sprint("i", i, ":1"), image(t, layer(t, registrytest.File("own", fmt.Sprint(i)))))
		pinned = append(pinned, name)
		lease, err := n.pull(name, "", registry.Credentials{})
		must(t, err)
		lease.Release()
		layerFile := filepath.Join(n.dir, "layers/sha256", lease.Image.Layers[0].DiffID.Encoded(), "layer.json")
		at := time.Now().Add(time.Duration(i-10) * time.Hour)
		must(t, os.Chtimes(layerFile, at, at))
	}
	n.restart()
	again, err := n.pull(pinned[0], "", registry.Credentials{})
	must(t, err)
	again.Release()
	n.collectGarbage(store.GCRequest{})
	n.restart()
	n.collectGarbage(store.GCRequest{Bytes: 1})
	n.collectGarbage(store.GCRequest{Bytes: 1})
	left := map[string]bool{}
	for _, image := range n.Images() {
		left[image.Names[0][len(r.Host)+1:]] = true
	}
	if len(left) != 2 || !left["i0:1"] && !left["i0@"+strings.SplitN(pinned[0], "@", 2)[1]] {
		t.Errorf("these are left: %v", left)
	}
}

// TestCollectByThresholdsAndAge checks the thresholds of disk usage and the minimum age.
func TestCollectByThresholdsAndAge(t *testing.T) {
	dir := newDisk(t, "size=64m")
	n := newNodeIn(t, dir, func(n *node) {
		n.config.GC = store.GCConfig{HighThreshold: 50, LowThreshold: 30, MinAge: time.Hour, Interval: time.Hour}
	})
	r := n.startRegistry(registrytest.Options{})
	for i := range 5 {
		large := largeLayer(t, fmt.Sprint(i), 8<<20)
		lease, err := n.pull(push(t, r, fmt.Sprint("i", i, ":1"), image(t, large)), "", registry.Credentials{})
		must(t, err)
		lease.Release()
		eventually(t, func() bool { return len(mustGlob(t, filepath.Join(dir, "trash/*"))) == 0 })
	}
	if collected := n.collectGarbage(store.GCRequest{}); len(collected.Layers) != 0 {
		t.Errorf("%d layers were collected although they were just used", len(collected.Layers))
	}
	n.config.GC.MinAge = 0
	n.restart()
	// 40 of 64 MiB are used. Three layers must be removed to use less than 30 %.
	if collected := n.collectGarbage(store.GCRequest{}); len(collected.Layers) != 3 {
		t.Errorf("%d layers were collected", len(collected.Layers))
	}
}

// TestPrefetchedIsNotCollected checks that garbage collection does not remove prefetched images.
func TestPrefetchedIsNotCollected(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	push(t, r, "kept:1", image(t, layer(t, registrytest.File("f", "kept"))))
	lease, err := n.pull(push(t, r, "other:1", image(t, layer(t, registrytest.File("f", "other")))), "", registry.Credentials{})
	must(t, err)
	lease.Release()
	n.config.Prefetch = []string{r.Host + "/kept:1"}
	n.restart()
	eventually(t, func() bool { return len(n.Images()) == 2 })
	n.collectGarbage(store.GCRequest{All: true})
	if images := n.Images(); len(images) != 1 || images[0].Names[0] != r.Host+"/kept:1" {
		t.Errorf("these are left: %+v", images)
	}
	// Until the name is resolved, images that were pulled by it are protected.
	r.Close()
	n.restart()
	n.collectGarbage(store.GCRequest{All: true})
	if images := n.Images(); len(images) != 1 {
		t.Errorf("%d images are left", len(images))
	}
}

// TestPrefetchedNameStays: what pods pull does not make the node forget what the operator prefetched.
func TestPrefetchedNameStays(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{User: "u", Password: "p"})
	credentials, err := registry.ParseCredentials(map[string]string{".dockerconfigjson": r.DockerConfig("u", "p")})
	must(t, err)
	n.registry.CredentialsFile = filepath.Join(n.dir, "config.json")
	must(t, os.WriteFile(n.registry.CredentialsFile, []byte(r.DockerConfig("u", "p")), 0o600))
	img := image(t, layer(t, registrytest.File("f", "kept")))
	pinned := push(t, r, "team/kept:1", img)
	n.config.Prefetch = []string{r.Host + "/team/kept:1"}
	n.restart()
	eventually(t, func() bool { return len(n.Images()) == 1 && len(n.Images()[0].Prefetched) == 1 })
	for i := range 20 {
		lease, err := n.pull(push(t, r, fmt.Sprintf("others/%d:1", i), img), "", credentials)
		must(t, err)
		lease.Release()
	}
	r.Close()
	// Pods have had so many other images accepted that this is forgotten.
	must(t, os.Remove(filepath.Join(n.dir, "access")))
	n.restart()
	n.collectGarbage(store.GCRequest{All: true})
	if images := n.Images(); len(images) != 1 {
		t.Errorf("%d images are left", len(images))
	}
	n.pullUnused(pinned)
}

// TestPrefetchedNameWithADigest: the digest says which image a name stands for, whatever its tag is.
func TestPrefetchedNameWithADigest(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	tag := r.Host + "/kept:1"
	_, kept, _ := strings.Cut(push(t, r, "kept:1", image(t, layer(t, registrytest.File("f", "kept")))), "@")
	_, other, _ := strings.Cut(push(t, r, "kept:2", image(t, layer(t, registrytest.File("f", "other")))), "@")
	pullBoth := func() {
		for _, id := range []string{kept, other} {
			lease, err := n.pull(tag+"@"+id, "", registry.Credentials{})
			must(t, err)
			lease.Release()
		}
	}
	wantKept := func() {
		t.Helper()
		n.collectGarbage(store.GCRequest{All: true})
		if images := n.Images(); len(images) != 1 || images[0].Digest.String() != kept {
			t.Errorf("these are left: %+v", images)
		}
	}
	pullBoth()
	r.SetFault(func(w http.ResponseWriter, _ *http.Request) bool {
		http.Error(w, "", http.StatusServiceUnavailable)
		return true
	})
	t.Run("digest in the configuration", func(t *testing.T) {
		n.config.Prefetch = []string{tag + "@" + kept}
		n.restart()
		wantKept()
	})
	t.Run("digest of a pod", func(t *testing.T) {
		r.SetFault(nil)
		n.config.Prefetch = []string{tag}
		n.restart()
		eventually(t, func() bool {
			pullBoth()
			n.collectGarbage(store.GCRequest{All: true})
			images := n.Images()
			return len(images) == 1 && images[0].Digest.String() == kept
		})
		pullBoth()
		r.Close()
		n.restart()
		wantKept()
	})
}

// TestCollectsWhileLayersAreUsed checks that garbage collection does not remove leased layers while others lease and release
// them.
func TestCollectsWhileLayersAreUsed(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	var pinned []string
	for i := range 6 {
		own := layer(t, registrytest.File("own", fmt.Sprint(i)))
		pinned = append(pinned, push(t, r, fmt.Sprint("i", i, ":1"), image(t, layer(t, registrytest.File("f", "content")), own)))
	}
	// So often, however fast the disk is.
	const enough = 100
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var uses, collected atomic.Int64
	unfinished := func() bool {
		return (uses.Load() < enough || collected.Load() < enough) && ctx.Err() == nil && !t.Failed()
	}
	var workers sync.WaitGroup
	workers.Go(func() {
		for unfinished() {
			result, err := n.GC(t.Context(), store.GCRequest{All: true})
			if err != nil {
				t.Error(err)
			}
			collected.Add(int64(len(result.Layers)))
		}
	})
	for range 4 {
		workers.Go(func() {
			for unfinished() {
				lease, err := n.pull(pinned[rand.IntN(len(pinned))], "", registry.Credentials{})
				if err != nil {
					if !strings.Contains(err.Error(), "was removed after its pull") {
						t.Error(err)
					}
					continue
				}
				uses.Add(1)
				if content, err := os.ReadFile(filepath.Join(lease.Dirs[1].Name(), "f")); string(content) != "content" {
					t.Errorf("a layer that is held lost its file: %v", err)
				}
				lease.Release()
			}
		})
	}
	workers.Wait()
	if ctx.Err() != nil {
		t.Errorf("only %d uses and %d layers collected in 5 minutes", uses.Load(), collected.Load())
	}
}

// TestStateThatCannotBeReadCollectsNothing checks that a new store removes invalid layers and images.
func TestStateThatCannotBeReadCollectsNothing(t *testing.T) {
	n := newNode(t)
	must(t, os.MkdirAll(filepath.Join(n.dir, "layers/sha256/junk/tree"), 0o755))
	must(t, os.WriteFile(filepath.Join(n.dir, "images/junk.json"), []byte("{"), 0o600))
	n.restart()
	n.wantNothing(false)
}
