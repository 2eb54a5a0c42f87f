package store_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestCredentials pulls from a registry that needs a password.
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
			lease, err := n.pull(pinned, "", credentials)
			if c.words != nil {
				wantError(t, err, append(c.words, r.Host, "team/data")...)
				if !errdefs.IsUnauthorized(err) {
					t.Errorf("want Unauthorized, got %v", err)
				}
				return
			}
			must(t, err)
			lease.Release()
			if _, err := n.GC(t.Context(), store.GCRequest{All: true}); err != nil {
				t.Error(err)
			}
		})
	}
	for name, data := range map[string]map[string]string{
		"basic auth": {"username": "u", "password": "secret"},
		"no JSON":    {".dockerconfigjson": "secret"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := registry.ParseCredentials(data)
			wantError(t, err, "kubectl create secret docker-registry")
			if strings.Contains(err.Error(), "\"secret\"") {
				t.Errorf("the error discloses the secret: %v", err)
			}
		})
	}
}

// TestNodeCredentialsComeSecond checks that a volume's credentials take precedence over the node's. It also changes the file
// while the store runs.
func TestNodeCredentialsComeSecond(t *testing.T) {
	n := newNode(t)
	config := filepath.Join(n.dir, "config.json")
	r := n.startRegistry(registrytest.Options{User: "u", Password: "p"})
	n.registry.CredentialsFile, n.registry.CredentialsNamespaces = config, []string{registry.AllNamespaces}
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

// TestCredentialsStayWithTheirRegistry checks that a registry cannot make the client send its credentials to another host.
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
				t.Errorf("another host received %q", stolen)
			}
		})
	}
}
