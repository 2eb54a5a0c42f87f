package store_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// incompressible is a layer whose blob is about as large as its file.
func incompressible(size int) registrytest.Entry {
	data := make([]byte, size)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range data {
		data[i] = byte(random.Uint32())
	}
	return registrytest.File("random", string(data))
}

// TestRegistryFails has a registry fail in every way that passes: the pull goes on from where it was.
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
			use := n.mustPull(pinned)
			wantFileSize(t, filepath.Join(use.Dirs[0].Name(), "random"), size)
		})
	}
}

// TestRegistryLies has a registry give what is not asked for: nothing of it stays, and the error says what differed.
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

// TestImageLies has an image whose parts do not fit together.
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

func TestCredentials(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{TLS: true, User: "u", Password: "p"})
	pinned := push(t, r, "team/data:1", image(t, layer(t, registrytest.File("f", "x"))))
	for name, c := range map[string]struct {
		config string
		words  []string
	}{
		"none":             {"", []string{"without credentials"}},
		"wrong":            {r.DockerConfig("u", "wrong"), []string{`as user "u"`}},
		"of another host":  {`{"auths":{"example.com":{"username":"u","password":"p"}}}`, []string{"without credentials"}},
		"of another team":  {fmt.Sprintf(`{"auths":{"%s/other":{"username":"u","password":"p"}}}`, r.Host), []string{"without credentials"}},
		"of the team":      {fmt.Sprintf(`{"auths":{"%s/team":{"username":"u","password":"p"}}}`, r.Host), nil},
		"in base64":        {fmt.Sprintf(`{"auths":{"https://%s/v2/":{"auth":"dTpw"}}}`, r.Host), nil},
		"for all of a net": {strings.Replace(r.DockerConfig("u", "p"), "127.0.0.1", "127.*.0.1", 1), nil},
	} {
		t.Run(name, func(t *testing.T) {
			data := map[string]string{}
			if c.config != "" {
				data[".dockerconfigjson"] = c.config
			}
			credentials, err := registry.ParseCredentials(data)
			must(t, err)
			use, err := n.pull(pinned, "", credentials)
			if c.words != nil {
				wantError(t, err, append(c.words, r.Host, "team/data")...)
				if !errdefs.IsUnauthorized(err) {
					t.Errorf("the error is of another kind: %v", err)
				}
				return
			}
			must(t, err)
			use.Release()
			if _, err := n.GC(t.Context(), store.GCRequest{All: true}); err != nil {
				t.Error(err)
			}
		})
	}
	for name, data := range map[string]map[string]string{
		"basic auth": {"username": "u", "password": "secret"},
		"no JSON":    {".dockerconfigjson": "secret"},
	} {
		_, err := registry.ParseCredentials(data)
		wantError(t, err, "kubectl create secret docker-registry")
		if strings.Contains(err.Error(), "\"secret\"") {
			t.Errorf("%s: the error shows the secret: %v", name, err)
		}
	}
}

// TestNodeCredentialsComeSecond also has the file change while the store goes on.
func TestNodeCredentialsComeSecond(t *testing.T) {
	n := newNode(t)
	config := filepath.Join(n.dir, "config.json")
	r := n.startRegistry(registrytest.Options{User: "u", Password: "p"})
	n.registry.CredentialsFile = config
	must(t, os.WriteFile(config, []byte(r.DockerConfig("u", "old")), 0o600))
	n.restart()
	pinned := push(t, r, "a:1", image(t, layer(t, registrytest.File("f", "x"))))
	_, err := n.pull(pinned, "", registry.Credentials{})
	wantError(t, err, `as user "u"`)
	must(t, os.WriteFile(config, []byte(r.DockerConfig("u", "p")), 0o600))
	n.mustPull(pinned)
	own, err := registry.ParseCredentials(map[string]string{".dockerconfigjson": r.DockerConfig("own", "wrong")})
	must(t, err)
	other := push(t, r, "b:1", image(t, layer(t, registrytest.File("g", "x"))))
	_, err = n.pull(other, "", own)
	wantError(t, err, `as user "own"`)
}

// TestCredentialsStayWithTheirRegistry has registries try to get at credentials that are not theirs.
func TestCredentialsStayWithTheirRegistry(t *testing.T) {
	var mu sync.Mutex
	var stolen []string
	thief := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if authorization := r.Header.Get("Authorization"); authorization != "" {
			stolen = append(stolen, authorization)
		}
		if r.Method == http.MethodPost {
			stolen = append(stolen, "a form")
		}
		http.Error(w, "thanks", http.StatusNotFound)
	}))
	defer thief.Close()
	elsewhere := strings.Replace(thief.URL, "127.0.0.1", "localhost", 1)
	for name, fault := range map[string]registrytest.Fault{
		"redirect": func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			http.Redirect(w, r, elsewhere+"/blob", http.StatusTemporaryRedirect)
			return true
		},
		"token server": func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="x"`, elsewhere+"/token"))
			http.Error(w, "", http.StatusUnauthorized)
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.startRegistry(registrytest.Options{TLS: true, User: "u", Password: "p"})
			pinned := push(t, r, "a:1", image(t, layer(t, registrytest.File("f", "x"))))
			r.SetFault(fault)
			credentials, err := registry.ParseCredentials(map[string]string{".dockerconfigjson": r.DockerConfig("u", "p")})
			must(t, err)
			_, err = n.pull(pinned, "", credentials)
			wantError(t, err, r.Host)
			n.wantNothing(true)
			mu.Lock()
			defer mu.Unlock()
			if len(stolen) > 0 {
				t.Errorf("another host was told %q", stolen)
			}
		})
	}
}

func TestMirror(t *testing.T) {
	n := newNode(t)
	mirror, err := registrytest.Start(registrytest.Options{})
	must(t, err)
	defer mirror.Close()
	pinned := push(t, mirror, "team/data:1", image(t, layer(t, registrytest.File("f", "x"))))
	dir := filepath.Join(n.certsDir, "registry.example")
	must(t, os.MkdirAll(dir, 0o755))
	hosts := filepath.Join(dir, "hosts.toml")
	must(t, os.WriteFile(hosts, []byte(fmt.Sprintf("server = \"https://registry.invalid\"\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", mirror.Host)), 0o644))
	_, id, _ := strings.Cut(pinned, "@")
	n.mustPull("registry.example/team/data@" + id)
	use, err := n.pull("registry.example/team/data:1", "", registry.Credentials{})
	must(t, err)
	use.Release()
	for name, text := range map[string]string{"no TOML": "server = [", "no such capability": "[host.\"http://x\"]\ncapabilities=[\"fly\"]"} {
		must(t, os.WriteFile(hosts, []byte(text), 0o644))
		_, err := n.pull("registry.example/team/data:1", "", registry.Credentials{})
		wantError(t, err, "hosts.toml", "registry.example")
		if !errdefs.IsFailedPrecondition(err) && !errdefs.IsUnavailable(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestManyAskForOneImage counts at the registry.
func TestManyAskForOneImage(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	shared := layer(t, incompressible(1<<20))
	own := layer(t, registrytest.File("f", "x"))
	pinned := push(t, r, "a:1", image(t, shared, own))
	other := push(t, r, "b:1", image(t, shared))
	var group sync.WaitGroup
	for i := range 50 {
		group.Go(func() {
			name := pinned
			if i%5 == 0 {
				name = other
			}
			use, err := n.pull(name, "", registry.Credentials{})
			if err != nil {
				t.Error(err)
				return
			}
			use.Release()
		})
	}
	group.Wait()
	downloads := map[string]int{}
	for _, request := range r.Requests() {
		if strings.HasPrefix(request, "GET ") && strings.Contains(request, "/blobs/") {
			downloads[request[strings.LastIndex(request, ":"):]]++
		}
	}
	for _, hex := range []string{mustHex(t, shared), mustHex(t, own)} {
		if downloads[":"+hex] != 1 {
			t.Errorf("layer %s was downloaded %d times", hex, downloads[":"+hex])
		}
	}
}

// TestPullOutlivesItsRequest has a request end long before its pull.
func TestPullOutlivesItsRequest(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	l := layer(t, incompressible(1<<20))
	pinned := push(t, r, "a:1", image(t, l))
	release, begun := make(chan struct{}), make(chan struct{})
	var downloads atomic.Int64
	r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, mustHex(t, l)) {
			if downloads.Add(1) == 1 {
				close(begun)
			}
			<-release
		}
		return false
	})
	for try := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if try == 0 {
			// This one gives up when the layer is on its way, however long that takes.
			cancel()
			ctx, cancel = context.WithCancel(t.Context())
			go func() {
				<-begun
				cancel()
			}()
		}
		_, err := n.pullWith(ctx, pinned)
		wantError(t, err, "still being pulled", "0 of 1 layers")
		if !errdefs.IsUnavailable(err) {
			t.Error(err)
		}
		cancel()
	}
	close(release)
	n.mustPull(pinned)
	if downloads.Load() != 1 {
		t.Errorf("%d downloads", downloads.Load())
	}
}

// TestDownloadGoesOnAfterRestart ends a store in the middle of a download.
func TestDownloadGoesOnAfterRestart(t *testing.T) {
	const size = 8 << 20
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	l := layer(t, incompressible(size))
	pinned := push(t, r, "a:1", image(t, l))
	halfway := make(chan struct{})
	var once sync.Once
	r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
		if !registrytest.IsBlob(request, mustHex(t, l)) {
			return false
		}
		body, err := l.Compressed()
		must(t, err)
		half := make([]byte, size/2)
		_, err = body.Read(half)
		must(t, err)
		w.Header().Set("Content-Length", strconv.FormatInt(mustSize(t, l), 10))
		_, _ = w.Write(half)
		_ = http.NewResponseController(w).Flush()
		once.Do(func() { close(halfway) })
		<-request.Context().Done()
		return true
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = n.pullWith(ctx, pinned)
	}()
	<-halfway
	blob := filepath.Join(n.dir, "layers/incoming", mustHex(t, l), "blob")
	eventually(t, func() bool {
		info, err := os.Stat(blob)
		return err == nil && info.Size() >= size/4
	})
	cancel()
	<-done
	var ranges []string
	r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, mustHex(t, l)) {
			ranges = append(ranges, request.Header.Get("Range"))
		}
		return false
	})
	n.restart()
	use := n.mustPull(pinned)
	wantFileSize(t, filepath.Join(use.Dirs[0].Name(), "random"), size)
	if len(ranges) != 1 || !strings.HasPrefix(ranges[0], "bytes=") || ranges[0] == "bytes=0-" {
		t.Errorf("the rest was asked for with %q", ranges)
	}
}
