package store_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// documents serves manifests and configurations that no registry would accept, by their digests. A document is made when it is requested,
// so that the test does not hold them all.
type documents map[string]func() []byte

func (d documents) add(make func() []byte) digest.Digest {
	id := digest.FromBytes(make())
	d[id.String()] = make
	return id
}

func (d documents) serve(w http.ResponseWriter, r *http.Request) bool {
	make, ok := d[path.Base(r.URL.Path)]
	if !ok {
		return false
	}
	data := make()
	w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
	w.Header().Set("Docker-Content-Digest", path.Base(r.URL.Path))
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	if r.Method == http.MethodGet {
		_, _ = w.Write(data)
	}
	return true
}

// heap returns the bytes of live objects on the heap.
func heap() int64 {
	// The second collection frees what finalizers of the first one held.
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

// TestImageRecordsAreBounded pulls hundreds of images that each have one tiny layer as often as an image may have layers.
func TestImageRecordsAreBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("hundreds of pulls take a minute under the race detector")
	}
	const images, maxHeap, maxDisk = 600, 40 << 20, 16 << 20
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	pull := func(content string) store.Image {
		lease, err := n.pull(push(t, r, content+":1", image(t, layer(t, registrytest.File("f", content)))), "", registry.Credentials{})
		must(t, err)
		lease.Release()
		return lease.Image
	}
	inUse, unused := pull("used"), pull("unused")
	n.used = map[digest.Digest][]string{}
	for _, layer := range inUse.Layers {
		n.used[layer.DiffID] = []string{"volume"}
	}
	tiny := layer(t, registrytest.File("f", "x"))
	push(t, r, "team/a:1", image(t, tiny))
	documents := documents{}
	r.SetFault(documents.serve)
	repeat := func(text string) string { return strings.TrimSuffix(strings.Repeat(text+",", 500), ",") }
	diffID, err := tiny.DiffID()
	must(t, err)
	config := documents.add(func() []byte {
		return fmt.Appendf(nil, `{"os":"linux","rootfs":{"type":"layers","diff_ids":[%s]}}`, repeat(strconv.Quote(diffID.String())))
	})
	manifest := func(i int) func() []byte {
		return func() []byte {
			return fmt.Appendf(nil, `{"schemaVersion":2,"annotations":{"i":"%d"},"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[%s]}`, i,
				types.OCIConfigJSON, config, len(documents[config.String()]()),
				repeat(fmt.Sprintf(`{"mediaType":%q,"digest":"sha256:%s","size":%d}`, types.OCILayer, mustHex(t, tiny), mustSize(t, tiny))))
		}
	}
	before := heap()
	var last digest.Digest
	for i := range images {
		last = documents.add(manifest(i))
		lease, err := n.pullWith(t.Context(), r.Host+"/team/a@"+last.String())
		must(t, err)
		lease.Release()
	}
	// The connections to the registry have buffers.
	r.Close()
	check := func() {
		t.Helper()
		used := heap() - before
		t.Logf("the heap has %d MiB more", used>>20)
		if used > maxHeap {
			t.Errorf("the heap has %d MiB more; want at most %d", used>>20, maxHeap>>20)
		}
		var disk int64
		for _, file := range mustGlob(t, filepath.Join(n.dir, "images/*")) {
			info, err := os.Stat(file)
			must(t, err)
			disk += info.Size()
		}
		if disk > maxDisk {
			t.Errorf("the records of images have %d MiB; want at most %d", disk>>20, maxDisk>>20)
		}
		has := func(id digest.Digest) bool {
			return slices.ContainsFunc(n.Images(), func(image store.Image) bool { return image.Digest == id })
		}
		if !has(last) || !has(inUse.Digest) {
			t.Errorf("the last image is present: %t; the image that a volume uses is present: %t", has(last), has(inUse.Digest))
		}
		if has(unused.Digest) {
			t.Error("the image that was pulled first is present")
		}
		if layers := len(n.Layers()); layers != 3 {
			t.Errorf("the store has %d layers; want 3", layers)
		}
	}
	check()
	n.restart()
	check()
}

// TestTooLargeRecordIsDiscarded starts with the record of an image and that of a layer that earlier drivers could write.
func TestTooLargeRecordIsDiscarded(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	small := push(t, r, "small:1", image(t, layer(t, registrytest.File("f", "small"))))
	large, err := n.pull(push(t, r, "large:1", image(t, layer(t, registrytest.File("f", "large")))), "", registry.Credentials{})
	must(t, err)
	large.Release()
	n.mustPull(small)
	record := large.Image
	record.Layers[0].MediaType = strings.Repeat("x", 64<<20)
	data, err := json.Marshal(record)
	must(t, err)
	imagePath := filepath.Join(n.dir, "images", record.Digest.Encoded()+".json")
	must(t, os.WriteFile(imagePath, data, 0o600))
	layerPath := filepath.Join(n.dir, "layers/sha256", record.Layers[0].DiffID.Encoded(), "layer.json")
	data, err = json.Marshal(store.Layer{Version: 1, DiffID: record.Layers[0].DiffID, FileName: record.Layers[0].MediaType})
	must(t, err)
	must(t, os.WriteFile(layerPath, data, 0o600))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	n.restart()
	runtime.ReadMemStats(&after)
	if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 16<<20 {
		t.Errorf("the start allocated %d MiB", allocated>>20)
	}
	for _, path := range []string{imagePath, layerPath} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if images := n.Images(); len(images) != 1 || !strings.HasSuffix(small, images[0].Digest.String()) {
		t.Errorf("%d images are left", len(images))
	}
}

// TestImageWithoutALayerIsForgotten starts after a crash between the removal of a layer and that of the images that contain it.
func TestImageWithoutALayerIsForgotten(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	lease := n.mustPull(push(t, r, "i:1", image(t, layer(t, registrytest.File("f", "one")), layer(t, registrytest.File("f", "two")))))
	n.stop()
	n.Close()
	must(t, n.Discard(filepath.Join(n.dir, "layers/sha256", lease.Image.Layers[0].DiffID.Encoded())))
	n.start()
	if records, err := os.ReadDir(filepath.Join(n.dir, "images")); err != nil || len(records) != 0 {
		t.Errorf("records of images are left: %v (%v)", records, err)
	}
}
