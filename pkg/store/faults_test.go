package store_test

import (
	"bytes"
	"math/rand/v2"
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
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// incompressible returns a file of size bytes that does not compress.
func incompressible(size int) registrytest.Entry {
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	return registrytest.File("random", string(data))
}

// largeLayer returns a layer of one file of size bytes that is not compressed, which takes long under the race detector. Each name has
// another content.
func largeLayer(t *testing.T, name string, size int) v1.Layer {
	t.Helper()
	entry := incompressible(size)
	entry.Content = name + entry.Content
	l, err := registrytest.LayerOf(mustTar(t, entry))
	must(t, err)
	return l
}

// TestRegistryFails checks that a pull resumes after each transient failure of a registry.
func TestRegistryFails(t *testing.T) {
	const size = 4 << 20
	for name, fault := range map[string]func(count int, w http.ResponseWriter, r *http.Request) bool{
		"internal errors": func(count int, w http.ResponseWriter, r *http.Request) bool {
			if count > 3 {
				return false
			}
			http.Error(w, "try again", http.StatusInternalServerError)
			return true
		},
		"too many requests": func(count int, w http.ResponseWriter, r *http.Request) bool {
			if count > 3 {
				return false
			}
			http.Error(w, "slow down", http.StatusTooManyRequests)
			return true
		},
		"connection cut": func(count int, w http.ResponseWriter, r *http.Request) bool {
			if count > 6 {
				return false
			}
			w.(*registrytest.ResponseWriter).CutAfter(size / 8)
			return false
		},
		"connection cut, and no ranges": func(count int, w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") != "" {
				http.Error(w, "what range", http.StatusRequestedRangeNotSatisfiable)
				return true
			}
			if count < 3 {
				w.(*registrytest.ResponseWriter).CutAfter(size / 4 * count)
			}
			return false
		},
		"stall": func(count int, w http.ResponseWriter, r *http.Request) bool {
			if count > 1 {
				return false
			}
			w.Header().Set("Content-Length", strconv.Itoa(size))
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, func(n *node) { n.registry.StallTimeout = time.Second })
			r := n.startRegistry(registrytest.Options{})
			l := layer(t, incompressible(size))
			pinned := push(t, r, "a:1", image(t, l))
			var count atomic.Int64
			r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
				if !registrytest.IsBlob(request, mustHex(t, l)) {
					return false
				}
				return fault(int(count.Add(1)), w, request)
			})
			lease := n.mustPull(pinned)
			wantFileSize(t, filepath.Join(lease.Dirs[0].Name(), "random"), size)
		})
	}
}

// TestRegistryLies checks that wrong content from a registry is refused, that the error says what differs, and that the store
// stays empty.
func TestRegistryLies(t *testing.T) {
	l := layer(t, incompressible(1<<20))
	other := layer(t, registrytest.File("evil", "evil"))
	img := image(t, l)
	manifest, err := img.RawManifest()
	must(t, err)
	otherManifest, err := image(t, other).RawManifest()
	must(t, err)
	config, err := img.ConfigName()
	must(t, err)
	blob := mustHex(t, l)
	compressed, err := l.Compressed()
	must(t, err)
	var content bytes.Buffer
	_, err = content.ReadFrom(compressed)
	must(t, err)
	otherContent := registrytest.Gzip(mustTar(t, registrytest.File("evil", "evil")))
	answer := func(when func(*http.Request) bool, data []byte) registrytest.Fault {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !when(r) {
				return false
			}
			if strings.Contains(r.URL.Path, "/manifests/") {
				w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			}
			w.Header().Set("Content-Length", strconv.Itoa(len(data)))
			_, _ = w.Write(data)
			return true
		}
	}
	isBlob := func(r *http.Request) bool { return registrytest.IsBlob(r, blob) }
	isManifest := func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") }
	isConfig := func(r *http.Request) bool { return registrytest.IsBlob(r, config.Hex) }
	flipped := bytes.Clone(content.Bytes())
	flipped[len(flipped)/2] ^= 1
	for name, c := range map[string]struct {
		fault registrytest.Fault
		words []string
		blobs bool
	}{
		"another blob":         {answer(isBlob, otherContent), []string{blob, "ends after"}, true},
		"one bit":              {answer(isBlob, flipped), []string{blob, "has digest"}, false},
		"one byte more":        {answer(isBlob, append(bytes.Clone(content.Bytes()), 0)), []string{blob, "more than"}, false},
		"one byte less":        {answer(isBlob, content.Bytes()[:content.Len()-1]), []string{blob, "ends after", "tried"}, true},
		"zeros":                {answer(isBlob, make([]byte, content.Len())), []string{blob, "has digest"}, false},
		"another manifest":     {answer(isManifest, otherManifest), []string{"bytes instead of"}, false},
		"manifest with a tail": {answer(isManifest, append(bytes.Clone(manifest), ' ')), []string{"bytes"}, false},
		"another config":       {answer(isConfig, []byte(`{"rootfs":{"type":"layers","diff_ids":[]}}`)), []string{"bytes"}, false},
		"a page in HTML":       {answer(isManifest, []byte("<html>please log in</html>")), []string{"bytes"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.startRegistry(registrytest.Options{})
			pinned := push(t, r, "team/a:1", img)
			r.SetFault(c.fault)
			_, err := n.pull(pinned, "", registry.Credentials{})
			wantError(t, err, append(c.words, r.Host)...)
			n.wantNothing(c.blobs)
			r.SetFault(nil)
			n.mustPull(pinned)
		})
	}
}

// TestImageLies checks that an image with contradicting parts is refused.
func TestImageLies(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	l := layer(t, registrytest.File("f", "x"))
	img := image(t, l)
	config, err := img.ConfigFile()
	must(t, err)
	other, err := layer(t, registrytest.File("g", "x")).DiffID()
	must(t, err)
	config.RootFS.DiffIDs[0] = other
	lying, err := mutate.ConfigFile(img, config)
	must(t, err)
	_, err = n.pull(push(t, r, "a:1", lying), "", registry.Credentials{})
	wantError(t, err, "diff ID", other.String(), r.Host)
	n.wantNothing(false)

	foreign, err := mutate.Append(image(t), mutate.Addendum{Layer: static.NewLayer([]byte("BZh91AY"), types.OCIUncompressedLayer)})
	must(t, err)
	_, err = n.pull(push(t, r, "b:1", foreign), "", registry.Credentials{})
	wantError(t, err, "bzip2")
	n.wantNothing(false)
}

// TestArchiveIsRewrittenWhileItIsRead: of the tar of a root file system no digest is known before it is read. What is read of two versions
// of it must not become the layer of one.
func TestArchiveIsRewrittenWhileItIsRead(t *testing.T) {
	n := newNode(t)
	file := filepath.Join(t.TempDir(), "rootfs.tar")
	before := mustTar(t, registrytest.File("one", "old"), registrytest.File("two", "old"))
	after := mustTar(t, registrytest.File("one", "new"), registrytest.File("two", "new"))
	must(t, os.WriteFile(file, before, 0o644))
	must(t, os.Chtimes(file, time.Unix(1_700_000_000, 0), time.Unix(1_700_000_000, 0)))
	// The import discards what is in the work directory of the layer when it has looked at the archive, and before it unpacks it.
	var once sync.Once
	n.onDiscard = func(discarded string) {
		if filepath.Dir(discarded) != filepath.Join(n.dir, "layers/incoming") || strings.HasPrefix(filepath.Base(discarded), "archive-") {
			return
		}
		once.Do(func() {
			to, err := os.OpenFile(file, os.O_WRONLY, 0)
			must(t, err)
			defer to.Close()
			half := len(before) / 2
			_, err = to.WriteAt(after[half:], int64(half))
			must(t, err)
		})
	}
	_, err := n.importFile(file, "")
	wantError(t, err, "rootfs.tar", "changed while it was read", "retry")
	if !errdefs.IsUnavailable(err) {
		t.Errorf("want Unavailable, got %v", err)
	}
	n.wantNothing(false)
	lease, err := n.importFile(file, "")
	must(t, err)
	lease.Release()
}
