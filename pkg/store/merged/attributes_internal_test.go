package merged

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// twoLayers are two layers with the directory a/b.
func twoLayers(t *testing.T) []*os.File {
	t.Helper()
	needs.Root(t)
	var layers []*os.File
	for range 2 {
		dir := t.TempDir()
		must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
		layer, err := os.Open(dir)
		must(t, err)
		t.Cleanup(func() { layer.Close() })
		layers = append(layers, layer)
	}
	return layers
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

// TestBounds checks what happens when layers need more lookups or open directories than an image may, or when the pull ends. Nothing
// stays open.
func TestBounds(t *testing.T) {
	layers := twoLayers(t)
	before := openFiles(t)
	for name, c := range map[string]struct {
		writer attributeWriter
		isKind func(error) bool
	}{
		"lookups": {attributeWriter{lookups: maxLookups - 3}, errdefs.IsResourceExhausted},
		"open":    {attributeWriter{open: maxOpen - 3}, errdefs.IsInvalidArgument},
		"neither": {attributeWriter{}, func(err error) bool { return err == nil }},
	} {
		t.Run(name, func(t *testing.T) {
			w := c.writer
			must(t, w.enterRoot(layers))
			if err := w.add([]string{"a", "b"}); !c.isKind(err) {
				t.Error(err)
			}
			w.leave(0)
			if after := openFiles(t); after != before {
				t.Errorf("%d files are open, %d were", after, before)
			}
		})
	}
	ended := errors.New("ended")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(ended)
	if _, err := WriteAttributes(ctx, io.Discard, layers, []string{"a"}); !errors.Is(err, ended) {
		t.Errorf("%v, want %v", err, ended)
	}
}

// TestComparePaths checks that what is in a directory follows it.
func TestComparePaths(t *testing.T) {
	want := []string{"a", "a/b", "a/b/c", "a/c", "a\x01", "a.b", "a.b/c", "ab", "b"}
	got := slices.Clone(want)
	slices.Sort(got)
	if slices.SortFunc(got, comparePaths); !slices.Equal(got, want) {
		t.Errorf("the order is %q, want %q", got, want)
	}
}
