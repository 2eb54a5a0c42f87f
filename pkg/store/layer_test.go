package store_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	output, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, output)
	}
	return string(output)
}

func mustGlob(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	must(t, err)
	return found
}

// TestOpaqueRootHidesLowerLayers checks that layers below an opaque root are left out.
func TestOpaqueRootHidesLowerLayers(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	lease := n.mustPull(push(t, r, "a:1", image(t,
		layer(t, registrytest.File("bottom", "x")),
		layer(t, registrytest.File(".wh..wh..opq", ""), registrytest.File("f", "x")),
		layer(t, registrytest.File("top", "x")),
	)))
	if len(lease.Dirs) != 2 {
		t.Errorf("%d layers are mounted, of which the lower of two hides what is below", len(lease.Dirs))
	}
}

// TestPathInImage resolves paths through links, whiteouts and opaque directories.
func TestPathInImage(t *testing.T) {
	link := func(name, target string) registrytest.Entry {
		return registrytest.Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
	}
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	bottom := layer(t, registrytest.Dir("usr"), registrytest.Dir("usr/share"), registrytest.File("usr/share/bottom", "x"),
		registrytest.Dir("gone"), registrytest.File("gone/f", "x"),
		registrytest.Dir("opaque"), registrytest.Dir("opaque/d"), registrytest.File("opaque/d/bottom", "x"),
		registrytest.File("was-file", "x"), link("loop", "loop"))
	middle := layer(t, registrytest.Dir("usr"), registrytest.Dir("usr/share"), registrytest.File("usr/share/middle", "x"),
		registrytest.File(".wh.gone", ""),
		registrytest.Dir("opaque"), registrytest.File("opaque/.wh..wh..opq", ""),
		registrytest.Dir("opaque/d"), registrytest.File("opaque/d/middle", "x"),
		registrytest.Dir("was-file"), registrytest.File("was-file/f", "x"))
	top := layer(t, link("share", "/usr/share"), link("up", "../../usr/./share/"), registrytest.Dir("a"), link("a/relative", "../share"))
	pinned := push(t, r, "a:1", image(t, bottom, middle, top))
	for path, want := range map[string]string{
		"usr/share":  "bottom middle",
		"usr":        "share",
		"share":      "bottom middle",
		"up":         "bottom middle",
		"a/relative": "bottom middle",
		"opaque/d":   "middle",
		"was-file":   "f",
	} {
		t.Run(path, func(t *testing.T) {
			lease, err := n.pull(pinned, path, registry.Credentials{})
			must(t, err)
			defer lease.Release()
			names := map[string]bool{}
			for _, dir := range lease.Dirs {
				entries, err := os.ReadDir(dir.Name())
				must(t, err)
				for _, entry := range entries {
					names[entry.Name()] = true
				}
			}
			for name := range strings.FieldsSeq(want) {
				if !names[name] {
					t.Errorf("%s is missing", name)
				}
				delete(names, name)
			}
			if len(names) > 0 {
				t.Errorf("unexpected entries %v", names)
			}
		})
	}
	for path, word := range map[string]string{
		"gone":             "no such directory",
		"nowhere":          "no such directory",
		"usr/share/middle": "is a file",
		"loop":             "links",
	} {
		t.Run(path, func(t *testing.T) {
			_, err := n.pull(pinned, path, registry.Credentials{})
			wantError(t, err, word, path)
		})
	}
}

// TestLimits checks the error of each limit.
func TestLimits(t *testing.T) {
	many := []registrytest.Entry{}
	for i := range 50 {
		many = append(many, registrytest.File(fmt.Sprint(i), "x"))
	}
	gc := store.GCConfig{HighThreshold: 100, LowThreshold: 100, Interval: time.Hour}
	zeros := registrytest.File("zeros", strings.Repeat("\x00", 10<<20))
	for name, c := range map[string]struct {
		limits  store.Config
		entries []registrytest.Entry
		word    string
	}{
		"bytes":   {store.Config{GC: gc, MaxLayerBytes: 1 << 20}, []registrytest.Entry{zeros}, "--max-layer-size"},
		"entries": {store.Config{GC: gc, MaxLayerEntries: 49}, many, "--max-layer-entries"},
		"reserve": {store.Config{GC: gc, MinFreeDiskPercent: 90}, many, "--min-free-disk-percent"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := newDisk(t, "size=64m")
			if name == "reserve" {
				must(t, os.WriteFile(filepath.Join(dir, "full"), make([]byte, 10<<20), 0o644))
			}
			n := newNodeIn(t, dir, func(n *node) { n.config = c.limits })
			r := n.startRegistry(registrytest.Options{})
			_, err := n.pull(push(t, r, "a:1", image(t, layer(t, c.entries...))), "", registry.Credentials{})
			wantError(t, err, c.word)
			n.wantNothing(false)
		})
	}
}

// TestDiskFull pulls to a full disk.
func TestDiskFull(t *testing.T) {
	dir := newDisk(t, "size=64m")
	n := newNodeIn(t, dir)
	r := n.startRegistry(registrytest.Options{})
	filler := filepath.Join(dir, "others")
	must(t, os.WriteFile(filler, bytes.Repeat([]byte("x"), 40<<20), 0o644))
	// The layer compresses well: the disk has space for the download, but not for the files.
	l := layer(t, registrytest.File("small", "x"), registrytest.File("big", strings.Repeat(incompressible(1000).Content, 30_000)))
	pinned := push(t, r, "a:1", image(t, l))
	_, err := n.pull(pinned, "", registry.Credentials{})
	wantError(t, err, "is full", dir, "no space left")
	n.wantNothing(false)
	wantFileSize(t, filler, 40<<20)
	must(t, os.Remove(filler))
	lease := n.mustPull(pinned)
	wantFileSize(t, filepath.Join(lease.Dirs[0].Name(), "big"), 30_000_000)
	// A download that is too large is refused before it starts.
	large := largeLayer(t, "", 64<<20)
	r.Requests()
	_, err = n.pull(push(t, r, "b:1", image(t, large)), "", registry.Credentials{})
	wantError(t, err, "to download", dir)
	for _, request := range r.Requests() {
		if strings.HasPrefix(request, "GET") && strings.Contains(request, mustHex(t, large)) {
			t.Errorf("it was downloaded: %s", request)
		}
	}
}

func mustHex(t *testing.T, l v1.Layer) string {
	t.Helper()
	digest, err := l.Digest()
	must(t, err)
	return digest.Hex
}

func mustSize(t *testing.T, l v1.Layer) int64 {
	t.Helper()
	size, err := l.Size()
	must(t, err)
	return size
}

func wantFileSize(t *testing.T, path string, size int64) {
	t.Helper()
	info, err := os.Stat(path)
	must(t, err)
	if info.Size() != size {
		t.Errorf("%s has %d bytes instead of %d", path, info.Size(), size)
	}
}

// newDisk returns a directory on a tmpfs with mount options.
func newDisk(t *testing.T, options string) string {
	t.Helper()
	needs.Root(t)
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, options))
	t.Cleanup(func() { must(t, drivertest.UnmountBeneath(dir)) })
	return dir
}
