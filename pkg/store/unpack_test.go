package store_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	umoci "github.com/opencontainers/umoci/oci/layer"
	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// tree is what there is to see of a directory tree: a line for each entry, by path.
type tree map[string]string

// readTree reads all that an image can say of its files. Directories that no entry made have times of their own.
func readTree(t *testing.T, root string, withoutTimes map[string]bool) tree {
	t.Helper()
	found := tree{}
	inodes := map[uint64]string{}
	must(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var stat unix.Stat_t
		if err := unix.Lstat(path, &stat); err != nil {
			return err
		}
		if stat.Mode&unix.S_IFMT == unix.S_IFCHR && stat.Rdev == 0 {
			// To overlayfs it is one whatever else there is to it.
			found[name] = "whiteout"
			return nil
		}
		line := fmt.Sprintf("mode %o owner %d:%d", stat.Mode, stat.Uid, stat.Gid)
		if !withoutTimes[name] {
			line += fmt.Sprintf(" time %d.%09d", stat.Mtim.Sec, stat.Mtim.Nsec)
		}
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size %d content %x", stat.Size, sha256.Sum256(content))
			if stat.Nlink > 1 {
				if inodes[stat.Ino] == "" {
					inodes[stat.Ino] = name
				}
				line += " as " + inodes[stat.Ino]
			}
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " to " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" device %d", stat.Rdev)
		}
		found[name] = line + xattrsOf(t, path)
		return nil
	}))
	return found
}

func xattrsOf(t *testing.T, path string) string {
	t.Helper()
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, names)
	if errors.Is(err, unix.ENOTSUP) {
		return ""
	}
	must(t, err)
	list := strings.FieldsFunc(string(names[:n]), func(r rune) bool { return r == 0 })
	slices.Sort(list)
	var line strings.Builder
	for _, name := range list {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		must(t, err)
		fmt.Fprintf(&line, " %s=%q", name, value[:n])
	}
	return line.String()
}

func (want tree) compare(t *testing.T, got tree) {
	t.Helper()
	differences := 0
	report := func(format string, args ...any) {
		if differences++; differences <= 20 {
			t.Errorf(format, args...)
		}
	}
	for name, line := range want {
		if other, ok := got[name]; !ok {
			report("%q is missing: %s", name, line)
		} else if other != line {
			report("%q:\n got %s\nwant %s", name, other, line)
		}
	}
	for name, line := range got {
		if _, ok := want[name]; !ok {
			report("%q should not be there: %s", name, line)
		}
	}
	if differences > 20 {
		t.Errorf("and %d others", differences-20)
	}
}

// unpackedBy has umoci unpack a layer, in the form for overlayfs or as one tree.
func unpackedBy(t *testing.T, dir string, data []byte, format umoci.OnDiskFormat) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o755))
	must(t, umoci.UnpackLayer(dir, bytes.NewReader(data), &umoci.UnpackOptions{OnDiskFormat: format}))
}

// implied are the directories that a tar does not say but has entries in.
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
	// umoci does not set that of the root.
	implied["."] = true
	return implied
}

// rules is a layer for each rule of the unpacking that two implementations agree upon.
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
		file("dir-twice/kept", "x", nil),
		entry(tar.TypeDir, "dir-twice", func(h *tar.Header) { h.Mode = 0o711 }),
		entry(tar.TypeDir, "opaque", nil),
		file("opaque/.wh..wh..opq", "", nil),
		file("opaque/own", "x", nil),
		file("dir/.wh.gone", "", nil),
		file("implied2/.wh.gone", "", nil),
	}
}

func TestUnpacksAsUmociDoes(t *testing.T) {
	data := mustTar(t, rules()...)
	n := newNode(t)
	l, err := registrytest.LayerOf(registrytest.Gzip(data))
	must(t, err)
	r := n.startRegistry(registrytest.Options{})
	use := n.mustPull(push(t, r, "a:1", image(t, l)))
	other := filepath.Join(n.dir, "umoci")
	unpackedBy(t, other, data, umoci.OverlayfsRootfs{})
	without := implied(t, data)
	got := readTree(t, use.Dirs[0].Name(), without)
	readTree(t, other, without).compare(t, got)
	if len(got) < 45 {
		t.Errorf("only %d entries", len(got))
	}
	var stat unix.Stat_t
	must(t, unix.Stat(filepath.Join(use.Dirs[0].Name(), "sparse"), &stat))
	if stat.Blocks*512 > 64<<10 {
		t.Errorf("the sparse file takes %d bytes", stat.Blocks*512)
	}
}

// TestRandomImagesAsUmoci compares layer by layer, and the mounted view with what umoci makes of all layers in one tree.
func TestRandomImagesAsUmoci(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	must(t, os.Mkdir(filepath.Join(n.dir, "mounter"), 0o755))
	features, err := overlay.Probe(filepath.Join(n.dir, "mounter"))
	must(t, err)
	mounter, err := overlay.NewMounter(overlay.Config{
		Dir: filepath.Join(n.dir, "mounter"), Features: features, MountUtils: mount.NewWithoutSystemd(""), Commands: utilexec.New(),
	})
	must(t, err)
	defer mounter.Close()
	for seed := range uint64(40) {
		random := rand.New(rand.NewPCG(seed, 1))
		var layers []v1.Layer
		var tars [][]byte
		merged := filepath.Join(n.dir, fmt.Sprint("merged-", seed))
		for range 1 + random.IntN(6) {
			data := mustTar(t, randomLayer(random, merged)...)
			tars = append(tars, data)
			l, err := registrytest.LayerOf([][]byte{data, registrytest.Gzip(data), registrytest.Zstd(data)}[random.IntN(3)])
			must(t, err)
			layers = append(layers, l)
			unpackedBy(t, merged, data, umoci.DirRootfs{})
		}
		use := n.mustPull(push(t, r, "random:1", image(t, layers...)))
		for i, data := range tars {
			dir := filepath.Join(n.dir, fmt.Sprint("umoci-", seed, "-", i))
			unpackedBy(t, dir, data, umoci.OverlayfsRootfs{})
			id, err := layers[i].DiffID()
			must(t, err)
			readTree(t, dir, implied(t, data)).compare(t, readTree(t, filepath.Join(n.dir, "layers/sha256", id.Hex, "tree"), implied(t, data)))
		}
		view := filepath.Join(n.dir, fmt.Sprint("view-", seed))
		must(t, os.Mkdir(view, 0o755))
		target, err := os.OpenFile(view, unix.O_PATH|unix.O_DIRECTORY, 0)
		must(t, err)
		lowers := use.Dirs
		must(t, mounter.Overlay(overlay.Spec{Lowers: lowers, Attributes: overlay.Attributes{ReadOnly: true}}, target))
		target.Close()
		// A directory that a layer implies has no attributes to give to the view.
		without := implied(t, tars...)
		readTree(t, merged, without).compare(t, readTree(t, view, without))
		must(t, unix.Unmount(view, 0))
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// randomLayer is a layer as a builder makes it on top of what is in below: of each directory that it has something in, it
// has an entry, and what it removes is there.
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
			if !isBelow(name) || slices.ContainsFunc(dirs, func(dir string) bool { return opaque[dir] && strings.HasPrefix(name, dir+"/") }) {
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

func TestRealTreeAsUmoci(t *testing.T) {
	if testing.Short() {
		t.Skip("a real tree takes seconds")
	}
	n := newNodeIn(t, newDisk(t, 4<<30))
	path := filepath.Join(n.dir, "tree.tar")
	// Links and a set-user-ID program are among it.
	root := strings.TrimSpace(run(t, "go", "env", "GOROOT"))
	run(t, "tar", "--format=posix", "--numeric-owner", "--xattrs", "--sort=name", "-cf", path, "-C", root, "src", "-C", "/", "usr/bin/su", "etc/ssl", "etc/alternatives")
	data, err := os.ReadFile(path)
	must(t, err)
	l, err := registrytest.LayerOf(registrytest.Gzip(data))
	must(t, err)
	r := n.startRegistry(registrytest.Options{})
	use := n.mustPull(push(t, r, "real:1", image(t, l)))
	other := filepath.Join(n.dir, "umoci")
	unpackedBy(t, other, data, umoci.OverlayfsRootfs{})
	without := implied(t, data)
	got := readTree(t, use.Dirs[0].Name(), without)
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

// TestHostileTar pulls what must not be done, and looks whether it was.
func TestHostileTar(t *testing.T) {
	link := func(name, target string) registrytest.Entry {
		return registrytest.Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
	}
	hard := func(name, target string) registrytest.Entry {
		return registrytest.Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}}
	}
	device := func(name string) registrytest.Entry {
		return registrytest.Entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: name, Mode: 0o644}}
	}
	with := func(entry registrytest.Entry, xattr, value string) registrytest.Entry {
		entry.PAXRecords = map[string]string{"SCHILY.xattr." + xattr: value}
		return entry
	}
	for name, c := range map[string]struct {
		entries []registrytest.Entry
		// refused is a word of the error, or "" where the layer is made without what is hostile: then these paths are
		// in it, and those are not.
		refused string
		has     []string
		hasNot  []string
	}{
		"absolute path":                 {entries: []registrytest.Entry{registrytest.File("/outside", "x")}, has: []string{"outside"}},
		"path up":                       {entries: []registrytest.Entry{registrytest.File("../../outside", "x")}, has: []string{"outside"}},
		"path through an absolute link": {entries: []registrytest.Entry{registrytest.Dir("tmp"), link("l", "/tmp"), registrytest.File("l/outside", "x")}, has: []string{"tmp/outside"}},
		"path through a link up":        {entries: []registrytest.Entry{registrytest.Dir("d"), link("d/l", "../../../.."), registrytest.File("d/l/outside", "x")}, has: []string{"outside"}},
		"path through links in a chain": {entries: []registrytest.Entry{registrytest.Dir("tmp"), link("a", "b"), link("b", "/../../tmp"), registrytest.File("a/outside", "x")}, has: []string{"tmp/outside"}},
		"path through a dangling link":  {entries: []registrytest.Entry{link("l", "/nowhere/at/all"), registrytest.File("l/outside", "x")}, refused: "l"},
		"path through a loop":           {entries: []registrytest.Entry{link("a", "b"), link("b", "a"), registrytest.File("a/outside", "x")}, refused: "levels of symbolic links"},
		"path through a file":           {entries: []registrytest.Entry{registrytest.File("f", "x"), registrytest.File("f/outside", "x")}, refused: "directory"},
		"file over a link":              {entries: []registrytest.Entry{link("l", "/outside"), registrytest.File("l", "x")}, has: []string{"l"}},
		"directory over a link":         {entries: []registrytest.Entry{link("l", "/tmp"), registrytest.Dir("l"), registrytest.File("l/outside", "x")}, has: []string{"l/outside"}},
		"whiteout through a link":       {entries: []registrytest.Entry{registrytest.Dir("tmp"), link("l", "/tmp"), registrytest.File("l/.wh.outside", "")}, has: []string{"tmp/outside"}},
		"whiteout of the directory":     {entries: []registrytest.Entry{registrytest.File("d/.wh..", "")}, refused: "whiteout"},
		"whiteout of what is above":     {entries: []registrytest.Entry{registrytest.File("d/.wh...", "")}, refused: "whiteout"},
		"whiteout of nothing":           {entries: []registrytest.Entry{registrytest.File("d/.wh.", "")}, refused: "whiteout"},
		"hard link out":                 {entries: []registrytest.Entry{hard("h", "/etc/passwd")}, refused: "hard link"},
		"hard link up":                  {entries: []registrytest.Entry{hard("h", "../../../../../../etc/passwd")}, refused: "hard link"},
		"hard link through a link":      {entries: []registrytest.Entry{link("l", "/etc"), hard("h", "l/passwd")}, refused: "hard link"},
		"hard link to a link":           {entries: []registrytest.Entry{link("l", "/etc/passwd"), hard("h", "l"), registrytest.File("h", "x")}, has: []string{"h", "l"}},
		"hard link to a whiteout":       {entries: []registrytest.Entry{registrytest.File(".wh.w", ""), hard("h", "w")}, refused: "removed"},
		"hard link to the root":         {entries: []registrytest.Entry{hard("h", "/")}, refused: "root"},
		"whiteout as a device":          {entries: []registrytest.Entry{registrytest.File("f", "x"), device("w")}, has: []string{"f"}, hasNot: []string{"w"}},
		"redirect":                      {entries: []registrytest.Entry{with(registrytest.Dir("d"), "trusted.overlay.redirect", "/secret")}, has: []string{"d"}},
		"user redirect":                 {entries: []registrytest.Entry{with(registrytest.Dir("d"), "user.overlay.redirect", "/secret")}, has: []string{"d"}},
		"metacopy":                      {entries: []registrytest.Entry{with(registrytest.File("f", "x"), "trusted.overlay.metacopy", "")}, has: []string{"f"}},
		"opaque":                        {entries: []registrytest.Entry{with(registrytest.Dir("./"), "trusted.overlay.opaque", "y"), registrytest.File("f", "x")}, has: []string{"f"}},
		"root as a file":                {entries: []registrytest.Entry{registrytest.File(".", "x")}, refused: "directory"},
		"name too long":                 {entries: []registrytest.Entry{registrytest.File(strings.Repeat("x", 300), "x")}, refused: "too long"},
		"path too long":                 {entries: []registrytest.Entry{registrytest.File(strings.Repeat("x/", 2500)+"x", "x")}, refused: "4096"},
		"AUFS's own":                    {entries: []registrytest.Entry{registrytest.File(".wh..wh.plnk/1.2", "x"), registrytest.File(".wh..wh.aufs", ""), registrytest.File("f", "x")}, has: []string{"f"}, hasNot: []string{".wh..wh.aufs"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.startRegistry(registrytest.Options{})
			use, err := n.pull(push(t, r, "a:1", image(t, layer(t, c.entries...))), "", store.Credentials{})
			outside := append(slices.Clone(mustGlob(t, "/tmp/outside")), mustGlob(t, "/outside")...)
			outside = append(outside, mustGlob(t, filepath.Join(n.dir, "outside"))...)
			outside = append(outside, mustGlob(t, filepath.Join(n.dir, "layers/*/outside"))...)
			if len(outside) > 0 {
				t.Fatalf("written outside of the layer: %q", outside)
			}
			if c.refused != "" {
				wantError(t, err, c.refused)
				n.wantNothing(false)
				return
			}
			must(t, err)
			defer use.Close()
			root := use.Dirs[0].Name()
			found := readTree(t, root, nil)
			for _, name := range c.has {
				if found[name] == "" {
					t.Errorf("%q is missing in %v", name, found)
				}
			}
			for _, name := range c.hasNot {
				if found[name] != "" {
					t.Errorf("%q is there: %s", name, found[name])
				}
			}
			for name, line := range found {
				if strings.Contains(line, "overlay.") {
					t.Errorf("%q has an attribute for overlayfs: %s", name, line)
				}
			}
		})
	}
}

func mustGlob(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	must(t, err)
	return found
}

func TestWhiteoutAndDirectoryOfOneName(t *testing.T) {
	for name, entries := range map[string][]registrytest.Entry{
		"whiteout first":  {registrytest.File(".wh.d", ""), registrytest.Dir("d"), registrytest.File("d/own", "x")},
		"directory first": {registrytest.Dir("d"), registrytest.File("d/own", "x"), registrytest.File(".wh.d", "")},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.startRegistry(registrytest.Options{})
			use := n.mustPull(push(t, r, "a:1", image(t, layer(t, entries...))))
			wantFile(t, filepath.Join(use.Dirs[0].Name(), "d/own"), "x")
			if attributes := xattrsOf(t, filepath.Join(use.Dirs[0].Name(), "d")); !strings.Contains(attributes, `trusted.overlay.opaque="y"`) {
				t.Errorf("what lower layers have in the directory shows: %s", attributes)
			}
		})
	}
}

func TestOpaqueRootHidesLowerLayers(t *testing.T) {
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	use := n.mustPull(push(t, r, "a:1", image(t, layer(t, registrytest.File("bottom", "x")), layer(t, registrytest.File(".wh..wh..opq", ""), registrytest.File("f", "x")), layer(t, registrytest.File("top", "x")))))
	if len(use.Dirs) != 2 {
		t.Errorf("%d layers are mounted, of which the lower of two hides what is below", len(use.Dirs))
	}
}

func TestPathInImage(t *testing.T) {
	link := func(name, target string) registrytest.Entry {
		return registrytest.Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
	}
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	bottom := layer(t, registrytest.Dir("usr"), registrytest.Dir("usr/share"), registrytest.File("usr/share/bottom", "x"), registrytest.Dir("gone"), registrytest.File("gone/f", "x"),
		registrytest.Dir("opaque"), registrytest.Dir("opaque/d"), registrytest.File("opaque/d/bottom", "x"), registrytest.File("was-file", "x"), link("loop", "loop"))
	middle := layer(t, registrytest.Dir("usr"), registrytest.Dir("usr/share"), registrytest.File("usr/share/middle", "x"), registrytest.File(".wh.gone", ""),
		registrytest.Dir("opaque"), registrytest.File("opaque/.wh..wh..opq", ""), registrytest.Dir("opaque/d"), registrytest.File("opaque/d/middle", "x"), registrytest.Dir("was-file"), registrytest.File("was-file/f", "x"))
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
		use, err := n.pull(pinned, path, store.Credentials{})
		must(t, err)
		names := map[string]bool{}
		for _, dir := range use.Dirs {
			entries, err := os.ReadDir(dir.Name())
			must(t, err)
			for _, entry := range entries {
				names[entry.Name()] = true
			}
		}
		for name := range strings.FieldsSeq(want) {
			if !names[name] {
				t.Errorf("%s does not have %s", path, name)
			}
			delete(names, name)
		}
		if len(names) > 0 {
			t.Errorf("%s has %v too", path, names)
		}
		use.Close()
	}
	for path, word := range map[string]string{"gone": "no such directory", "nowhere": "no such directory", "usr/share/middle": "is a file", "loop": "links"} {
		_, err := n.pull(pinned, path, store.Credentials{})
		wantError(t, err, word, path)
	}
}

func TestLimits(t *testing.T) {
	many := []registrytest.Entry{}
	for i := range 50 {
		many = append(many, registrytest.File(fmt.Sprint(i), "x"))
	}
	zeros := registrytest.File("zeros", strings.Repeat("\x00", 10<<20))
	for name, c := range map[string]struct {
		limits  store.Limits
		entries []registrytest.Entry
		word    string
	}{
		"bytes":   {store.Limits{LayerBytes: 1 << 20}, []registrytest.Entry{zeros}, "--max-layer-size"},
		"entries": {store.Limits{LayerEntries: 49}, many, "--max-layer-entries"},
		"reserve": {store.Limits{ReservePercent: 90}, many, "--min-free-disk-percent"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := newDisk(t, 64<<20)
			if name == "reserve" {
				must(t, os.WriteFile(filepath.Join(dir, "full"), make([]byte, 10<<20), 0o644))
			}
			n := newNodeIn(t, dir, func(config *store.Config) { config.Limits = c.limits })
			r := n.startRegistry(registrytest.Options{})
			_, err := n.pull(push(t, r, "a:1", image(t, layer(t, c.entries...))), "", store.Credentials{})
			wantError(t, err, c.word)
			n.wantNothing(false)
		})
	}
}

// TestDiskFull is on a disk that is really full.
func TestDiskFull(t *testing.T) {
	dir := newDisk(t, 64<<20)
	n := newNodeIn(t, dir)
	r := n.startRegistry(registrytest.Options{})
	filler := filepath.Join(dir, "others")
	must(t, os.WriteFile(filler, bytes.Repeat([]byte("x"), 40<<20), 0o644))
	random := make([]byte, 16<<20)
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	// It compresses well, so that it is the unpacking that the disk is too small for.
	l := layer(t, registrytest.File("small", "x"), registrytest.File("big", strings.Repeat(string(random[:1000]), 30_000)))
	pinned := push(t, r, "a:1", image(t, l))
	_, err := n.pull(pinned, "", store.Credentials{})
	wantError(t, err, "is full", dir, "no space left")
	n.wantNothing(false)
	wantFileSize(t, filler, 40<<20)
	must(t, os.RemoveAll(filepath.Join(dir, "trash")))
	must(t, os.Mkdir(filepath.Join(dir, "trash"), 0o700))
	must(t, os.Remove(filler))
	use := n.mustPull(pinned)
	wantFileSize(t, filepath.Join(use.Dirs[0].Name(), "big"), 30_000_000)
	// One whose download alone is too large is refused before it begins.
	incompressible := layer(t, registrytest.File("big", string(bytes.Repeat(random, 4))))
	r.Requests()
	_, err = n.pull(push(t, r, "b:1", image(t, incompressible)), "", store.Credentials{})
	wantError(t, err, "to download", dir)
	for _, request := range r.Requests() {
		if strings.HasPrefix(request, "GET") && strings.Contains(request, mustHex(t, incompressible)) {
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

// newDisk is a disk of this size.
func newDisk(t *testing.T, size int64) string {
	t.Helper()
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprint("size=", size)))
	t.Cleanup(func() { must(t, drivertest.UnmountBeneath(dir)) })
	return dir
}
