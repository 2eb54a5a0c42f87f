package store_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	ociimage "github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// owned is an entry for a directory that not everybody may enter.
func owned(name string, mode int64, uid int) registrytest.Entry {
	e := registrytest.Dir(name)
	e.Mode, e.Uid, e.Gid, e.ModTime = mode, uid, uid+1, time.Unix(1_500_000_000, 123_456_789)
	e.PAXRecords = map[string]string{"SCHILY.xattr.user.comment": "of " + name}
	return e
}

// view mounts the layers of a lease, and returns the path of the view.
func view(t *testing.T, lease *store.Lease) string {
	t.Helper()
	dir := t.TempDir()
	lowers := make([]string, len(lease.Dirs))
	for i, layer := range lease.Dirs {
		lowers[i] = fmt.Sprintf("/proc/self/fd/%d", layer.Fd())
	}
	if len(lowers) == 1 {
		must(t, unix.Mount(lowers[0], dir, "", unix.MS_BIND, ""))
	} else {
		must(t, unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lowers, ":")))
	}
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	return dir
}

// attributesOf returns mode and owner of a path in a view, and what owned gave it besides.
func attributesOf(t *testing.T, path string) string {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return err.Error()
	}
	line := fmt.Sprintf("%o %d:%d", stat.Mode, stat.Uid, stat.Gid)
	value := make([]byte, 100)
	if n, err := unix.Lgetxattr(path, "user.comment", value); err == nil {
		line += " " + string(value[:n])
	}
	if stat.Mtim.Nano() == 1_500_000_000_123_456_789 {
		line += " of 2017"
	}
	return line
}

// containerdView unpacks layers as containerd's overlayfs snapshotter does, and returns the path of their view.
func containerdView(t *testing.T, layers [][]registrytest.Entry) string {
	t.Helper()
	var dirs []string
	for i, entries := range layers {
		data, err := registrytest.Tar(entries...)
		must(t, err)
		dir := filepath.Join(t.TempDir(), fmt.Sprint(i))
		must(t, os.Mkdir(dir, 0o755))
		_, err = archive.Apply(t.Context(), dir, bytes.NewReader(data),
			archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(dirs))
		must(t, err)
		dirs = slices.Insert(dirs, 0, dir)
	}
	view := t.TempDir()
	must(t, unix.Mount("overlay", view, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(dirs, ":")))
	t.Cleanup(func() { must(t, unix.Unmount(view, 0)) })
	return view
}

// privateDir are the attributes of a directory that the upper one of privateLayers has no entry for.
const privateDir = "40700 1000:1001 of lib of 2017"

func privateLayers(t *testing.T) []v1.Layer {
	return []v1.Layer{
		layer(t, owned("lib", 0o700, 1000), registrytest.File("lib/a", "a")),
		layer(t, registrytest.File("lib/b", "b")),
	}
}

// TestDirectoriesWithoutEntries checks the attributes of directories that upper layers have without an entry, here and with containerd.
func TestDirectoriesWithoutEntries(t *testing.T) {
	const made = "40755 0:0"
	file := func(name string) registrytest.Entry { return registrytest.File(name, "x") }
	link := func(name, target string) registrytest.Entry {
		return registrytest.Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
	}
	type entries = []registrytest.Entry
	bottom := entries{owned("lib", 0o700, 1000), file("lib/a")}
	// differs are attributes with containerd. It looks at each layer below by itself, follows links there, and ignores entries for the root.
	differs := map[string]string{
		"beneath an opaque directory: d/e": "40700 1:2 of d/e",
		"link below: lib":                  "40700 1:2 of usr/lib",
		"opaque root: lib":                 "40700 1000:1001 of lib",
		"root: .":                          made,
	}
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	for i, c := range []struct {
		name string
		// layers are the layers, the lowest first.
		layers []entries
		// want are the attributes by path.
		want map[string]string
		// isComposed reports whether there is one layer more.
		isComposed bool
	}{
		{"two layers", []entries{bottom, {file("lib/b")}},
			map[string]string{"lib": privateDir, "lib/a": "100644 0:0", "lib/b": "100644 0:0"}, true},
		{"whiteout in it", []entries{bottom, {file("lib/.wh.a")}}, map[string]string{"lib": privateDir, "lib/a": unix.ENOENT.Error()}, true},
		{"three layers", []entries{bottom, {file("lib/b")}, {file("lib/c")}}, map[string]string{"lib": privateDir}, true},
		{"the topmost entry", []entries{bottom, {owned("lib", 0o2750, 7)}, {file("lib/c")}},
			map[string]string{"lib": "42750 7:8 of lib of 2017"}, true},
		{"an entry on top", []entries{bottom, {file("lib/b")}, {registrytest.Dir("lib")}}, map[string]string{"lib": made}, false},
		{"all have entries", []entries{bottom, {registrytest.Dir("lib"), file("lib/b")}}, map[string]string{"lib": made}, false},
		{"none has an entry", []entries{{file("lib/a")}, {file("lib/b")}}, map[string]string{"lib": made}, false},
		{"whiteout between", []entries{bottom, {file(".wh.lib")}, {file("lib/b")}},
			map[string]string{"lib": made, "lib/a": unix.ENOENT.Error()}, false},
		{"whiteout above", []entries{bottom, {file("lib/b")}, {file(".wh.lib")}}, map[string]string{"lib": unix.ENOENT.Error()}, false},
		{"whiteout in the same layer", []entries{bottom, {file("lib/b"), file(".wh.lib")}}, map[string]string{"lib": made}, false},
		{"opaque between", []entries{bottom, {owned("lib", 0o750, 7), file("lib/.wh..wh..opq")}, {file("lib/b")}},
			map[string]string{"lib": "40750 7:8 of lib of 2017", "lib/a": unix.ENOENT.Error()}, true},
		{"opaque without an entry", []entries{bottom, {file("lib/.wh..wh..opq"), file("lib/c")}, {file("lib/b")}},
			map[string]string{"lib": privateDir, "lib/a": unix.ENOENT.Error(), "lib/c": "100644 0:0"}, true},
		{"beneath an opaque directory", []entries{{registrytest.Dir("d"), owned("d/e", 0o700, 1)}, {file("d/.wh..wh..opq")}, {file("d/e/f")}},
			map[string]string{"d/e": made}, true},
		{"file between", []entries{bottom, {file(".wh.lib"), file("lib")}, {file("lib/b")}}, map[string]string{"lib": made}, false},
		{"link between", []entries{bottom, {file("o/f"), link("lib", "o")}, {file("lib/b")}}, map[string]string{"lib": made}, false},
		{"link below", []entries{{owned("usr", 0o755, 0), owned("usr/lib", 0o700, 1), link("lib", "usr/lib")}, {file("lib/b")}},
			map[string]string{"lib": made, "usr/lib": "40700 1:2 of usr/lib of 2017"}, false},
		{"link in the layer", []entries{
			{owned("usr", 0o711, 3), owned("usr/lib", 0o700, 1), owned("usr/lib/b", 0o700, 2)},
			{link("lib", "/usr/lib"), file("usr/lib/x"), file("lib/b/c")},
		}, map[string]string{
			"lib": "120777 0:0", "usr": "40711 3:4 of usr of 2017", "usr/lib": "40700 1:2 of usr/lib of 2017",
			"usr/lib/b": "40700 2:3 of usr/lib/b of 2017",
		}, true},
		{"nested", []entries{
			{owned("a", 0o711, 5), owned("a/b", 0o700, 6), owned("a/z", 0o700, 7)}, {file("a/b/c/f"), file("a.b/f"), file("a/z/f")},
		},
			map[string]string{
				"a": "40711 5:6 of a of 2017", "a/b": "40700 6:7 of a/b of 2017", "a/b/c": made, "a/z": "40700 7:8 of a/z of 2017", "a.b": made,
			}, true},
		{"an entry for the upper one", []entries{{owned("a", 0o711, 5), owned("a/b", 0o700, 6)}, {owned("a", 0o750, 8), file("a/b/f")}},
			map[string]string{"a": "40750 8:9 of a of 2017", "a/b": "40700 6:7 of a/b of 2017"}, true},
		{"no entry for the upper one", []entries{{owned("a/b", 0o700, 6)}, {file("a/b/f")}},
			map[string]string{"a": made, "a/b": "40700 6:7 of a/b of 2017"}, true},
		{"root", []entries{{owned(".", 0o700, 1000), file("a")}, {file("b")}}, map[string]string{".": "40700 1000:1001 of . of 2017"}, true},
		{"ordinary root", []entries{{registrytest.Dir("."), file("a")}, {file("b")}}, map[string]string{".": made}, false},
		{"opaque root", []entries{bottom, {file(".wh..wh..opq")}, {file("lib/b")}}, map[string]string{"lib": made}, false},
		{"a layer twice", []entries{bottom, {file("lib/b")}, bottom, {file("lib/b")}}, map[string]string{"lib": privateDir}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var layers []v1.Layer
			distinct := map[string]bool{}
			for _, entries := range c.layers {
				l := layer(t, entries...)
				layers = append(layers, l)
				distinct[mustHex(t, l)] = true
			}
			lease, err := n.pull(push(t, r, fmt.Sprint("i", i, ":1"), image(t, layers...)), "", registry.Credentials{})
			must(t, err)
			defer lease.Release()
			root := view(t, lease)
			for path, want := range c.want {
				if got := attributesOf(t, filepath.Join(root, path)); got != want {
					t.Errorf("%s is %s, want %s", path, got, want)
				}
			}
			if c.name != "whiteout in the same layer" {
				// containerd refuses that one. Creating a file changes the times that it gave the directory.
				theirs := containerdView(t, c.layers)
				for path, want := range c.want {
					want = strings.TrimSuffix(cmp.Or(differs[c.name+": "+path], want), " of 2017")
					if got := strings.TrimSuffix(attributesOf(t, filepath.Join(theirs, path)), " of 2017"); got != want {
						t.Errorf("with containerd, %s is %s, want %s", path, got, want)
					}
				}
			}
			want := len(distinct)
			if c.name == "opaque root" {
				want--
			}
			if c.isComposed {
				want++
			}
			if len(lease.Dirs) != want {
				t.Errorf("%d directories are mounted, want %d", len(lease.Dirs), want)
			}
		})
	}
}

// TestAttributesOfAPath opens a directory of an image alone, which its upper layer has without an entry.
func TestAttributesOfAPath(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	lease, err := n.pull(push(t, r, "a:1", image(t, privateLayers(t)...)), "lib", registry.Credentials{})
	must(t, err)
	defer lease.Release()
	root := view(t, lease)
	if got := attributesOf(t, root); got != privateDir {
		t.Errorf("the directory is %s, want %s", got, privateDir)
	}
	wantFile(t, filepath.Join(root, "a"), "a")
	wantFile(t, filepath.Join(root, "b"), "b")
}

// TestAttributesInArchives has the image in each kind of archive.
func TestAttributesInArchives(t *testing.T) {
	n := newNode(t)
	dir := t.TempDir()
	img := image(t, privateLayers(t)...)
	for _, paths := range []map[string]string{archives(t, dir, img), dockerArchives(t, dir, img)} {
		for format, path := range paths {
			t.Run(format, func(t *testing.T) {
				lease, err := n.importFile(path, "")
				must(t, err)
				defer lease.Release()
				if got := attributesOf(t, filepath.Join(view(t, lease), "lib")); got != privateDir {
					t.Errorf("the directory is %s, want %s", got, privateDir)
				}
			})
		}
	}
}

// TestAttributesAfterACrash loses power between the steps of a pull, and loses the layer of attributes.
func TestAttributesAfterACrash(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	pinned := push(t, r, "a:1", image(t, privateLayers(t)...))
	want := func() store.Image {
		t.Helper()
		lease, err := n.pull(pinned, "", registry.Credentials{})
		must(t, err)
		defer lease.Release()
		if got := attributesOf(t, filepath.Join(view(t, lease), "lib")); got != privateDir || len(lease.Image.Layers) != 3 {
			t.Errorf("the directory is %s of %d layers, want %s", got, len(lease.Image.Layers), privateDir)
		}
		return lease.Image
	}
	img := want()
	top := img.Layers[2]
	layerDir := func(id digest.Digest) string { return filepath.Join(n.dir, "layers/sha256", id.Encoded()) }
	n.restart()
	if found := want(); found.Layers[2] != top {
		t.Errorf("after a restart the layer is %v, want %v", found.Layers[2], top)
	}
	for name, lose := range map[string]func(){
		"no image":           func() { must(t, os.Remove(filepath.Join(n.dir, "images", img.Digest.Encoded()+".json"))) },
		"no layer":           func() { must(t, os.RemoveAll(layerDir(top.DiffID))) },
		"half a layer":       func() { must(t, os.Remove(filepath.Join(layerDir(top.DiffID), "layer.json"))) },
		"a layer too little": func() { must(t, os.RemoveAll(layerDir(img.Layers[1].DiffID))) },
	} {
		t.Run(name, func(t *testing.T) {
			lose()
			n.restart()
			if images := n.Images(); len(images) != 0 {
				t.Errorf("the node has the image %v", images)
			}
			want()
			if layers := n.Layers(); len(layers) > 4 {
				t.Errorf("there are %d layers", len(layers))
			}
		})
	}
}

// TestLayersOfAnEarlierDriver: they have no list of directories. Their images stay as they are.
func TestLayersOfAnEarlierDriver(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	layers := privateLayers(t)
	lease := n.mustPull(push(t, r, "upper:1", image(t, layers[1])))
	lists := mustGlob(t, filepath.Join(n.dir, "layers/sha256/*/implied"))
	if len(lists) != 1 {
		t.Fatalf("the layer has the lists %q", lists)
	}
	must(t, os.Remove(lists[0]))
	both := n.mustPull(push(t, r, "both:1", image(t, layers...)))
	if len(lease.Dirs) != 1 || len(both.Dirs) != 2 {
		t.Errorf("%d and %d layers", len(lease.Dirs), len(both.Dirs))
	}
}

// TestCollectAttributes checks that a layer of attributes is collected like any other.
func TestCollectAttributes(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	pinned := push(t, r, "a:1", image(t, privateLayers(t)...))
	lease, err := n.pull(pinned, "", registry.Credentials{})
	must(t, err)
	if collected := n.collectGarbage(store.GCRequest{All: true}); len(collected.Layers) != 0 {
		t.Errorf("%d layers of a lease are collected", len(collected.Layers))
	}
	n.used = map[digest.Digest][]string{}
	for _, layer := range lease.Image.Layers {
		n.used[layer.DiffID] = []string{"volume"}
	}
	lease.Release()
	if collected := n.collectGarbage(store.GCRequest{All: true}); len(collected.Layers) != 0 {
		t.Errorf("%d layers of a volume are collected", len(collected.Layers))
	}
	// The image has no use without it.
	delete(n.used, lease.Image.Layers[2].DiffID)
	if collected := n.collectGarbage(store.GCRequest{All: true}); len(collected.Layers) != 1 || len(n.Images()) != 0 {
		t.Errorf("%d layers are collected, the images %v are left", len(collected.Layers), n.Images())
	}
	n.mustPull(pinned)
	n.restart()
	n.used = nil
	if collected := n.collectGarbage(store.GCRequest{All: true}); len(collected.Layers) != 3 {
		t.Errorf("%d layers are collected", len(collected.Layers))
	}
	n.wantNothing(false)
}

// claiming is a layer that its image gives the diff ID of another one.
type claiming struct {
	v1.Layer
	diffID digest.Digest
}

func (l claiming) DiffID() (v1.Hash, error) { return v1.NewHash(l.diffID.String()) }

// TestAttributesOfOthers checks who may have a layer of attributes: who may have the layers that it was made of.
func TestAttributesOfOthers(t *testing.T) {
	n := newNode(t)
	private := n.startRegistry(registrytest.Options{User: "u", Password: "p"})
	other := n.startRegistry(registrytest.Options{})
	pinned := push(t, private, "team/data:1", image(t, privateLayers(t)...))
	credentials, err := registry.ParseCredentials(map[string]string{".dockerconfigjson": private.DockerConfig("u", "p")})
	must(t, err)
	lease, err := n.pull(pinned, "", credentials)
	must(t, err)
	defer lease.Release()
	top := lease.Image.Layers[2].DiffID
	holders := func() []int {
		var all []int
		for _, layer := range lease.Image.Layers {
			for _, status := range n.Layers() {
				if status.DiffID == layer.DiffID {
					all = append(all, len(status.Holders))
				}
			}
		}
		return all
	}
	if got := holders(); !slices.Equal(got, []int{2, 2, 2}) {
		t.Errorf("the layers have %d holders", got)
	}
	evil := push(t, other, "evil/data:1", image(t, claiming{layer(t, registrytest.File("f", "evil")), top}))
	if _, err := n.pull(evil, "", registry.Credentials{}); !strings.Contains(fmt.Sprint(err), ociimage.ErrContentMismatch.Error()) {
		t.Errorf("the layer for an image that only names it: %v", err)
	}
	// Another registry gives the same layers to everybody. The node makes the layer again, and finds that it has it.
	public := push(t, other, "public/data:1", image(t, privateLayers(t)...))
	everybody, err := n.pull(public, "", registry.Credentials{})
	must(t, err)
	defer everybody.Release()
	if everybody.Image.Layers[2].DiffID != top {
		t.Errorf("the layer is %v, want %s", everybody.Image.Layers[2], top)
	}
	if got := holders(); !slices.Equal(got, []int{3, 3, 3}) {
		t.Errorf("the layers have %d holders", got)
	}
	other.Requests()
	n.mustPull(public)
	if requests := other.Requests(); len(requests) > 0 {
		t.Errorf("the registry is asked again for a public image: %q", requests)
	}
}
