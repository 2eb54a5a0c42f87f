package store_test

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// index returns an index of images by platform.
func index(t *testing.T, images map[string]v1.Image) v1.ImageIndex {
	t.Helper()
	made := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for platform, image := range images {
		parsed, err := v1.ParsePlatform(platform)
		must(t, err)
		made = mutate.AppendManifests(made, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: parsed}})
	}
	return made
}

// TestIndex checks which manifest of an index is pulled.
func TestIndex(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	here := platforms.Format(platforms.DefaultSpec())
	other := "linux/s390x"
	of := func(content string) v1.Image { return image(t, layer(t, registrytest.File("f", content))) }
	// BuildKit adds attestations with the platform unknown/unknown to an index.
	many := index(t, map[string]v1.Image{here: of("here"), other: of("other"), "unknown/unknown": of("attestation")})
	pinned := push(t, r, "many:1", many)
	lease, err := n.pull(r.Host+"/many:1", "", registry.Credentials{})
	must(t, err)
	defer lease.Release()
	wantFile(t, filepath.Join(lease.Dirs[0].Name(), "f"), "here")
	if !strings.HasSuffix(pinned, lease.Image.Digest.String()) || lease.Image.Manifest == lease.Image.Digest ||
		!strings.HasPrefix(lease.Image.Platform, "linux/") {
		t.Errorf("of the index %s: %+v", pinned, lease.Image)
	}
	others := index(t, map[string]v1.Image{other: of("other"), "windows/amd64": of("w")})
	_, err = n.pull(push(t, r, "other:1", others), "", registry.Credentials{})
	wantError(t, err, "platform", other, "windows/amd64")
	for name, only := range map[string]v1.ImageIndex{
		"another":     index(t, map[string]v1.Image{other: of("another"), "unknown/unknown": of("attestation")}),
		"windows":     index(t, map[string]v1.Image{"windows/amd64": of("windows")}),
		"noplatform":  mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: of("noplatform")}),
		"unspecified": index(t, map[string]v1.Image{"unknown/unknown": of("unspecified")}),
	} {
		wantFile(t, filepath.Join(n.mustPull(push(t, r, name+":1", only)).Dirs[0].Name(), "f"), name)
	}
	inner := mutate.IndexAddendum{Add: index(t, map[string]v1.Image{here: of("nested")})}
	nested := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), inner)
	lease, err = n.pull(push(t, r, "nested:1", nested), "", registry.Credentials{})
	must(t, err)
	wantFile(t, filepath.Join(lease.Dirs[0].Name(), "f"), "nested")
	lease.Release()
}

// TestDockerManifest pulls an image with a Docker manifest.
func TestDockerManifest(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	docker, err := mutate.AppendLayers(empty.Image, layer(t, registrytest.File("f", "docker")))
	must(t, err)
	mediaType, err := docker.MediaType()
	must(t, err)
	if mediaType != types.DockerManifestSchema2 {
		t.Fatalf("it is of type %s", mediaType)
	}
	wantFile(t, filepath.Join(n.mustPull(push(t, r, "docker:1", docker)).Dirs[0].Name(), "f"), "docker")
}

// TestTokens pulls from a registry with a token server.
func TestTokens(t *testing.T) {
	for name, c := range map[string]struct{ user, password, word string }{
		"anonymous": {"", "", ""},
		"user":      {"u", "p", ""},
		"wrong":     {"u", "x", `as user "u"`},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.startRegistry(registrytest.Options{TLS: true})
			pinned := push(t, r, "team/a:1", image(t, layer(t, registrytest.File("f", "x"))))
			r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
				if request.URL.Path == "/token" {
					user, password, _ := request.BasicAuth()
					if request.Method == http.MethodPost {
						user, password = request.FormValue("username"), request.FormValue("password")
					}
					if user != c.user || (user != "" && password != "p") {
						http.Error(w, "who are you", http.StatusUnauthorized)
						return true
					}
					fmt.Fprint(w, `{"token":"the-token","access_token":"the-token"}`)
					return true
				}
				if request.Header.Get("Authorization") == "Bearer the-token" {
					return false
				}
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="https://%s/token",service="test",scope="repository:team/a:pull"`, r.Host))
				http.Error(w, "", http.StatusUnauthorized)
				return true
			})
			data := map[string]string{}
			if c.user != "" {
				data[".dockerconfigjson"] = r.DockerConfig(c.user, c.password)
			}
			credentials, err := registry.ParseCredentials(data)
			must(t, err)
			lease, err := n.pull(pinned, "", credentials)
			if c.word != "" {
				wantError(t, err, c.word, r.Host)
				return
			}
			must(t, err)
			lease.Release()
		})
	}
}
