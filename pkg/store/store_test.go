package store_test

import (
	"bytes"
	"context"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/distribution/reference"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/store/access"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// node is a store with its environment.
type node struct {
	*store.Store
	t        *testing.T
	dir      string
	certsDir string
	registry registry.Config
	config   store.Config
	stop     func()
	used     map[digest.Digest][]string
	root     *os.File
	trash    *dataroot.Deleter
	// onDiscard is called before a path is discarded.
	onDiscard func(path string)
}

func (n *node) LayersInUse() (map[digest.Digest][]string, error) { return n.used, nil }

// newNode returns a node with a store in a new directory.
func newNode(t *testing.T, change ...func(*node)) *node {
	t.Helper()
	needs.Root(t)
	dir, remove, err := drivertest.WorkDir()
	must(t, err)
	t.Cleanup(func() { must(t, remove()) })
	return newNodeIn(t, dir, change...)
}

func newNodeIn(t *testing.T, dir string, change ...func(*node)) *node {
	t.Helper()
	n := &node{t: t, dir: dir, certsDir: filepath.Join(dir, "certs.d")}
	must(t, os.MkdirAll(filepath.Join(dir, "trash"), 0o700))
	must(t, os.MkdirAll(n.certsDir, 0o700))
	root, err := os.Open(dir)
	must(t, err)
	t.Cleanup(func() { root.Close() })
	n.root = root
	n.trash, err = dataroot.NewDeleter(filepath.Join(dir, "trash"))
	must(t, err)
	t.Cleanup(func() { must(t, n.trash.Close()) })
	n.registry = registry.Config{CertsDir: n.certsDir, StallTimeout: 5 * time.Second, Backoff: 10 * time.Millisecond}
	n.config = store.Config{Access: access.Config{Policy: access.NeverVerifyPreloadedImages}}
	n.config.MaxConcurrentLayerPulls = 4
	n.config.GC = store.GCConfig{HighThreshold: 100, LowThreshold: 100, Interval: time.Hour}
	for _, c := range change {
		c(n)
	}
	n.start()
	t.Cleanup(func() { n.stop(); n.Close() })
	return n
}

// Dir implements the interface of the data root.
func (n *node) Dir() *os.File { return n.root }

func (n *node) Discard(path string) error {
	if n.onDiscard != nil {
		n.onDiscard(path)
	}
	return n.trash.Discard(path)
}

func (n *node) AwaitDeleted(ctx context.Context) error { return n.trash.Wait(ctx) }

// start opens the store and runs it.
func (n *node) start() {
	n.t.Helper()
	ctx, stop := context.WithCancel(n.t.Context())
	s, err := store.New(ctx, n, n, registry.NewClient(n.registry), n.config)
	must(n.t, err)
	var running sync.WaitGroup
	running.Go(func() { s.Run(ctx) })
	running.Go(func() { n.trash.Run(ctx) })
	n.Store, n.stop = s, func() { stop(); running.Wait() }
}

// restart closes the store and opens it again.
func (n *node) restart() {
	n.t.Helper()
	n.stop()
	n.Close()
	n.start()
}

// startRegistry starts a registry and configures the node for it.
func (n *node) startRegistry(options registrytest.Options) *registrytest.Registry {
	n.t.Helper()
	r, err := registrytest.Start(options)
	must(n.t, err)
	n.t.Cleanup(r.Close)
	must(n.t, r.Configure(n.certsDir))
	return r
}

// pull pulls an image by tag or digest.
func (n *node) pull(image, path string, credentials registry.Credentials) (*store.Lease, error) {
	named, err := registry.ParseName(image)
	must(n.t, err)
	canonical, ok := named.(reference.Canonical)
	if !ok {
		id, err := n.Resolve(n.t.Context(), named, credentials)
		if err != nil {
			return nil, err
		}
		canonical, err = reference.WithDigest(named, id)
		must(n.t, err)
	}
	return n.Pull(n.t.Context(), canonical, credentials, path)
}

func (n *node) pullWith(ctx context.Context, pinned string) (*store.Lease, error) {
	named, err := registry.ParseName(pinned)
	must(n.t, err)
	return n.Pull(ctx, named.(reference.Canonical), registry.Credentials{}, "")
}

func (n *node) mustPull(image string) *store.Lease {
	n.t.Helper()
	lease, err := n.pull(image, "", registry.Credentials{})
	if err != nil {
		n.t.Fatalf("pull %s: %v", image, err)
	}
	n.t.Cleanup(lease.Release)
	return lease
}

// wantNothing checks that the store has neither layers nor partial downloads. If blobs is true it allows partial downloads.
func (n *node) wantNothing(blobs bool) {
	n.t.Helper()
	for _, dir := range []string{"layers/sha256", "layers/incoming", "images"} {
		err := filepath.WalkDir(filepath.Join(n.dir, dir), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || path == filepath.Join(n.dir, dir) {
				return err
			}
			if blobs && (slices.Contains([]string{"blob", "holders"}, filepath.Base(path)) || filepath.Base(filepath.Dir(path)) == "incoming") {
				return nil
			}
			n.t.Errorf("the store has %s", path)
			return nil
		})
		must(n.t, err)
	}
}

func push(t *testing.T, r *registrytest.Registry, repository string, what remote.Taggable) string {
	t.Helper()
	pinned, err := r.Push(t.Context(), repository, what)
	must(t, err)
	return pinned
}

func layer(t *testing.T, entries ...registrytest.Entry) v1.Layer {
	t.Helper()
	l, err := registrytest.Layer(entries...)
	must(t, err)
	return l
}

func image(t *testing.T, layers ...v1.Layer) v1.Image {
	t.Helper()
	i, err := registrytest.Image(layers...)
	must(t, err)
	return i
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", words)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error %q does not contain %q", err, word)
		}
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the condition is still false")
		}
	}
}

func wantFile(t *testing.T, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	} else if string(got) != want {
		t.Errorf("%s has %q instead of %q", path, got, want)
	}
}

// TestPull pulls from registries with and without TLS and passwords.
func TestPull(t *testing.T) {
	plain, err := registrytest.Tar(registrytest.File("a", "plain"))
	must(t, err)
	other, err := registrytest.Tar(registrytest.File("b", "zstd"), registrytest.Dir("d"), registrytest.File("d/c", "c"))
	must(t, err)
	for name, options := range map[string]registrytest.Options{
		"plain HTTP":           {},
		"TLS":                  {TLS: true},
		"TLS and a password":   {TLS: true, User: "u", Password: "p:äß"},
		"HTTP with a password": {User: "u", Password: "p"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.startRegistry(options)
			bottom, err := registrytest.LayerOf(plain)
			must(t, err)
			middle, err := registrytest.LayerOf(registrytest.Zstd(other))
			must(t, err)
			top := layer(t, registrytest.File("a", "gzip"))
			pinned := push(t, r, "team/data:1", image(t, bottom, middle, top))
			credentials, err := registry.ParseCredentials(map[string]string{".dockerconfigjson": r.DockerConfig(options.User, options.Password)})
			must(t, err)
			lease, err := n.pull(r.Host+"/team/data:1", "", credentials)
			must(t, err)
			defer lease.Release()
			if len(lease.Dirs) != 3 || !strings.HasSuffix(pinned, lease.Image.Digest.String()) {
				t.Fatalf("%d layers of %s: %+v", len(lease.Dirs), pinned, lease.Image)
			}
			wantFile(t, filepath.Join(lease.Dirs[0].Name(), "a"), "gzip")
			wantFile(t, filepath.Join(lease.Dirs[1].Name(), "d/c"), "c")
			wantFile(t, filepath.Join(lease.Dirs[2].Name(), "a"), "plain")
			r.Close()
			again, err := n.pull(pinned, "", credentials)
			must(t, err)
			again.Release()
			n.restart()
			again, err = n.pull(pinned, "", credentials)
			must(t, err)
			again.Release()
		})
	}
}

// TestLayersAreStoredOnce checks that images share layers.
func TestLayersAreStoredOnce(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	shared := layer(t, registrytest.File("shared", "shared"))
	one := push(t, r, "a:1", image(t, shared, layer(t, registrytest.File("one", "1"))))
	two := push(t, r, "b:1", image(t, shared, layer(t, registrytest.File("two", "2")), shared))
	n.mustPull(one)
	r.Requests()
	lease := n.mustPull(two)
	blob, err := shared.Digest()
	must(t, err)
	for _, request := range r.Requests() {
		if strings.Contains(request, blob.Hex) {
			t.Errorf("the shared layer was downloaded again: %s", request)
		}
	}
	if layers := n.Layers(); len(layers) != 3 {
		t.Errorf("%d layers instead of 3", len(layers))
	}
	if len(lease.Dirs) != 2 {
		t.Errorf("a layer that is there twice is mounted twice: %d directories", len(lease.Dirs))
	}
}

// TestArtifacts pulls an artifact with each format of blobs.
func TestArtifacts(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	dir, err := registrytest.Tar(registrytest.Dir("conf"), registrytest.File("conf/x", "x"))
	must(t, err)
	title := func(path string) map[string]string { return map[string]string{"org.opencontainers.image.title": path} }
	weights := bytes.Repeat([]byte("weights"), 100_000)
	artifact, err := registrytest.Artifact(
		registrytest.ArtifactFile{Data: weights, MediaType: "application/octet-stream", Annotations: title("model/weights.bin")},
		// ORAS pushes a tar as a file, and a directory as a tar to unpack.
		registrytest.ArtifactFile{Data: registrytest.Gzip(dir), Annotations: title("data.tar.gz")},
		registrytest.ArtifactFile{
			Data: registrytest.Gzip(dir),
			Annotations: map[string]string{
				"org.opencontainers.image.title": "conf",
				"io.deis.oras.content.unpack":    "true",
			},
		},
		registrytest.ArtifactFile{
			Data: []byte("config"), MediaType: "application/vnd.cncf.model.weight.config.v1.raw",
			Annotations: map[string]string{"org.cncf.model.filepath": "config.json"},
		},
		registrytest.ArtifactFile{
			Data: []byte("former name"), MediaType: "application/vnd.cnai.model.weight.v1.raw",
			Annotations: map[string]string{"org.cnai.model.filepath": "weights/1", "org.opencontainers.image.title": "1"},
		},
		registrytest.ArtifactFile{
			Data: mustTar(t, registrytest.File("doc/README", "former tar")), MediaType: "application/vnd.cnai.model.doc.v1.tar",
			Annotations: map[string]string{"org.cnai.model.filepath": "doc"},
		},
		// A Helm chart, and a blob without annotations.
		registrytest.ArtifactFile{
			Data:      registrytest.Zstd(mustTar(t, registrytest.File("Chart.yaml", "chart"))),
			MediaType: "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
		},
		registrytest.ArtifactFile{Data: []byte("unnamed"), MediaType: "application/vnd.example"},
	)
	must(t, err)
	lease := n.mustPull(push(t, r, "model:1", artifact))
	found := map[string]string{}
	for _, dir := range lease.Dirs {
		must(t, filepath.WalkDir(dir.Name(), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return err
			}
			content, err := os.ReadFile(path)
			found[strings.TrimPrefix(path, dir.Name()+"/")] = string(content)
			return err
		}))
	}
	unnamed := "sha256-" + digest.FromString("unnamed").Encoded()
	want := map[string]string{
		"model/weights.bin": string(weights),
		"data.tar.gz":       string(registrytest.Gzip(dir)),
		"conf/x":            "x",
		"config.json":       "config",
		"weights/1":         "former name",
		"doc/README":        "former tar",
		"Chart.yaml":        "chart",
		unnamed:             "unnamed",
	}
	for name, content := range want {
		if found[name] != content {
			t.Errorf("%s: %d bytes instead of %d", name, len(found[name]), len(content))
		}
	}
	if len(found) != len(want) {
		t.Errorf("the files %q", slices.Sorted(maps.Keys(found)))
	}
}

func mustTar(t *testing.T, entries ...registrytest.Entry) []byte {
	t.Helper()
	data, err := registrytest.Tar(entries...)
	must(t, err)
	return data
}
