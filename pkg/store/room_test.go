package store_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
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

// sized is a layer that its manifest describes with another size.
type sized struct {
	v1.Layer
	size int64
}

func (l sized) Size() (int64, error) { return l.size, nil }

// random is an image of one layer with a file that does not compress. Each name has another content.
func random(t *testing.T, name string, size int) (v1.Image, v1.Layer) {
	t.Helper()
	l := largeLayer(t, name, size)
	return image(t, l), l
}

// pullUnused pulls an image that nothing uses afterwards.
func (n *node) pullUnused(pinned string) {
	n.t.Helper()
	lease, err := n.pull(pinned, "", registry.Credentials{})
	must(n.t, err)
	lease.Release()
}

// stopHalfway has a registry stop in the middle of the blob of a layer, until the test calls release or the request ends. halfway is
// closed there.
func stopHalfway(t *testing.T, r *registrytest.Registry, l v1.Layer) (halfway <-chan struct{}, release func()) {
	t.Helper()
	reached, released := make(chan struct{}), make(chan struct{})
	var once sync.Once
	size := mustSize(t, l)
	r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, mustHex(t, l)) {
			w.(*registrytest.ResponseWriter).StopAfter(int(size/2), func() {
				once.Do(func() { close(reached) })
				select {
				case <-released:
				case <-request.Context().Done():
				}
			})
		}
		return false
	})
	return reached, sync.OnceFunc(func() { close(released) })
}

// TestNothingIsCollectedForWhatCannotFit: what an image says of its size must not cost others their layers.
func TestNothingIsCollectedForWhatCannotFit(t *testing.T) {
	one, two := layer(t, registrytest.File("f", "1")), layer(t, registrytest.File("f", "2"))
	for name, c := range map[string]struct {
		layers   []v1.Layer
		maxBytes int64
		word     string
	}{
		"one pebibyte":                          {[]v1.Layer{sized{one, 1 << 50}}, 0, "to download"},
		"sizes that overflow":                   {[]v1.Layer{sized{one, 1 << 62}, sized{two, 1 << 62}}, 0, "to download"},
		"more than a layer may have":            {[]v1.Layer{sized{one, 48<<20 + 1}}, 48 << 20, "--max-layer-size"},
		"more than all unused layers make room": {[]v1.Layer{sized{one, 40 << 20}}, 0, "to download"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := newDisk(t, "size=64m")
			n := newNodeIn(t, dir, func(n *node) { n.config.MaxLayerBytes = c.maxBytes })
			r := n.startRegistry(registrytest.Options{})
			unused, _ := random(t, "unused", 4<<20)
			n.pullUnused(push(t, r, "unused:1", unused))
			push(t, r, "a:0", image(t, one, two))
			_, err := n.pull(push(t, r, "a:1", image(t, c.layers...)), "", registry.Credentials{})
			wantError(t, err, c.word)
			if !errdefs.IsResourceExhausted(err) {
				t.Errorf("want ResourceExhausted, got %v", err)
			}
			if layers := n.Layers(); len(layers) != 1 {
				t.Errorf("the unused layer was collected: %d layers", len(layers))
			}
		})
	}
}

// TestSizeOfAPresentLayer: a layer that is on the disk may be collected amid the pull. What the image says of its size counts then.
func TestSizeOfAPresentLayer(t *testing.T) {
	one, two := layer(t, registrytest.File("f", "1")), layer(t, registrytest.File("f", "2"))
	n := newNodeIn(t, newDisk(t, "size=64m"))
	r := n.startRegistry(registrytest.Options{})
	n.pullUnused(push(t, r, "a:0", image(t, one)))
	push(t, r, "a:1", image(t, two))
	_, err := n.pull(push(t, r, "a:2", image(t, sized{one, 1 << 62}, sized{two, 1 << 62})), "", registry.Credentials{})
	wantError(t, err, "to download", "can ever fit")
	_, err = n.pull(push(t, r, "a:3", image(t, sized{one, 1 << 62}, two)), "", registry.Credentials{})
	wantError(t, err, "to download", "can ever fit")
}

// TestPullsReserveTheirSpace: of two pulls that do not fit together, the first one gets its space.
func TestPullsReserveTheirSpace(t *testing.T) {
	const size = 24 << 20
	n := newNodeIn(t, newDisk(t, "size=64m"))
	r := n.startRegistry(registrytest.Options{})
	a, layerOfA := random(t, "a", size)
	b, layerOfB := random(t, "b", size)
	pinnedA, pinnedB := push(t, r, "a:1", a), push(t, r, "b:1", b)
	halfway, release := stopHalfway(t, r, layerOfA)
	defer release()
	ofA := make(chan error, 1)
	go func() {
		lease, err := n.pullWith(t.Context(), pinnedA)
		if err == nil {
			lease.Release()
		}
		ofA <- err
	}()
	<-halfway
	r.Requests()
	_, err := n.pull(pinnedB, "", registry.Credentials{})
	wantError(t, err, "to download", "other pulls")
	for _, request := range r.Requests() {
		if strings.HasPrefix(request, "GET") && strings.Contains(request, mustHex(t, layerOfB)) {
			t.Errorf("it was downloaded: %s", request)
		}
	}
	release()
	if err := <-ofA; err != nil {
		t.Errorf("the first pull failed: %v", err)
	}
	n.mustPull(pinnedB)
}

// TestPullKeepsWhatItHas makes room for a layer of an image whose other layer is the least recently used one of the node.
func TestPullKeepsWhatItHas(t *testing.T) {
	n := newNodeIn(t, newDisk(t, "size=64m"))
	r := n.startRegistry(registrytest.Options{})
	old, layerOfOld := random(t, "old", 10<<20)
	newer, _ := random(t, "newer", 14<<20)
	_, missing := random(t, "missing", 22<<20)
	n.pullUnused(push(t, r, "old:1", old))
	n.pullUnused(push(t, r, "newer:1", newer))
	pinned := push(t, r, "old:2", image(t, layerOfOld, missing))
	r.Requests()
	n.mustPull(pinned)
	for _, request := range r.Requests() {
		if strings.HasPrefix(request, "GET") && strings.Contains(request, mustHex(t, layerOfOld)) {
			t.Errorf("what was there was downloaded again: %s", request)
		}
	}
}

// TestDownloadLeavesTheReserve: somebody else fills the disk amid a download.
func TestDownloadLeavesTheReserve(t *testing.T) {
	dir := newDisk(t, "size=64m")
	n := newNodeIn(t, dir, func(n *node) { n.config.MinFreeDiskPercent = 25 })
	r := n.startRegistry(registrytest.Options{})
	img, l := random(t, "a", 20<<20)
	pinned := push(t, r, "a:1", img)
	halfway, release := stopHalfway(t, r, l)
	defer release()
	done := make(chan error, 1)
	go func() {
		lease, err := n.pullWith(t.Context(), pinned)
		if err == nil {
			lease.Release()
		}
		done <- err
	}()
	<-halfway
	must(t, os.WriteFile(filepath.Join(dir, "others"), make([]byte, 24<<20), 0o644))
	release()
	err := <-done
	wantError(t, err, "--min-free-disk-percent", dir)
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("want ResourceExhausted, got %v", err)
	}
	n.wantNothing(false)
}

// TestUnpackingMakesRoom: how large a layer is, is known only when it is unpacked.
func TestUnpackingMakesRoom(t *testing.T) {
	pattern := incompressible(1000).Content
	var files []registrytest.Entry
	for i := range 120 {
		files = append(files, registrytest.File(fmt.Sprint(i), "x"))
	}
	for name, c := range map[string]struct {
		disk   string
		unused v1.Layer
		layer  v1.Layer
	}{
		"bytes":  {"size=64m", largeLayer(t, "", 24<<20), layer(t, registrytest.File("big", strings.Repeat(pattern, 50_000)))},
		"inodes": {"size=64m,nr_inodes=200", layer(t, files...), layer(t, append(files, registrytest.File("more", "x"))...)},
	} {
		for _, reserve := range []int{0, 10} {
			t.Run(fmt.Sprintf("%s with a reserve of %d %%", name, reserve), func(t *testing.T) {
				n := newNodeIn(t, newDisk(t, c.disk), func(n *node) { n.config.MinFreeDiskPercent = reserve })
				r := n.startRegistry(registrytest.Options{})
				n.pullUnused(push(t, r, "unused:1", image(t, c.unused)))
				n.mustPull(push(t, r, "a:1", image(t, c.layer)))
				if layers := n.Layers(); len(layers) != 1 {
					t.Errorf("%d layers are on the disk", len(layers))
				}
			})
		}
	}
}

// TestBombCollectsLittle: a small blob that unpacks to more than the disk has must not cost others all of their layers.
func TestBombCollectsLittle(t *testing.T) {
	const unused = 8
	n := newNodeIn(t, newDisk(t, "size=64m"))
	r := n.startRegistry(registrytest.Options{})
	for i := range unused {
		img, _ := random(t, fmt.Sprint(i), 4<<20)
		n.pullUnused(push(t, r, fmt.Sprintf("unused/%d:1", i), img))
	}
	bomb := layer(t, registrytest.File("big", strings.Repeat(incompressible(1000).Content, 80_000)))
	size := mustSize(t, bomb)
	_, err := n.pull(push(t, r, "bomb:1", image(t, bomb)), "", registry.Credentials{})
	if err == nil {
		t.Fatal("the layer fits")
	}
	// Both times, a part of a layer more than was asked for.
	most := 2 + int(20*size>>22)
	if left := len(n.Layers()); left < unused-most {
		t.Errorf("%d of %d layers are left after a blob of %d bytes: %v", left, unused, size, err)
	}
}

// TestCompressedArchiveMakesRoom: a compressed archive is decompressed to the disk before anything is known of its layers.
func TestCompressedArchiveMakesRoom(t *testing.T) {
	n := newNodeIn(t, newDisk(t, "size=128m"), func(n *node) { n.config.MinFreeDiskPercent = 10 })
	r := n.startRegistry(registrytest.Options{})
	unused, _ := random(t, "unused", 56<<20)
	n.pullUnused(push(t, r, "unused:1", unused))
	must(t, n.AwaitDeleted(t.Context()))
	must(t, os.WriteFile(filepath.Join(n.dir, "others"), make([]byte, 32<<20), 0o644))
	img, _ := random(t, "a", 36<<20)
	archive := archives(t, t.TempDir(), img)["docker archive in zstd"]
	lease, err := n.importFile(archive, "")
	must(t, err)
	defer lease.Release()
	if layers := n.Layers(); len(layers) != 1 {
		t.Errorf("%d layers are on the disk", len(layers))
	}
}

// TestCollectByInodes: a disk without inodes is as full as one without bytes.
func TestCollectByInodes(t *testing.T) {
	n := newNodeIn(t, newDisk(t, "size=64m,nr_inodes=200"), func(n *node) {
		n.config.GC = store.GCConfig{HighThreshold: 50, LowThreshold: 30, Interval: time.Hour}
	})
	r := n.startRegistry(registrytest.Options{})
	var files []registrytest.Entry
	for i := range 120 {
		files = append(files, registrytest.File(fmt.Sprint(i), "x"))
	}
	n.pullUnused(push(t, r, "unused:1", image(t, layer(t, files...))))
	if collected := n.collectGarbage(store.GCRequest{}); len(collected.Layers) != 1 {
		t.Errorf("%d layers were collected", len(collected.Layers))
	}
}

// TestUnfinishedDownloadsMakeRoom: what a pull has left must not make those of others fail.
func TestUnfinishedDownloadsMakeRoom(t *testing.T) {
	for name, makeRoom := range map[string]func(n *node, r *registrytest.Registry){
		"gc --all": func(n *node, _ *registrytest.Registry) { n.collectGarbage(store.GCRequest{All: true}) },
		"another pull": func(n *node, r *registrytest.Registry) {
			img, _ := random(n.t, "b", 24<<20)
			n.pullUnused(push(n.t, r, "b:1", img))
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNodeIn(t, newDisk(t, "size=64m"), func(n *node) { n.config.AbandonAfter = time.Millisecond })
			r := n.startRegistry(registrytest.Options{})
			img, l := random(t, "a", 24<<20)
			pinned := push(t, r, "a:1", img)
			halfway, release := stopHalfway(t, r, l)
			defer release()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			request := make(chan error, 1)
			go func() {
				_, err := n.pullWith(ctx, pinned)
				request <- err
			}()
			<-halfway
			eventually(t, func() bool { return n.downloaded(l) >= 8<<20 })
			n.collectGarbage(store.GCRequest{All: true})
			if n.downloaded(l) == 0 {
				t.Error("a download under way was removed")
			}
			cancel()
			wantError(t, <-request, "still being pulled")
			_, id, _ := strings.Cut(pinned, "@")
			eventually(t, func() bool {
				_, err := n.Progress(digest.Digest(id))
				return errdefs.IsNotFound(err)
			})
			// Others take so much that the download is in the way.
			must(t, os.WriteFile(filepath.Join(n.dir, "others"), make([]byte, 12<<20), 0o644))
			if n.downloaded(l) == 0 {
				t.Fatal("the download is not kept")
			}
			makeRoom(n, r)
			if left := n.downloaded(l); left > 0 {
				t.Errorf("%d bytes are left of the download", left)
			}
		})
	}
}
