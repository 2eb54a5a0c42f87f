package registry

import (
	"net/http"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestDelete deletes an image, which is gone then, and asks registries that delete nothing.
func TestDelete(t *testing.T) {
	registry := startDistribution(t, registrytest.Options{TLS: true, User: "u", Password: "p"})
	client, credentials := newPushClient(t, registry), credentialsFor(t, registry, "p")
	what := newPushed(t, client, registry, credentials)
	tag := registry.Host + "/team/app:2"
	must(t, what.push(t.Context(), repositoryOf(t, client, tag, credentials)))
	id := what.made.Manifest.Descriptor.Digest

	err := repositoryOf(t, client, tag, credentialsFor(t, registry, "wrong")).Delete(t.Context(), id)
	if !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), registry.Host) || !strings.Contains(err.Error(), "may delete from") {
		t.Errorf("with a wrong password: %v", err)
	}
	for status, want := range map[int]error{
		http.StatusNotFound: nil, http.StatusMethodNotAllowed: nil, http.StatusNotImplemented: nil,
		http.StatusForbidden: errdefs.ErrPermissionDenied, http.StatusServiceUnavailable: errdefs.ErrUnavailable,
	} {
		registry.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodDelete {
				w.WriteHeader(status)
			}
			return r.Method == http.MethodDelete
		})
		err := repositoryOf(t, client, tag, credentials).Delete(t.Context(), id)
		if want == nil && err != nil || want != nil && (err == nil || !strings.Contains(err.Error(), registry.Host)) {
			t.Errorf("status %d: %v", status, err)
		}
	}
	registry.SetFault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodDelete {
			http.Redirect(w, r, "/v2/", http.StatusFound)
		}
		return r.Method == http.MethodDelete
	})
	if err := repositoryOf(t, client, tag, credentials).Delete(t.Context(), id); !errdefs.IsUnavailable(err) ||
		!strings.Contains(err.Error(), "redirects") {
		t.Errorf("the request is redirected: %v", err)
	}
	registry.SetFault(nil)
	for range 2 {
		must(t, repositoryOf(t, client, tag, credentials).Delete(t.Context(), id))
	}
	if _, err := repositoryOf(t, client, tag, credentials).Resolve(t.Context()); !errdefs.IsNotFound(err) {
		t.Errorf("after it was deleted: %v", err)
	}
}
