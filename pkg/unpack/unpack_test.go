package unpack_test

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

	"github.com/containerd/errdefs"
	umoci "github.com/opencontainers/umoci/oci/layer"
	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
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

// TestRandomImagesAsUmoci compares layer by layer, and the mounted view with what umoci makes of all layers in one tree.
func TestRandomImagesAsUmoci(t *testing.T) {
	work := workDir(t)
	must(t, os.Mkdir(filepath.Join(work, "mounter"), 0o755))
	features, err := overlay.Probe(filepath.Join(work, "mounter"))
	must(t, err)
	mounter, err := overlay.NewMounter(overlay.Config{
		Dir: filepath.Join(work, "mounter"), Features: features, MountUtils: mount.NewWithoutSystemd(""), Commands: utilexec.New(),
	})
	must(t, err)
	defer mounter.Close()
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
		// A directory that a layer implies has no attributes to give to the view.
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
	needs.Root(t)
	if testing.Short() {
		t.Skip("a real tree takes seconds")
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4G"))
	t.Cleanup(func() { must(t, drivertest.UnmountBeneath(dir)) })
	path := filepath.Join(dir, "tree.tar")
	// Links and a set-user-ID program are among it.
	root := strings.TrimSpace(run(t, "go", "env", "GOROOT"))
	run(t, "tar", "--format=posix", "--numeric-owner", "--xattrs", "--sort=name", "-cf", path, "-C", root, "src", "-C", "/", "usr/bin/su", "etc/ssl", "etc/alternatives")
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

// TestHostileTar unpacks tars that ask for what must not be done, and checks that it was not.
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
			dir := workDir(t)
			root := filepath.Join(dir, "layer/tree")
			must(t, os.Mkdir(filepath.Dir(root), 0o755))
			_, err := unpackTar(t, mustTar(t, c.entries...), root, unpack.Limits{})
			var outside []string
			for _, pattern := range []string{"/tmp/outside", "/outside", filepath.Join(dir, "outside"), filepath.Join(dir, "layer/outside")} {
				outside = append(outside, mustGlob(t, pattern)...)
			}
			if len(outside) > 0 {
				t.Fatalf("written outside of the layer: %q", outside)
			}
			if c.refused != "" {
				wantError(t, err, c.refused)
				return
			}
			must(t, err)
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
			tree := filepath.Join(workDir(t), "tree")
			mustUnpack(t, mustTar(t, entries...), tree)
			wantFile(t, filepath.Join(tree, "d/own"), "x")
			if attributes := xattrsOf(t, filepath.Join(tree, "d")); !strings.Contains(attributes, `trusted.overlay.opaque="y"`) {
				t.Errorf("what lower layers have in the directory shows: %s", attributes)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	many := []registrytest.Entry{}
	for i := range 50 {
		many = append(many, registrytest.File(fmt.Sprint(i), "x"))
	}
	zeros := registrytest.File("zeros", strings.Repeat("\x00", 10<<20))
	for name, c := range map[string]struct {
		limits  unpack.Limits
		entries []registrytest.Entry
		word    string
	}{
		"bytes":   {unpack.Limits{MaxBytes: 1 << 20}, []registrytest.Entry{zeros}, "--max-layer-size"},
		"entries": {unpack.Limits{MaxEntries: 49}, many, "--max-layer-entries"},
		"reserve": {unpack.Limits{MinFreePercent: 101}, many, "--min-free-disk-percent"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := unpackTar(t, mustTar(t, c.entries...), filepath.Join(workDir(t), "tree"), c.limits)
			wantError(t, err, c.word)
			if !errdefs.IsResourceExhausted(err) {
				t.Errorf("the error is of another kind: %v", err)
			}
		})
	}
}

// workDir is a directory on a file system that can hold layers.
func workDir(t *testing.T) string {
	t.Helper()
	needs.Root(t)
	dir, remove, err := drivertest.WorkDir()
	must(t, err)
	t.Cleanup(func() { must(t, remove()) })
	return dir
}

func unpackTar(t *testing.T, data []byte, tree string, limits unpack.Limits) (unpack.Result, error) {
	t.Helper()
	scratch := filepath.Join(filepath.Dir(tree), filepath.Base(tree)+"-scratch")
	must(t, os.Mkdir(scratch, 0o700))
	defer func() { must(t, os.RemoveAll(scratch)) }()
	return unpack.Tar(t.Context(), bytes.NewReader(data), tree, scratch, limits)
}

func mustUnpack(t *testing.T, data []byte, tree string) unpack.Result {
	t.Helper()
	result, err := unpackTar(t, data, tree, unpack.Limits{})
	must(t, err)
	return result
}

func mustTar(t *testing.T, entries ...registrytest.Entry) []byte {
	t.Helper()
	data, err := registrytest.Tar(entries...)
	must(t, err)
	return data
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, where one with %q should be", words)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error %q does not say %q", err, word)
		}
	}
}

func wantFile(t *testing.T, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	} else if string(got) != want {
		t.Errorf("%s has %q instead of %q", path, got, want)
	}
}
