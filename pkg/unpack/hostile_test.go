package unpack_test

import (
	"archive/tar"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestHostileTar unpacks hostile tars. It checks that they are refused, or that their hostile parts have no effect.
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
		// refused is a part of the error. If it is empty, the layer is unpacked.
		refused string
		// has and hasNot are paths in the unpacked layer.
		has    []string
		hasNot []string
	}{
		"absolute path": {entries: []registrytest.Entry{registrytest.File("/outside", "x")}, has: []string{"outside"}},
		"path up":       {entries: []registrytest.Entry{registrytest.File("../../outside", "x")}, has: []string{"outside"}},
		"path through an absolute link": {
			entries: []registrytest.Entry{registrytest.Dir("tmp"), link("l", "/tmp"), registrytest.File("l/outside", "x")},
			has:     []string{"tmp/outside"},
		},
		"path through a link up": {
			entries: []registrytest.Entry{registrytest.Dir("d"), link("d/l", "../../../.."), registrytest.File("d/l/outside", "x")},
			has:     []string{"outside"},
		},
		"path through links in a chain": {
			entries: []registrytest.Entry{registrytest.Dir("tmp"), link("a", "b"), link("b", "/../../tmp"), registrytest.File("a/outside", "x")},
			has:     []string{"tmp/outside"},
		},
		"path through a dangling link": {
			entries: []registrytest.Entry{link("l", "/nowhere/at/all"), registrytest.File("l/outside", "x")},
			refused: "l",
		},
		"path through a loop": {
			entries: []registrytest.Entry{link("a", "b"), link("b", "a"), registrytest.File("a/outside", "x")},
			refused: "levels of symbolic links",
		},
		"path through a file": {
			entries: []registrytest.Entry{registrytest.File("f", "x"), registrytest.File("f/outside", "x")},
			refused: "directory",
		},
		"file over a link": {
			entries: []registrytest.Entry{link("l", "/outside"), registrytest.File("l", "x")},
			has:     []string{"l"},
		},
		"directory over a link": {
			entries: []registrytest.Entry{link("l", "/tmp"), registrytest.Dir("l"), registrytest.File("l/outside", "x")},
			has:     []string{"l/outside"},
		},
		"whiteout through a link": {
			entries: []registrytest.Entry{registrytest.Dir("tmp"), link("l", "/tmp"), registrytest.File("l/.wh.outside", "")},
			has:     []string{"tmp/outside"},
		},
		"whiteout of the directory": {entries: []registrytest.Entry{registrytest.File("d/.wh..", "")}, refused: "whiteout"},
		"whiteout of what is above": {entries: []registrytest.Entry{registrytest.File("d/.wh...", "")}, refused: "whiteout"},
		"whiteout of nothing":       {entries: []registrytest.Entry{registrytest.File("d/.wh.", "")}, refused: "whiteout"},
		"hard link out":             {entries: []registrytest.Entry{hard("h", "/etc/passwd")}, refused: "hard link"},
		"hard link up":              {entries: []registrytest.Entry{hard("h", "../../../../../../etc/passwd")}, refused: "hard link"},
		"hard link through a link":  {entries: []registrytest.Entry{link("l", "/etc"), hard("h", "l/passwd")}, refused: "hard link"},
		"hard link to a link": {
			entries: []registrytest.Entry{link("l", "/etc/passwd"), hard("h", "l"), registrytest.File("h", "x")},
			has:     []string{"h", "l"},
		},
		"hard link to a whiteout": {entries: []registrytest.Entry{registrytest.File(".wh.w", ""), hard("h", "w")}, refused: "removed"},
		"hard link to the root":   {entries: []registrytest.Entry{hard("h", "/")}, refused: "root"},
		"whiteout as a device": {
			entries: []registrytest.Entry{registrytest.File("f", "x"), device("w")}, has: []string{"f"},
			hasNot: []string{"w"},
		},
		"redirect": {
			entries: []registrytest.Entry{with(registrytest.Dir("d"), "trusted.overlay.redirect", "/secret")},
			has:     []string{"d"},
		},
		"user redirect": {
			entries: []registrytest.Entry{with(registrytest.Dir("d"), "user.overlay.redirect", "/secret")},
			has:     []string{"d"},
		},
		"metacopy": {
			entries: []registrytest.Entry{with(registrytest.File("f", "x"), "trusted.overlay.metacopy", "")},
			has:     []string{"f"},
		},
		"opaque": {
			entries: []registrytest.Entry{with(registrytest.Dir("./"), "trusted.overlay.opaque", "y"), registrytest.File("f", "x")},
			has:     []string{"f"},
		},
		"root as a file": {entries: []registrytest.Entry{registrytest.File(".", "x")}, refused: "directory"},
		"name too long": {
			entries: []registrytest.Entry{registrytest.File(strings.Repeat("x", 300), "x")},
			refused: "too long",
		},
		"path too long": {
			entries: []registrytest.Entry{registrytest.File(strings.Repeat("x/", 2500)+"x", "x")},
			refused: "4095",
		},
		"AUFS's own": {
			entries: []registrytest.Entry{
				registrytest.File(".wh..wh.plnk/1.2", "x"),
				registrytest.File(".wh..wh.aufs", ""), registrytest.File("f", "x"),
			},
			has:    []string{"f"},
			hasNot: []string{".wh..wh.aufs"},
		},
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
