package portable

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image/compose"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

func TestHandle(t *testing.T) {
	h, err := New("registry.example.com/team/snapshots", "snapshot-1", "node-1")
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(h.String())
	if err != nil || again.String() != h.String() || again.RecordID() != h.RecordID() || !again.MayBeOf("node-1") || again.MayBeOf("node-2") ||
		!strings.HasPrefix(h.String(), "push:registry.example.com/team/snapshots:snap-") || !IsHandle(h.String()) {
		t.Errorf("%s became %s, %v", h, again, err)
	}
	if other, err := New("registry.example.com/team/snapshots", "snapshot-2", "node-1"); err != nil || other.String() == h.String() {
		t.Errorf("another snapshot is %s, %v", other, err)
	}
	for repository, word := range map[string]string{
		"":                                "repository",
		"registry.example.com/team/s:tag": "a tag",
		"registry.example.com/UPPER":      "lowercase",
		"oci://registry.example.com/team": "repository",
		"r.example.com/" + strings.Repeat("s", 71): "too long",
	} {
		if _, err := New(repository, "s", "n"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), word) {
			t.Errorf("%q: %v", repository, err)
		}
	}
	for _, id := range []string{
		"", "push:", "snap-1", "push:registry.example.com/a", "push:../..:tag", "push:" + strings.Repeat("a", 600) + ":1",
	} {
		if _, err := Parse(id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.40q: %v", id, err)
		}
	}
}

// FuzzParse parses handles: what a record is called is the name of a directory.
func FuzzParse(f *testing.F) {
	f.Add("push:registry.example.com/team/snapshots:snap-00000000-000000000000000000000000")
	f.Add("push:a@sha256:" + strings.Repeat("0", 64))
	f.Fuzz(func(t *testing.T, id string) {
		h, err := Parse(id)
		if err != nil {
			return
		}
		if again, err := Parse(h.String()); err != nil || again.String() != h.String() {
			t.Errorf("%q became %q, %v", h, again, err)
		}
		if strings.ContainsAny(h.RecordID(), "/.") {
			t.Errorf("the record of %q is %q", id, h.RecordID())
		}
	})
}

const id = digest.Digest("sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")

// TestLayersFor: whoever may push to the repository must not choose directories of nodes.
func TestLayersFor(t *testing.T) {
	h, err := Parse("push:r.example.com/s:snap-1")
	if err != nil {
		t.Fatal(err)
	}
	const at = "@" + string(id)
	self := "oci://r.example.com/s:snap-1" + at
	for name, c := range map[string]struct {
		base, below, requestedThen string
		request                    string
		want                       string // "" for a refusal.
	}{
		"image by tag":            {base: "r.example.com/b:1" + at, request: "oci://r.example.com/b:1", want: self},
		"image by digest":         {base: "r.example.com/b:1" + at, request: "oci://r.example.com/b:1" + at, want: self},
		"image without a request": {base: "r.example.com/b:1" + at, want: self},
		"image as requested": {base: "r.example.com/s:snap-0" + at, requestedThen: "oci://r.example.com/b:1",
			request: "oci://r.example.com/b:1", want: self},
		"other image": {base: "r.example.com/b:1" + at, request: "oci://r.example.com/c:1"},
		"directory":   {below: "dir://a/b", request: "dir://a/b", want: self + "\ndir://a/b"},
		"image's directory": {below: "oci://r.example.com/b:1" + at + "?path=%2Fusr", request: "oci://r.example.com/b:1?path=/usr",
			want: self + "\noci://r.example.com/b:1" + at + "?path=%2Fusr"},
		"directory, unasked": {below: "dir://a/b"},
		"other directory":    {below: "dir://secret", request: "dir://a/b"},
		"directory above":    {below: "dir://secret\ndir://a/b", request: "dir://a/b"},
		"earlier snapshot": {below: "oci://r.example.com/s:0" + at + "\ndir://a/b", request: "dir://a/b",
			want: self + "\noci://r.example.com/s:0" + at + "\ndir://a/b"},
		"image of an image, as requested": {below: "oci://r.example.com/s:0" + at, requestedThen: "oci://r.example.com/b:1",
			request: "oci://r.example.com/b:1", want: self + "\noci://r.example.com/s:0" + at},
		"directory below, as requested": {below: "oci://r.example.com/s:0" + at + "\ndir://secret", requestedThen: "oci://r.example.com/b:1",
			request: "oci://r.example.com/b:1"},
		"image by tag above":     {below: "oci://r.example.com/s:0\ndir://a/b", request: "dir://a/b"},
		"claims to be requested": {below: "dir://secret", requestedThen: "dir://a/b", request: "dir://a/b"},
		"fewer":                  {below: "dir://a/b", request: "dir://a/b\ndir://a/c"},
	} {
		t.Run(name, func(t *testing.T) {
			annotations := map[string]string{
				compose.AnnotationSize: "1", ocispec.AnnotationCreated: "2026-01-02T03:04:05Z", compose.AnnotationRequested: c.requestedThen,
			}
			if c.base != "" {
				annotations[ocispec.AnnotationBaseImageName] = c.base
			} else {
				annotations[compose.AnnotationLayers] = c.below
			}
			image, err := newImage(h, id, annotations)
			if err != nil {
				t.Fatal(err)
			}
			var requested []reference.Reference
			if c.request != "" {
				if requested, err = reference.ParseList(c.request); err != nil {
					t.Fatal(err)
				}
			}
			layers, err := image.LayersFor(requested)
			if c.want == "" && !errdefs.IsInvalidArgument(err) || c.want != "" && err != nil || compose.JoinReferences(layers) != c.want {
				t.Errorf("got %v, %v", layers, err)
			}
		})
	}
}

func TestAnnotations(t *testing.T) {
	h, err := Parse("push:r.example.com/s:snap-1")
	if err != nil {
		t.Fatal(err)
	}
	good := map[string]string{compose.AnnotationSize: "4096", ocispec.AnnotationCreated: "2026-01-02T03:04:05Z"}
	image, err := newImage(h, id, good)
	if err != nil || image.Size != 4096 || image.Created.Year() != 2026 {
		t.Errorf("got %+v, %v", image, err)
	}
	for key, value := range map[string]string{
		compose.AnnotationSize: "-1", ocispec.AnnotationCreated: "today", compose.AnnotationLayers: "/etc", compose.AnnotationRequested: "x",
		ocispec.AnnotationBaseImageName: "UPPER", compose.AnnotationVolume: strings.Repeat("v", 1<<20),
	} {
		bad := maps.Clone(good)
		bad[key] = value
		if _, err := newImage(h, id, bad); err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%s: %.64q: %v", key, value, err)
		}
	}
	// CSI has no time before the year 1.
	for _, value := range []string{"0000-06-01T00:00:00Z", "0001-01-01T00:00:00+14:00", strings.Repeat("2", 1<<20)} {
		bad := maps.Clone(good)
		bad[ocispec.AnnotationCreated] = value
		if _, err := newImage(h, id, bad); err == nil || len(err.Error()) > 1024 {
			t.Errorf("made %.64q: %.1024v", value, err)
		}
	}
	for _, c := range []struct {
		size, limit, want int64
		err               error
	}{{0, 0, 4096, nil}, {8192, 0, 8192, nil}, {1, 0, 0, errdefs.ErrOutOfRange}, {0, 4095, 0, errdefs.ErrOutOfRange}} {
		if got, err := image.SizeFor(c.size, c.limit); got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%+v: %d, %v", c, got, err)
		}
	}
}

func TestPushes(t *testing.T) {
	p := NewPushes(t.Context(), 1)
	defer p.Close()
	began, end := make(chan string, 10), make(chan error)
	push := func(name string) func(context.Context) error {
		return func(ctx context.Context) error {
			began <- name
			select {
			case err := <-end:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	next := func(name string) error { return p.Continue(name, push(name)) }
	ended := func(name string) {
		for {
			p.mu.Lock()
			current := p.running[name]
			p.mu.Unlock()
			if current == nil {
				return
			}
			<-current.done
		}
	}
	// A twin joins, and another waits for its turn.
	for _, name := range []string{"a", "a"} {
		if err := next(name); err != nil {
			t.Fatal(err)
		}
	}
	<-began
	if err := next("b"); err != nil || len(began) > 0 {
		t.Errorf("another push: %v, and %d run", err, len(began))
	}
	failed := errors.New("no room")
	end <- failed
	ended("a")
	if name := <-began; name != "b" {
		t.Errorf("%s runs", name)
	}
	// The error is told once, and the push goes on.
	if err := next("a"); !errors.Is(err, failed) {
		t.Errorf("the error is %v", err)
	}
	p.Stop("b")
	<-began
	if err := next("a"); err != nil {
		t.Errorf("the error is told again: %v", err)
	}
	end <- nil
	ended("a")
	if len(p.failed) > 0 || len(p.running) > 0 {
		t.Errorf("left: %v, %v", p.failed, slices.Collect(maps.Keys(p.running)))
	}
	// One that nobody asks for ends.
	p.abandonAfter = time.Millisecond
	if err := next("c"); err != nil {
		t.Fatal(err)
	}
	ended("c")
	if err := next("c"); !errors.Is(err, errAbandoned) {
		t.Errorf("the error is %v", err)
	}
}
