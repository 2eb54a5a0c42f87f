package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/image/compose"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
	"github.com/overlay-csi/overlay-csi/test/registrytest/distribution"
)

// startDistribution starts a registry that knows which repository has which blob.
func startDistribution(t *testing.T, options registrytest.Options) *registrytest.Registry {
	t.Helper()
	options.Handler = distribution.New(t.Context(), true)
	registry, err := registrytest.Start(options)
	must(t, err)
	t.Cleanup(registry.Close)
	return registry
}

// newPushClient returns a client of registries with short pauses.
func newPushClient(t *testing.T, registries ...*registrytest.Registry) *Client {
	t.Helper()
	certs := filepath.Join(t.TempDir(), "certs.d")
	for _, registry := range registries {
		must(t, registry.Configure(certs))
	}
	return NewClient(Config{CertsDir: certs, StallTimeout: time.Minute, Backoff: time.Millisecond})
}

func repositoryOf(t *testing.T, client *Client, name string, credentials Credentials) *Repository {
	t.Helper()
	named, err := ParseName(name)
	must(t, err)
	return client.Repository(named, credentials)
}

// pushed is an image that is pushed: a layer on a base of two layers.
type pushed struct {
	made  compose.Image
	layer compose.Layer
	base  *Repository
}

// newPushed pushes the base, and makes the image.
func newPushed(t *testing.T, client *Client, at *registrytest.Registry, credentials Credentials) pushed {
	t.Helper()
	lower, err := registrytest.ImageOf(map[string]string{"a": "1"}, map[string]string{"b": "2"})
	must(t, err)
	ref, err := at.Push(t.Context(), "team/base:1", lower)
	must(t, err)
	base := repositoryOf(t, client, ref, credentials)
	root, err := base.Resolve(t.Context())
	must(t, err)
	read, err := compose.ReadBase(t.Context(), root, everyPlatform{}, image.NewDocuments(), base.Fetch)
	must(t, err)
	content, err := registrytest.Tar(registrytest.File("c", strings.Repeat("3", 1<<20)))
	must(t, err)
	layer, err := compose.NewLayer(t.Context(), func(_ context.Context, to io.Writer) error {
		_, err := to.Write(content)
		return err
	})
	must(t, err)
	made, err := read.With(layer, ref, compose.Details{Created: time.Unix(1_700_000_000, 0)})
	must(t, err)
	at.Requests()
	return pushed{made, layer, base}
}

type everyPlatform struct{}

func (everyPlatform) Match(ocispec.Platform) bool     { return true }
func (everyPlatform) Less(_, _ ocispec.Platform) bool { return false }

// push pushes the image.
func (p pushed) push(ctx context.Context, to *Repository) error {
	blobs := []Content{Bytes(p.made.Config.Descriptor, p.made.Config.Data), {Descriptor: p.layer.Descriptor, Open: p.layer.Open}}
	for _, layer := range p.made.Layers[:len(p.made.Layers)-1] {
		blobs = append(blobs, p.base.Content(layer))
	}
	var sent atomic.Int64
	err := to.Push(ctx, Bytes(p.made.Manifest.Descriptor, p.made.Manifest.Data), blobs, &sent)
	total := p.made.Config.Descriptor.Size + p.made.Manifest.Descriptor.Size
	for _, layer := range p.made.Layers {
		total += layer.Size
	}
	if err == nil && sent.Load() != total {
		return fmt.Errorf("%d bytes were counted, of %d", sent.Load(), total)
	}
	return err
}

// check has another client pull the image, and compare all digests.
func (p pushed) check(t *testing.T, registry *registrytest.Registry, repository string) {
	t.Helper()
	registry.SetFault(nil)
	ref, err := name.ParseReference(registry.Host+"/"+repository, name.Insecure)
	must(t, err)
	pulled, err := remote.Image(ref)
	must(t, err)
	must(t, validate.Image(pulled))
	id, err := pulled.Digest()
	must(t, err)
	if id.String() != p.made.Manifest.Descriptor.Digest.String() {
		t.Errorf("the registry has %s, and %s was pushed", id, p.made.Manifest.Descriptor.Digest)
	}
	registry.Requests()
}

func count(requests []string, prefix string) (n int) {
	for _, request := range requests {
		if strings.HasPrefix(request, prefix) {
			n++
		}
	}
	return n
}

func TestPush(t *testing.T) {
	for name, c := range map[string]struct {
		// elsewhere has the base in another registry.
		elsewhere bool
		// fault is that of the registry that is pushed to.
		fault registrytest.Fault
		// uploads is the number of blobs that are sent.
		uploads int
	}{
		"base in the registry":         {uploads: 2},
		"base in another registry":     {elsewhere: true, uploads: 4},
		"registry that does not mount": {fault: withoutMounts, uploads: 4},
	} {
		t.Run(name, func(t *testing.T) {
			to := startDistribution(t, registrytest.Options{})
			from := to
			if c.elsewhere {
				from = startDistribution(t, registrytest.Options{})
			}
			client := newPushClient(t, to, from)
			what := newPushed(t, client, from, Credentials{})
			to.SetFault(c.fault)
			must(t, what.push(t.Context(), repositoryOf(t, client, to.Host+"/team/app:2", Credentials{})))
			if uploads := count(to.Requests(), "PUT /v2/team/app/blobs/"); uploads != c.uploads {
				t.Errorf("%d blobs were sent, want %d", uploads, c.uploads)
			}
			what.check(t, to, "team/app:2")
			must(t, what.push(t.Context(), repositoryOf(t, client, to.Host+"/team/app:2", Credentials{})))
			if requests := to.Requests(); count(requests, "PUT") > 0 {
				t.Errorf("what the registry has was sent again: %v", requests)
			}
		})
	}
}

// withoutMounts is a registry that ignores from where it may take a blob.
func withoutMounts(_ http.ResponseWriter, r *http.Request) bool {
	query := r.URL.Query()
	query.Del("mount")
	query.Del("from")
	r.URL.RawQuery = query.Encode()
	return false
}

// abort cuts the connection.
func abort(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }

// TestInterruptedPush cuts the connection at each request of a push: once in the middle of its content, if it has any, and once after the
// registry has done what it says. Where the registry is gone from there on, a later push sends what is missing.
func TestInterruptedPush(t *testing.T) {
	handler := distribution.New(t.Context(), true)
	cuts := map[string]registrytest.Fault{
		"during": func(_ http.ResponseWriter, r *http.Request) bool {
			_, _ = io.CopyN(io.Discard, r.Body, 1000)
			panic(http.ErrAbortHandler)
		},
		"after": func(_ http.ResponseWriter, r *http.Request) bool {
			handler.ServeHTTP(discard{}, r)
			panic(http.ErrAbortHandler)
		},
	}
	registry, err := registrytest.Start(registrytest.Options{Handler: handler})
	must(t, err)
	t.Cleanup(registry.Close)
	client := newPushClient(t, registry)
	what := newPushed(t, client, registry, Credentials{})
	const requests = 11
	for when, cut := range cuts {
		for _, forGood := range []bool{false, true} {
			if forGood && when != "during" {
				continue
			}
			for at := range int64(requests) {
				repository := fmt.Sprintf("%s-%v/%d:1", when, forGood, at)
				t.Run(repository, func(t *testing.T) {
					var seen atomic.Int64
					registry.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
						if n := seen.Add(1) - 1; strings.Contains(r.URL.Path, "/team/") || n < at || n > at && !forGood {
							return false
						}
						return cut(w, r)
					})
					err := what.push(t.Context(), repositoryOf(t, client, registry.Host+"/"+repository, Credentials{}))
					if seen.Load() <= at && err == nil {
						t.Skipf("the push has %d requests", seen.Load())
					}
					if forGood {
						if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), registry.Host) {
							t.Errorf("the error is %v", err)
						}
						registry.SetFault(nil)
						err = what.push(t.Context(), repositoryOf(t, client, registry.Host+"/"+repository, Credentials{}))
					}
					must(t, err)
					what.check(t, registry, repository)
				})
			}
		}
	}
}

// discard is an answer that nobody gets.
type discard struct{}

func (discard) Header() http.Header                 { return http.Header{} }
func (discard) Write(data []byte) (int, error)      { return len(data), nil }
func (discard) WriteHeader(int)                     {}
func (discard) ReadFrom(r io.Reader) (int64, error) { return io.Copy(io.Discard, r) }

// TestPushGoesOn: what arrived before a push failed is not sent again.
func TestPushGoesOn(t *testing.T) {
	registry := startDistribution(t, registrytest.Options{})
	client := newPushClient(t, registry)
	what := newPushed(t, client, registry, Credentials{})
	to := repositoryOf(t, client, registry.Host+"/team/app:2", Credentials{})
	registry.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
		return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") && abort(w, r)
	})
	if err := what.push(t.Context(), to); !errdefs.IsUnavailable(err) {
		t.Errorf("the error is %v", err)
	}
	registry.SetFault(nil)
	registry.Requests()
	must(t, what.push(t.Context(), to))
	requests := registry.Requests()
	if blobs, all := count(requests, "PUT /v2/team/app/blobs/"), count(requests, "PUT"); blobs != 0 || all != 1 {
		t.Errorf("blobs were sent again: %v", requests)
	}
	what.check(t, registry, "team/app:2")
}

// answerWith answers requests of a method for a path with a status and an error code.
func answerWith(method, path string, status int, code string) registrytest.Fault {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != method || !strings.Contains(r.URL.Path, path) {
			return false
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"no"}]}`, code)
		return true
	}
}

func TestPushIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		fault registrytest.Fault
		kind  error
		text  string
	}{
		"login missing": {
			answerWith(http.MethodPost, "/app/blobs/", http.StatusUnauthorized, "UNAUTHORIZED"),
			errdefs.ErrUnauthenticated, "may push to repository team/app",
		},
		"login without the right": {
			answerWith(http.MethodPost, "/app/blobs/", http.StatusForbidden, "DENIED"),
			errdefs.ErrPermissionDenied, "may push to repository team/app",
		},
		"no such repository": {
			answerWith(http.MethodPost, "/app/blobs/", http.StatusNotFound, "NAME_UNKNOWN"),
			errdefs.ErrNotFound, "create repository team/app",
		},
		"registry that is read-only": {
			answerWith(http.MethodPost, "/app/blobs/", http.StatusMethodNotAllowed, "UNSUPPORTED"),
			errdefs.ErrFailedPrecondition, "takes no pushes",
		},
		"content that is too large": {
			answerWith(http.MethodPut, "/app/blobs/", http.StatusRequestEntityTooLarge, "SIZE_INVALID"),
			errdefs.ErrFailedPrecondition, "raise its limit",
		},
		"manifest that is refused": {
			answerWith(http.MethodPut, "/app/manifests/", http.StatusBadRequest, "MANIFEST_INVALID"),
			errdefs.ErrFailedPrecondition, "",
		},
		"blob that is always lost": {
			answerWith(http.MethodPut, "/app/manifests/", http.StatusNotFound, "MANIFEST_BLOB_UNKNOWN"),
			errdefs.ErrUnavailable, "lost a blob",
		},
		"base blob that is gone": {func(w http.ResponseWriter, r *http.Request) bool {
			return answerWith(http.MethodGet, "/base/blobs/", http.StatusNotFound, "BLOB_UNKNOWN")(w, r) || withoutMounts(w, r)
		}, errdefs.ErrNotFound, "team/base"},
		"base blob that differs": {func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/base/blobs/") {
				_, _ = w.Write(bytes.Repeat([]byte("x"), 10_000))
				return true
			}
			return withoutMounts(w, r)
		}, errdefs.ErrFailedPrecondition, "expected size"},
	} {
		t.Run(name, func(t *testing.T) {
			registry := startDistribution(t, registrytest.Options{})
			client := newPushClient(t, registry)
			what := newPushed(t, client, registry, Credentials{})
			registry.SetFault(c.fault)
			err := what.push(t.Context(), repositoryOf(t, client, registry.Host+"/team/app:2", Credentials{}))
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), registry.Host) {
				t.Errorf("the error is %v", err)
			}
			if len(err.Error()) > 2*maxMessage {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

// TestPushAfterBlobIsLost: a registry may collect a blob between the question for it and the manifest.
func TestPushAfterBlobIsLost(t *testing.T) {
	registry := startDistribution(t, registrytest.Options{})
	client := newPushClient(t, registry)
	what := newPushed(t, client, registry, Credentials{})
	var lost atomic.Bool
	registry.SetFault(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") && lost.CompareAndSwap(false, true) {
			ctx := context.WithoutCancel(r.Context())
			target := "/v2/team/app/blobs/" + what.layer.Descriptor.Digest.String()
			registry.Bypass(discard{}, (&http.Request{Method: http.MethodDelete, URL: &url.URL{Path: target}, Body: http.NoBody}).WithContext(ctx))
		}
		return false
	})
	must(t, what.push(t.Context(), repositoryOf(t, client, registry.Host+"/team/app:2", Credentials{})))
	if !lost.Load() {
		t.Error("no blob was lost")
	}
	what.check(t, registry, "team/app:2")
}

// TestPushLayerThatChanged: what is sent is what was described.
func TestPushLayerThatChanged(t *testing.T) {
	registry := startDistribution(t, registrytest.Options{})
	client := newPushClient(t, registry)
	descriptor := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("one"), Size: 3}
	for name, data := range map[string]string{"other": "two", "long": "three", "short": "1"} {
		t.Run(name, func(t *testing.T) {
			to := repositoryOf(t, client, registry.Host+"/team/app:2", Credentials{})
			err := to.Push(t.Context(), Bytes(descriptor, []byte(data)), nil, &atomic.Int64{})
			if !errors.Is(err, image.ErrContentMismatch) {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

// TestPushToSilentRegistry: a registry that stops reading, or does not answer, holds a push for a bounded time.
func TestPushToSilentRegistry(t *testing.T) {
	registry := startDistribution(t, registrytest.Options{})
	client := newPushClient(t, registry)
	client.config.StallTimeout = 300 * time.Millisecond
	large := bytes.Repeat([]byte("x"), 16<<20)
	descriptor := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(large), Size: int64(len(large))}
	for name, c := range map[string]struct {
		read int64
		want error
	}{"stops reading": {1000, errNotTaking}, "does not answer": {descriptor.Size, errNoAnswer}} {
		t.Run(name, func(t *testing.T) {
			ended := make(chan struct{})
			defer close(ended)
			registry.SetFault(func(_ http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodPut {
					return false
				}
				_, _ = io.CopyN(io.Discard, r.Body, c.read)
				<-ended
				return true
			})
			to := repositoryOf(t, client, registry.Host+"/team/app:2", Credentials{})
			err := (&upload{repository: to, what: Bytes(descriptor, large), sent: &atomic.Int64{}}).attempt(t.Context())
			if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), c.want.Error()) {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

// TestPushesAtATime: all pushes of a client share the number of blobs that are sent at a time.
func TestPushesAtATime(t *testing.T) {
	registry := startDistribution(t, registrytest.Options{})
	client := newPushClient(t, registry)
	var mu sync.Mutex
	var now, most int
	registry.SetFault(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			// The others arrive, if they were sent.
			time.Sleep(10 * time.Millisecond)
			mu.Lock()
			now--
			mu.Unlock()
		}
		return false
	})
	var blobs []Content
	for i := range 20 {
		data := []byte(fmt.Sprint(i))
		descriptor := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}
		blobs = append(blobs, Bytes(descriptor, data))
	}
	to := repositoryOf(t, client, registry.Host+"/team/app:2", Credentials{})
	manifest := Bytes(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("m"), Size: 1}, []byte("m"))
	must(t, to.Push(t.Context(), manifest, blobs, &atomic.Int64{}))
	if most != maxSending {
		t.Errorf("%d blobs were sent at a time, want %d", most, maxSending)
	}
}
