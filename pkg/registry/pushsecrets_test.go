package registry

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

func credentialsFor(t *testing.T, registry *registrytest.Registry, password string) Credentials {
	t.Helper()
	credentials, err := ParseCredentials(map[string]string{".dockerconfigjson": registry.DockerConfig("u", password)})
	must(t, err)
	return credentials
}

// located is an answer whose Location is on another host.
type located struct {
	http.ResponseWriter
	elsewhere string
}

func (l *located) WriteHeader(status int) {
	if path := l.Header().Get("Location"); strings.HasPrefix(path, "/") {
		l.Header().Set("Location", l.elsewhere+path)
	}
	l.ResponseWriter.WriteHeader(status)
}

// TestSecretsStayWithTheRegistryThatIsPushedTo has a registry receive blobs at another port of its host, as one with a store of objects
// does at another host. Logins and configured headers must not go there.
func TestSecretsStayWithTheRegistryThatIsPushedTo(t *testing.T) {
	inLocation := func(registry *registrytest.Registry, elsewhere string) registrytest.Fault {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost {
				registry.Bypass(&located{w, elsewhere}, r)
			}
			return r.Method == http.MethodPost
		}
	}
	byRedirect := func(_ *registrytest.Registry, elsewhere string) registrytest.Fault {
		return func(w http.ResponseWriter, r *http.Request) bool {
			isBlob := r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/blobs/")
			if isBlob {
				http.Redirect(w, r, elsewhere+r.URL.RequestURI(), http.StatusTemporaryRedirect)
			}
			return isBlob
		}
	}
	for name, c := range map[string]struct {
		to    func(registry *registrytest.Registry, elsewhere string) registrytest.Fault
		plain bool
	}{
		"location":                    {to: inLocation},
		"redirect":                    {to: byRedirect},
		"location without encryption": {to: inLocation, plain: true},
		"redirect without encryption": {to: byRedirect, plain: true},
	} {
		t.Run(name, func(t *testing.T) {
			registry := startDistribution(t, registrytest.Options{TLS: true, User: "u", Password: "p"})
			proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "https", Host: registry.Host})
			proxy.Transport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
			elsewhere := newRecorder(t, !c.plain, func(w http.ResponseWriter, r *http.Request) {
				r.SetBasicAuth("u", "p")
				registry.SetFault(nil)
				proxy.ServeHTTP(w, r)
			})
			client := newPushClient(t, registry)
			hosts := filepath.Join(client.config.CertsDir, strings.ReplaceAll(registry.Host, ":", "_")+"_", "hosts.toml")
			file, err := os.OpenFile(hosts, os.O_APPEND|os.O_WRONLY, 0)
			must(t, err)
			_, err = file.WriteString("[header]\nx-secret = \"s\"\n")
			must(t, err)
			must(t, file.Close())
			credentials := credentialsFor(t, registry, "p")
			what := newPushed(t, client, registry, credentials)
			address := elsewhere.URL
			if c.plain {
				address = strings.Replace(address, "127.0.0.1", "localhost", 1)
			}
			registry.SetFault(c.to(registry, address))
			err = what.push(t.Context(), repositoryOf(t, client, registry.Host+"/team/app:2", credentials))
			elsewhere.mu.Lock()
			defer elsewhere.mu.Unlock()
			if len(elsewhere.received) > 0 {
				t.Errorf("the other host received %v", elsewhere.received)
			}
			if !c.plain {
				must(t, err)
				return
			}
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "without encryption") {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

// TestPushAsksForTheRightToPush: tokens of a token server are for what they were asked for.
func TestPushAsksForTheRightToPush(t *testing.T) {
	var mu sync.Mutex
	scopes := map[string][]string{}
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		if r.Form.Get("password") != "p" {
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"wrong password"}]}`, http.StatusUnauthorized)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		token := fmt.Sprint(len(scopes))
		scopes[token] = strings.Fields(strings.Join(r.Form["scope"], " "))
		fmt.Fprintf(w, `{"token":%q,"access_token":%q}`, token, token)
	}))
	defer tokens.Close()
	mayDo := func(r *http.Request) bool {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		repository, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/blobs/")
		repository, _, _ = strings.Cut(repository, "/manifests/")
		want := "pull"
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			want = "push"
		}
		mu.Lock()
		defer mu.Unlock()
		for _, scope := range scopes[token] {
			rest, ok := strings.CutPrefix(scope, "repository:"+repository+":")
			if ok && strings.Contains(rest, want) {
				return true
			}
		}
		return false
	}
	for password, want := range map[string]error{"p": nil, "wrong": errdefs.ErrUnauthenticated} {
		t.Run(password, func(t *testing.T) {
			registry := startDistribution(t, registrytest.Options{})
			client := newPushClient(t, registry)
			what := newPushed(t, client, registry, credentialsFor(t, registry, "p"))
			registry.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
				if mayDo(r) {
					return false
				}
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="x"`, tokens.URL))
				http.Error(w, "", http.StatusUnauthorized)
				return true
			})
			err := what.push(t.Context(), repositoryOf(t, client, registry.Host+"/team/app:2", credentialsFor(t, registry, password)))
			if want == nil {
				must(t, err)
				what.check(t, registry, "team/app:2")
				return
			}
			if !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), `as user "u"`) || strings.Contains(err.Error(), "wrong\"") {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

// TestPushWithoutAToken: where the token server fails once a blob is to be sent, the push must not wait for ever.
func TestPushWithoutAToken(t *testing.T) {
	failing := false
	var mu sync.Mutex
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if failing {
			http.Error(w, "", http.StatusForbidden)
			return
		}
		// It has expired when it arrives.
		fmt.Fprint(w, `{"token":"t","access_token":"t","expires_in":1,"issued_at":"2020-01-01T00:00:00Z"}`)
	}))
	defer tokens.Close()
	registry := startDistribution(t, registrytest.Options{})
	client := newPushClient(t, registry)
	credentials := credentialsFor(t, registry, "p")
	what := newPushed(t, client, registry, credentials)
	registry.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPost {
			mu.Lock()
			failing = true
			mu.Unlock()
		}
		if r.Header.Get("Authorization") != "" {
			return false
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="x"`, tokens.URL))
		http.Error(w, "", http.StatusUnauthorized)
		return true
	})
	err := what.push(t.Context(), repositoryOf(t, client, registry.Host+"/team/app:2", credentials))
	if !errdefs.IsPermissionDenied(err) {
		t.Errorf("the error is %v", err)
	}
}
