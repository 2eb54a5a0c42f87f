package registry

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// recorder is a server on another port of the registry's host. It records the secrets that it receives.
type recorder struct {
	*httptest.Server
	mu       sync.Mutex
	received []string
}

func newRecorder(t *testing.T, useTLS bool, handler http.HandlerFunc) *recorder {
	t.Helper()
	r := &recorder{}
	r.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		r.mu.Lock()
		scheme, _, _ := strings.Cut(request.Header.Get("Authorization"), " ")
		if scheme != "" {
			r.received = append(r.received, scheme)
		}
		if password := request.PostFormValue("password"); password != "" {
			r.received = append(r.received, "form")
		}
		if request.Header.Get("X-Secret") != "" || request.Header.Get("X-Odd-Case") != "" {
			r.received = append(r.received, "header")
		}
		r.mu.Unlock()
		handler(w, request)
	}))
	if useTLS {
		r.StartTLS()
	} else {
		r.Start()
	}
	t.Cleanup(r.Close)
	return r
}

// TestSecretsStayWithTheirOrigin has a registry send requests to another port of its host. Logins, tokens and configured headers must
// not go there. A token server gets the login, and nothing else.
func TestSecretsStayWithTheirOrigin(t *testing.T) {
	serve := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "x") }
	token := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"token":"t","access_token":"t"}`) }
	toBlob := func(w http.ResponseWriter, r *http.Request, elsewhere string) bool {
		http.Redirect(w, r, elsewhere+"/blob", http.StatusTemporaryRedirect)
		return true
	}
	toToken := func(w http.ResponseWriter, r *http.Request, elsewhere string) bool {
		if r.Header.Get("Authorization") == "Bearer t" {
			fmt.Fprint(w, "x")
			return true
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="x"`, elsewhere+"/token"))
		http.Error(w, "", http.StatusUnauthorized)
		return true
	}
	challenge := func(scheme string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(scheme, "https://"+r.Host+"/token"))
			if r.URL.Path == "/token" {
				token(w, r)
				return
			}
			if strings.HasPrefix(r.Header.Get("Authorization"), "Bearer") {
				serve(w, r)
				return
			}
			http.Error(w, "", http.StatusUnauthorized)
		}
	}
	for name, c := range map[string]struct {
		registry    func(w http.ResponseWriter, r *http.Request, elsewhere string) bool
		other       http.HandlerFunc
		otherIsHTTP bool
		// login has the registry ask for a login first.
		login  bool
		public bool
		// header is a further line of hosts.toml.
		header    string
		want      []string
		wantError string
	}{
		"redirect":                         {registry: toBlob, login: true, other: serve},
		"redirect to http":                 {registry: toBlob, login: true, other: serve, otherIsHTTP: true},
		"redirect of a public image":       {registry: toBlob, other: serve, otherIsHTTP: true, public: true},
		"redirect with a configured login": {registry: toBlob, other: serve, public: true, header: "Authorization = \"Basic s\"\n"},
		"redirect to a login":              {registry: toBlob, login: true, other: challenge(`Basic realm=%q`), wantError: "401"},
		// registry.k8s.io redirects to registries that want an anonymous token.
		"redirect to a token server": {
			registry: toBlob, login: true, other: challenge(`Bearer realm=%q,service="x"`), want: []string{"Bearer"},
		},
		"token server":                     {registry: toToken, other: token, want: []string{"form"}},
		"token server by http":             {registry: toToken, other: token, otherIsHTTP: true, wantError: "without encryption"},
		"token server of a public image":   {registry: toToken, other: token, public: true},
		"token server that redirects":      {registry: toToken, want: []string{"form"}, wantError: "redirects credentials"},
		"token server that takes no forms": {registry: toToken, want: []string{"Basic", "form"}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := registrytest.Start(registrytest.Options{TLS: true})
			must(t, err)
			defer r.Close()
			certs := t.TempDir()
			must(t, r.Configure(certs))
			files, err := filepath.Glob(filepath.Join(certs, "*", "hosts.toml"))
			must(t, err)
			must(t, os.WriteFile(files[0], fmt.Appendf(nil,
				"server = %q\nskip_verify = true\n[header]\nX-Secret = \"s\"\nx-odd-case = \"s\"\n%s", "https://"+r.Host, c.header), 0o600))

			third := newRecorder(t, true, token)
			if c.other == nil {
				c.other = func(w http.ResponseWriter, request *http.Request) {
					if c.wantError != "" {
						http.Redirect(w, request, third.URL+"/token", http.StatusTemporaryRedirect)
					} else if request.Method == http.MethodPost {
						http.Error(w, "", http.StatusNotFound)
					} else {
						token(w, request)
					}
				}
			}
			other := newRecorder(t, !c.otherIsHTTP, c.other)
			gotHeaders := false
			r.SetFault(func(w http.ResponseWriter, request *http.Request) bool {
				gotHeaders = request.Header.Get("X-Secret") != "" && (c.header == "" || request.Header.Get("Authorization") == "Basic s")
				if c.login && request.Header.Get("Authorization") == "" {
					w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
					http.Error(w, "", http.StatusUnauthorized)
					return true
				}
				return c.registry(w, request, other.URL)
			})

			named, err := ParseName(r.Host + "/team/data:1")
			must(t, err)
			credentials := Credentials{}
			if !c.public {
				entry := `{"username":"u","password":"p"}`
				credentials, err = ParseCredentials(map[string]string{".dockerconfigjson": fmt.Sprintf(`{"auths":{%q:%s,%q:%s}}`,
					r.Host, entry, strings.TrimPrefix(strings.TrimPrefix(other.URL, "https://"), "http://"), entry)})
				must(t, err)
			}
			repository := NewClient(Config{CertsDir: certs, StallTimeout: 10 * time.Second}).Repository(named, credentials)
			descriptor := ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1, MediaType: ocispec.MediaTypeImageConfig}
			_, err = repository.Fetch(t.Context(), descriptor)
			if c.wantError == "" && err != nil || c.wantError != "" && (err == nil || !strings.Contains(err.Error(), c.wantError)) {
				t.Errorf("the error is %v, want %q", err, c.wantError)
			}
			if !gotHeaders {
				t.Error("the registry did not get the configured header")
			}
			if slices.Sort(other.received); !slices.Equal(slices.Compact(other.received), c.want) {
				t.Errorf("the other server received %q, want %q", other.received, c.want)
			}
			if len(third.received) > 0 {
				t.Errorf("the server behind the token server received %q", third.received)
			}
		})
	}
}
