package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	layerref "github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

var (
	diffID = digest.FromString("layer")
	blob   = digest.FromString("blob")
	now    = time.Date(2026, 11, 25, 1, 2, 3, 0, time.UTC)
)

// fakeLayers is a layer store with one layer. A pull ends once the test has seen progress.
type fakeLayers struct {
	pullErr  error
	progress chan struct{}
	gc       store.GCRequest
}

func (*fakeLayers) Layers() []store.LayerStatus {
	layer := store.Layer{Version: 1, DiffID: diffID, Digest: blob, Bytes: 4096, Entries: 2, Created: now}
	return []store.LayerStatus{{Layer: layer, LastUsed: now}}
}

func (*fakeLayers) Images() []store.Image {
	return []store.Image{{
		Version: 1, Digest: blob, Platform: "linux/amd64", Names: []string{"r.example/a:1"}, Pulled: now,
		Layers: []store.ImageLayer{{DiffID: diffID, Digest: blob, MediaType: "tar", Size: 10}},
	}}
}

func (*fakeLayers) Resolve(_ context.Context, named reference.Named, _ registry.Credentials) (digest.Digest, error) {
	if strings.Contains(named.Name(), "missing") {
		return "", fmt.Errorf("%w: no such image", errdefs.ErrNotFound)
	}
	return blob, nil
}

func (f *fakeLayers) fetch(ctx context.Context, _ reference.Canonical) (store.Image, error) {
	select {
	case <-f.progress:
		return f.Images()[0], f.pullErr
	case <-ctx.Done():
		return store.Image{}, ctx.Err()
	}
}

func (*fakeLayers) Progress(digest.Digest) (store.Progress, error) {
	return store.Progress{Image: "r.example/a:1", Layers: []store.LayerProgress{{Digest: blob, Size: 10, Done: 5}}}, nil
}

func (f *fakeLayers) GC(_ context.Context, request store.GCRequest) (store.GCResult, error) {
	f.gc = request
	return store.GCResult{Layers: f.Layers(), Bytes: 4096, Caches: 8192}, nil
}

type fakeVolumes struct{}

func (fakeVolumes) Describe(_ context.Context, id string) (volume.Description, error) {
	if id != "csi-1" {
		return volume.Description{}, fmt.Errorf("%w: volume %s", errdefs.ErrNotFound, id)
	}
	return volume.Description{
		ID: id, SizeBytes: 1 << 20, Backend: "image",
		Resolved: map[string]digest.Digest{"oci://r.example/a:1": blob}, Layers: []digest.Digest{diffID},
		Publications: []volume.Publication{{
			Target: "/target", Mounted: true, Options: "nodev",
			Data: map[string]string{"LowerDir": "/l1:/l2", "UpperDir": "/u", "WorkDir": "/w", "MergedDir": "/target"},
		}},
		Conditions: []volume.Condition{{Severity: volume.Degraded, Reason: "Word", Message: "text"}},
	}, nil
}

func (fakeVolumes) IDs() ([]string, error) { return []string{"csi-1"}, nil }

func (fakeVolumes) DescribeSnapshots() ([]volume.SnapshotDescription, error) {
	taken := volume.Snapshot{ID: "s-1", Volume: "csi-1", Size: 1 << 30, Created: time.Unix(1, 0).UTC(), Ready: true}
	return []volume.SnapshotDescription{
		{Snapshot: taken, Volumes: []string{"csi-1", "csi-3"}}, {Snapshot: volume.Snapshot{ID: "s-2"}, IsDamaged: true},
	}, errdefs.ErrFailedPrecondition
}

func (fakeVolumes) ReadChanges(_ context.Context, id, _ string) (*volume.Changes, error) {
	return nil, fmt.Errorf("%w: volume %s", errdefs.ErrNotFound, id)
}

func (fakeVolumes) CaptureChanges(_ context.Context, id string) (*volume.Changes, error) {
	return nil, fmt.Errorf("%w: volume %s", errdefs.ErrNotFound, id)
}

func (fakeVolumes) LayersInUse() (map[digest.Digest][]string, error) {
	return map[digest.Digest][]string{diffID: {"csi-1"}}, nil
}

func (fakeVolumes) Unreadable() ([]string, error) { return []string{"csi-2"}, nil }

// serve serves the fakes on a socket, which it returns.
func serve(t *testing.T, layers *fakeLayers) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "admin.sock")
	// A socket that an earlier process has left is replaced.
	if err := os.WriteFile(socket, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, socket, newMux(&handler{layers, fakeVolumes{}, fakeVolumes{}, nil, layers.fetch, 0, nil}))
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	for {
		info, err := os.Stat(socket)
		if err == nil && info.Mode() == os.ModeSocket|0o600 {
			return socket
		}
		select {
		case err := <-done:
			done <- err
			t.Fatalf("Serve ended: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
}

// TestJSON compares every key of the wire form, which scripts depend on.
func TestJSON(t *testing.T) {
	layers := &fakeLayers{}
	client := api.NewClient(serve(t, layers))
	const times = `"created":"2026-11-25T01:02:03Z","lastUsed":"2026-11-25T01:02:03Z"`
	layer := fmt.Sprintf(`"diffID":%q,"digest":%q,"bytes":4096,"entries":2,%s`, diffID, blob, times)
	for name, c := range map[string]struct {
		get  func(ctx context.Context) (any, error)
		want string
	}{
		"layers": {
			func(ctx context.Context) (any, error) { return client.Layers(ctx) },
			`[{` + layer + `,"volumes":["csi-1"]}]`,
		},
		"images": {
			func(ctx context.Context) (any, error) { return client.Images(ctx) },
			fmt.Sprintf(`[{"digest":%q,"platform":"linux/amd64","names":["r.example/a:1"],`+
				`"layers":[{"diffID":%q,"digest":%[1]q,"mediaType":"tar","size":10}],`+
				`"pulled":"2026-11-25T01:02:03Z"}]`, blob, diffID),
		},
		"gc": {
			func(ctx context.Context) (any, error) { return client.GC(ctx, true, true) },
			`{"layers":[{` + layer + `}],"bytes":4096,"caches":8192,"unreadable":["csi-2"]}`,
		},
		"snapshots": {
			func(ctx context.Context) (any, error) { return client.Snapshots(ctx) },
			`[{"id":"s-1","volume":"csi-1","sizeBytes":1073741824,"created":"1970-01-01T00:00:01Z","state":"ready",` +
				`"volumes":["csi-1","csi-3"]},{"id":"s-2","state":"damaged"}]`,
		},
		"volumes": {
			func(ctx context.Context) (any, error) { return client.Volumes(ctx) },
			`["csi-1"]`,
		},
		"volume": {
			func(ctx context.Context) (any, error) {
				v, err := client.Volume(ctx, "csi-1")
				v.Spec = json.RawMessage(`{}`)
				return v, err
			},
			fmt.Sprintf(`{"id":"csi-1","spec":{},"sizeBytes":1048576,"backend":"image","resolved":{"oci://r.example/a:1":%q},"layers":[%q],`+
				`"publications":[{"target":"/target","pod":{},"mounted":true,"options":"nodev",`+
				`"data":{"LowerDir":"/l1:/l2","UpperDir":"/u","WorkDir":"/w","MergedDir":"/target"}}],`+
				`"conditions":[{"severity":"Degraded","reason":"Word","message":"text"}]}`, blob, diffID),
		},
	} {
		t.Run(name, func(t *testing.T) {
			value, err := c.get(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.Marshal(value)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
		})
	}
	if want := (store.GCRequest{DryRun: true, All: true}); layers.gc != want {
		t.Errorf("the store was asked for %+v, want %+v", layers.gc, want)
	}
}

// TestSpecIsCamelCase holds the one part of the answer whose form is the record's.
func TestSpecIsCamelCase(t *testing.T) {
	v, err := api.NewClient(serve(t, &fakeLayers{})).Volume(t.Context(), "csi-1")
	if err != nil {
		t.Fatal(err)
	}
	var spec map[string]any
	if err := json.Unmarshal(v.Spec, &spec); err != nil {
		t.Fatal(err)
	}
	for key := range spec {
		if key[:1] != strings.ToLower(key[:1]) {
			t.Errorf("the specification has the key %q", key)
		}
	}
	if _, ok := spec["layers"]; !ok {
		t.Errorf("the specification %s has no layers", v.Spec)
	}
}

func TestPull(t *testing.T) {
	for name, c := range map[string]struct {
		image   string
		pullErr error
		want    string
	}{
		"image":           {image: "r.example/a:1"},
		"with the scheme": {image: "oci://r.example/a:1"},
		"no reference":    {image: "A", want: "A"},
		"no such image":   {image: "r.example/missing:1", want: "no such image"},
		"fails":           {image: "r.example/a:1", pullErr: errors.New("disk full"), want: "disk full"},
	} {
		t.Run(name, func(t *testing.T) {
			layers := &fakeLayers{pullErr: c.pullErr, progress: make(chan struct{})}
			var seen []api.Progress
			image, err := api.NewClient(serve(t, layers)).Pull(t.Context(), c.image, func(p api.Progress) {
				if len(seen) == 0 {
					close(layers.progress)
				}
				seen = append(seen, p)
			})
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("got the error %v, want one with %q", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if want := wireImage(layers.Images()[0]); !reflect.DeepEqual(image, want) {
				t.Errorf("got %+v, want %+v", image, want)
			}
			if want := (api.LayerProgress{Digest: blob, Size: 10, Done: 5}); len(seen) == 0 || seen[0].Layers[0] != want {
				t.Errorf("got the progress %+v, want %+v", seen, want)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	socket := serve(t, &fakeLayers{})
	if _, err := api.NewClient(socket).Volume(t.Context(), "none"); err == nil || !strings.Contains(err.Error(), "volume none") {
		t.Errorf("got the error %v of a volume that does not exist", err)
	}
	if _, err := api.NewClient("/nowhere").Layers(t.Context()); err == nil || !strings.Contains(err.Error(), "--socket") {
		t.Errorf("got the error %v without a driver", err)
	}
	recorder := httptest.NewRecorder()
	request := httptest.NewRequest(http.MethodGet, "/v1/volumes/none", nil)
	newMux(&handler{&fakeLayers{}, fakeVolumes{}, fakeVolumes{}, nil, nil, 0, nil}).ServeHTTP(recorder, request)
	if recorder.Code != http.StatusNotFound {
		t.Errorf("got the status %d of a volume that does not exist, want 404", recorder.Code)
	}
}

func (fakeVolumes) ReadRebase(context.Context, string, []layerref.Reference) (*volume.Rebase, error) {
	return nil, errdefs.ErrNotFound
}
