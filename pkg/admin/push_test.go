package admin

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestPushRequest(t *testing.T) {
	for name, c := range map[string]struct {
		image, secret string
		want          error
		text          string
	}{
		"tag":             {image: "registry.example.com/team/app:1"},
		"no tag":          {image: "registry.example.com/team/app"},
		"scheme":          {image: "oci://registry.example.com/team/app:1"},
		"secret":          {image: "registry.example.com/team/app:1", secret: `{"auths":{"a.example.com":{"username":"u","password":"p"}}}`},
		"digest":          {"registry.example.com/team/app@sha256:" + strings.Repeat("0", 64), "", errdefs.ErrInvalidArgument, "to a tag"},
		"no name":         {"", "", errdefs.ErrInvalidArgument, "image name"},
		"no secret":       {"registry.example.com/team/app:1", "hush", errdefs.ErrInvalidArgument, "Docker configuration"},
		"secret too long": {"registry.example.com/team/app:1", strings.Repeat("x", maxSecret+1), errdefs.ErrInvalidArgument, "too large"},
	} {
		t.Run(name, func(t *testing.T) {
			request := httptest.NewRequest("POST", "/v1/volumes/v/push?image="+c.image, strings.NewReader(c.secret))
			to, _, err := parsePush(httptest.NewRecorder(), request)
			if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("the error is %v", err)
			}
			if err != nil && strings.Contains(err.Error(), "hush") {
				t.Errorf("the error has the secret: %v", err)
			}
			if err == nil && to.Tag() == "" {
				t.Errorf("%s has no tag", to)
			}
		})
	}
}

// TestClientThatDoesNotRead: a write to it ends, and so does the context of its request.
func TestClientThatDoesNotRead(t *testing.T) {
	ended := make(chan error, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		to := patientWriter{w, 50 * time.Millisecond}
		var err error
		for data := make([]byte, 1<<16); err == nil; {
			_, err = to.Write(data)
		}
		<-r.Context().Done()
		ended <- err
	}))
	defer server.Close()
	response, err := http.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if err := <-ended; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the write ended with %v", err)
	}
}
