package unpack_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	umoci "github.com/opencontainers/umoci/oci/layer"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// unpackedBy unpacks a layer with umoci, either for overlayfs or into one tree.
func unpackedBy(t *testing.T, dir string, data []byte, format umoci.OnDiskFormat) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o755))
	must(t, umoci.UnpackLayer(dir, bytes.NewReader(data), &umoci.UnpackOptions{OnDiskFormat: format}))
}

// implied returns the directories that have entries in a tar but no entry of their own.
func implied(t *testing.T, layers ...[]byte) map[string]bool {
	t.Helper()
	said, implied := map[string]bool{}, map[string]bool{".": true}
	for _, data := range layers {
		reader := tar.NewReader(bytes.NewReader(data))
		for {
			header, err := reader.Next()
			if err == io.EOF {
				break
			}
			must(t, err)
			name := filepath.Clean(strings.TrimPrefix(filepath.Clean("/"+header.Name), "/"))
			if header.Typeflag == tar.TypeDir {
				said[name] = true
			}
			for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
				implied[dir] = true
			}
		}
	}
	for name := range said {
		delete(implied, name)
	}
	// umoci does not set the times of the root.
	implied["."] = true
	return implied
}

// rules returns a layer with an entry for each rule of unpacking that umoci implements too.
func rules() []registrytest.Entry {
	at := time.Unix(1_600_000_000, 123_456_789)
	long := strings.Repeat("long-name-", 20)
	entry := func(typeflag byte, name string, change func(*tar.Header)) registrytest.Entry {
		e := registrytest.Entry{Header: tar.Header{Typeflag: typeflag, Name: name, Mode: 0o640, Uid: 1000, Gid: 2000, ModTime: at}}
		if change != nil {
			change(&e.Header)
		}
		return e
	}
	xattr := func(name, value string) func(*tar.Header) {
		return func(h *tar.Header) { h.PAXRecords = map[string]string{"SCHILY.xattr." + name: value} }
	}
	file := func(name, content string, change func(*tar.Header)) registrytest.Entry {
		e := entry(tar.TypeReg, name, change)
		e.Content = content
		return e
	}
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	return []registrytest.Entry{
		entry(tar.TypeDir, "./", func(h *tar.Header) { h.Mode = 0o751 }),
		entry(tar.TypeDir, "./dir/", func(h *tar.Header) { h.Mode = 0o1777 }),
		file("dir/file", "content", nil),
		file("/absolute/path", "x", nil),
		file("../../escape", "x", nil),
		file("dir/../dir/dotted", "x", nil),
		file("implied/a/b/c", "x", nil),
		file(long+"/"+long+"/"+long, "long", nil),
		file("unicode-äß€/\xff\xfe", "bytes", nil),
		file("setuid", "x", func(h *tar.Header) { h.Mode = 0o6755 }),
		file("capable", "x", xattr("security.capability", capability)),
		file("attributes", "x", xattr("user.comment", "with\x00zero")),
		entry(tar.TypeDir, "attributes.d", xattr("user.dir", "d")),
		file("many-users", "x", func(h *tar.Header) { h.Uid, h.Gid = 4_000_000_000, 4_000_000_000 }),
		file("old", "x", func(h *tar.Header) { h.ModTime = time.Unix(-1000, 5) }),
		file("future", "x", func(h *tar.Header) { h.ModTime = time.Unix(5_000_000_000, 999_999_999) }),
		file("empty", "", nil),
		file("sparse", strings.Repeat("\x00", 1<<20)+"middle"+strings.Repeat("\x00", 1<<20), nil),
		entry(tar.TypeLink, "hard", func(h *tar.Header) { h.Linkname = "dir/file" }),
		entry(tar.TypeLink, "hard-absolute", func(h *tar.Header) { h.Linkname = "/dir/file" }),
		entry(tar.TypeSymlink, "link", func(h *tar.Header) { h.Linkname = "dir/file" }),
		entry(tar.TypeSymlink, "link-out", func(h *tar.Header) { h.Linkname = "/etc" }),
		entry(tar.TypeSymlink, "link-up", func(h *tar.Header) { h.Linkname = "../../../etc" }),
		entry(tar.TypeSymlink, "link-dir", func(h *tar.Header) { h.Linkname = "dir" }),
		file("link-dir/through", "x", nil),
		entry(tar.TypeLink, "hard-to-link", func(h *tar.Header) { h.Linkname = "link" }),
		entry(tar.TypeChar, "dev/null", func(h *tar.Header) { h.Devmajor, h.Devminor = 1, 3 }),
		entry(tar.TypeBlock, "dev/loop", func(h *tar.Header) { h.Devmajor, h.Devminor = 7, 300 }),
		entry(tar.TypeFifo, "fifo", nil),
		file("twice", "first", nil),
		file("twice", "second", nil),
		entry(tar.TypeDir, "dir-then-file", nil),
		file("dir-then-file", "x", nil),
		file("file-then-dir", "x", nil),
		entry(tar.TypeDir, "file-then-dir", nil),
		file("file-then-dir/in", "x", nil),
		entry(tar.TypeDir, "dir-twice", nil),
		file("dir-twice/inside", "x", nil),
		entry(tar.TypeDir, "dir-twice", func(h *tar.Header) { h.Mode = 0o711 }),
		entry(tar.TypeDir, "opaque", nil),
		file("opaque/.wh..wh..opq", "", nil),
		file("opaque/own", "x", nil),
		file("dir/.wh.gone", "", nil),
		file("implied2/.wh.gone", "", nil),
	}
}

// TestUnpacksAsUmociDoes compares the tree of one layer with that of umoci.
func TestUnpacksAsUmociDoes(t *testing.T) {
	data := mustTar(t, rules()...)
	dir := workDir(t)
	tree := filepath.Join(dir, "tree")
	mustUnpack(t, data, tree)
	other := filepath.Join(dir, "umoci")
	unpackedBy(t, other, data, umoci.OverlayfsRootfs{})
	without := implied(t, data)
	got := readTree(t, tree, without)
	readTree(t, other, without).compare(t, got)
	if len(got) < 45 {
		t.Errorf("only %d entries", len(got))
	}
	var stat unix.Stat_t
	must(t, unix.Stat(filepath.Join(tree, "sparse"), &stat))
	if stat.Blocks*512 > 64<<10 {
		t.Errorf("the sparse file takes %d bytes", stat.Blocks*512)
	}
}

// TestRandomImagesAsUmoci compares each layer with that of umoci. It also compares the mounted view with the tree into which
// umoci unpacks all layers.
func TestRandomImagesAsUmoci(t *testing.T) {
	work := workDir(t)
	mounter := newMounter(t, work)
	for seed := range uint64(40) {
		random := rand.New(rand.NewPCG(seed, 1))
		var lowers []*os.File
		var tars [][]byte
		merged := filepath.Join(work, fmt.Sprint("merged-", seed))
		for i := range 1 + random.IntN(6) {
			data := mustTar(t, randomLayer(random, merged)...)
			tars = append(tars, data)
			unpackedBy(t, merged, data, umoci.DirRootfs{})
			dir := filepath.Join(work, fmt.Sprint("umoci-", seed, "-", i))
			unpackedBy(t, dir, data, umoci.OverlayfsRootfs{})
			tree := filepath.Join(work, fmt.Sprint("tree-", seed, "-", i))
			mustUnpack(t, data, tree)
			readTree(t, dir, implied(t, data)).compare(t, readTree(t, tree, implied(t, data)))
			lowers = slices.Insert(lowers, 0, openPath(t, tree))
		}
		view := filepath.Join(work, fmt.Sprint("view-", seed))
		must(t, os.Mkdir(view, 0o755))
		must(t, mounter.Overlay(overlay.Spec{Lowers: lowers, Attributes: overlay.Attributes{ReadOnly: true}}, openPath(t, view)))
		// An implied directory has attributes of its own in the view.
		without := implied(t, tars...)
		readTree(t, merged, without).compare(t, readTree(t, view, without))
		must(t, unix.Unmount(view, unix.MNT_DETACH))
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func openPath(t *testing.T, path string) *os.File {
	t.Helper()
	dir, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
	must(t, err)
	t.Cleanup(func() { dir.Close() })
	return dir
}

// randomLayer returns a random layer for the tree in below. Like a layer from an image builder, it has entries for the
// parents of its entries, and removes only existing files.
func randomLayer(random *rand.Rand, below string) []registrytest.Entry {
	isBelow := func(name string) bool {
		_, err := os.Lstat(filepath.Join(below, name))
		return err == nil
	}
	opaque := map[string]bool{}
	var entries []registrytest.Entry
	used := map[string]bool{}
	dirs := []string{""}
	at := func() time.Time { return time.Unix(1_500_000_000+random.Int64N(1e8), random.Int64N(1e9)) }
	for _, dir := range []string{"a", "b", "a/a", "a/b", "a/a/a"} {
		if random.IntN(2) == 0 && (filepath.Dir(dir) == "." || slices.Contains(dirs, filepath.Dir(dir))) {
			dirs = append(dirs, dir)
			used[dir] = true
			e := registrytest.Dir(dir + "/")
			e.ModTime, e.Mode, e.Uid = at(), 0o700+random.Int64N(0o100), random.IntN(5)
			entries = append(entries, e)
			if random.IntN(4) == 0 {
				entries = append(entries, registrytest.File(dir+"/.wh..wh..opq", ""))
				opaque[dir] = true
			}
		}
	}
	for range random.IntN(12) {
		name := filepath.Join(dirs[random.IntN(len(dirs))], string(rune('a'+random.IntN(5))))
		if used[name] {
			continue
		}
		used[name] = true
		e := registrytest.File(name, strings.Repeat(name, random.IntN(3000)))
		e.ModTime, e.Mode, e.Gid = at(), random.Int64N(0o1000), random.IntN(5)
		switch random.IntN(6) {
		case 0:
			e.Typeflag, e.Content, e.Linkname = tar.TypeSymlink, "", []string{"/a", "../b", "c", "/nowhere"}[random.IntN(4)]
		case 1:
			isHidden := slices.ContainsFunc(dirs, func(dir string) bool { return opaque[dir] && strings.HasPrefix(name, dir+"/") })
			if isHidden || !isBelow(name) {
				continue
			}
			e = registrytest.File(filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name)), "")
		case 2:
			e.PAXRecords = map[string]string{"SCHILY.xattr.user.x": fmt.Sprint(random.Int())}
		case 3:
			e.Typeflag, e.Content, e.Devmajor, e.Devminor = tar.TypeChar, "", 1, 3+random.Int64N(5)
		}
		entries = append(entries, e)
	}
	return entries
}

// TestRealTreeAsUmoci compares a large real tree with that of umoci.
func TestRealTreeAsUmoci(t *testing.T) {
	needs.Root(t)
	if testing.Short() {
		t.Skip("a real tree takes seconds")
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4G"))
	t.Cleanup(func() { must(t, drivertest.UnmountBeneath(dir)) })
	path := filepath.Join(dir, "tree.tar")
	// The tree has links and a set-user-ID program.
	root := strings.TrimSpace(run(t, "go", "env", "GOROOT"))
	run(t, "tar", "--format=posix", "--numeric-owner", "--xattrs", "--sort=name", "-cf", path,
		"-C", root, "src", "-C", "/", "usr/bin/su", "etc/ssl", "etc/alternatives")
	data, err := os.ReadFile(path)
	must(t, err)
	tree := filepath.Join(dir, "tree")
	mustUnpack(t, data, tree)
	other := filepath.Join(dir, "umoci")
	unpackedBy(t, other, data, umoci.OverlayfsRootfs{})
	without := implied(t, data)
	got := readTree(t, tree, without)
	readTree(t, other, without).compare(t, got)
	if len(got) < 10_000 {
		t.Errorf("only %d entries", len(got))
	}
	t.Logf("%d entries", len(got))
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	output, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, output)
	}
	return string(output)
}
