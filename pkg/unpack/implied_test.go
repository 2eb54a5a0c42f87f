package unpack_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// unpackListing unpacks a tar, and returns the implied directories.
func unpackListing(t *testing.T, data []byte, tree string, limits unpack.Limits) (unpack.Result, []string, error) {
	t.Helper()
	scratch := t.TempDir()
	result, err := unpack.Tar(t.Context(), bytes.NewReader(data), tree, scratch, limits)
	if err != nil {
		return result, nil, err
	}
	listed, err := unpack.ReadImplied(filepath.Join(scratch, unpack.ImpliedName))
	return result, listed, err
}

// TestImplied checks which directories count as made without an entry.
func TestImplied(t *testing.T) {
	file := func(name string) registrytest.Entry { return registrytest.File(name, "x") }
	dir := registrytest.Dir
	link := func(name, target string) registrytest.Entry {
		return registrytest.Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
	}
	forged := dir("d")
	forged.PAXRecords = map[string]string{"SCHILY.xattr.trusted.overlay.implied": "x"}
	for name, c := range map[string]struct {
		entries []registrytest.Entry
		// want are the directories, "." if it is the root too.
		want string
	}{
		"all have entries":       {[]registrytest.Entry{dir("."), dir("d"), file("d/f")}, ""},
		"no entry for the root":  {[]registrytest.Entry{dir("d"), file("d/f")}, "."},
		"one":                    {[]registrytest.Entry{dir("."), file("d/f"), file("d/g")}, "d"},
		"several":                {[]registrytest.Entry{dir("."), file("d/e/f"), file("d/g/f"), file("../h/f")}, "d d/e d/g h"},
		"an entry in the middle": {[]registrytest.Entry{dir("."), dir("d/e"), file("d/e/f/g")}, "d d/e/f"},
		"entries later":          {[]registrytest.Entry{file("d/e/f"), dir("d/e"), dir("."), file("d/g")}, "d"},
		"all entries later":      {[]registrytest.Entry{file("d/e/f"), dir("d/e"), dir("d"), dir("/")}, ""},
		"whiteout in it":         {[]registrytest.Entry{dir("."), file("d/.wh.gone")}, "d"},
		"opaque":                 {[]registrytest.Entry{dir("."), file("d/.wh..wh..opq")}, "d"},
		// The directory in lower layers is another one.
		"whiteout of it":         {[]registrytest.Entry{dir("."), file("d/e/f"), file(".wh.d")}, "d/e"},
		"through a link":         {[]registrytest.Entry{dir("."), dir("usr"), link("l", "/usr"), file("l/d/f")}, "usr/d"},
		"replaced by a file":     {[]registrytest.Entry{dir("."), file("d/e/f"), file("d")}, ""},
		"replaced by a link":     {[]registrytest.Entry{dir("."), file("d/e/f"), dir("o"), dir("o/e"), link("d", "o")}, ""},
		"replaced and made":      {[]registrytest.Entry{dir("."), file("d/e/f"), file("d/e"), dir("x"), file("d/g/f")}, "d d/g"},
		"a link in it":           {[]registrytest.Entry{dir("."), link("d/l", "f")}, "d"},
		"strange names":          {[]registrytest.Entry{dir("."), file("a\nb/\xff/f")}, "a\nb a\nb/\xff"},
		"attribute of the image": {[]registrytest.Entry{dir("."), forged, file("d/f")}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			tree := filepath.Join(workDir(t), "tree")
			result, listed, err := unpackListing(t, mustTar(t, c.entries...), tree, unpack.Limits{})
			must(t, err)
			var marked []string
			must(t, filepath.WalkDir(tree, func(path string, entry fs.DirEntry, err error) error {
				if err != nil || !entry.IsDir() {
					return err
				}
				dir, err := os.Open(path)
				must(t, err)
				defer dir.Close()
				isImplied, err := unpack.IsImplied(dir)
				if isImplied {
					name, err := filepath.Rel(tree, path)
					must(t, err)
					marked = append(marked, name)
				}
				return err
			}))
			if got := strings.Join(marked, " "); got != c.want {
				t.Errorf("%q are marked, want %q", got, c.want)
			}
			if len(listed) != result.Implied {
				t.Errorf("%d directories are listed, Tar says %d", len(listed), result.Implied)
			}
			slices.Sort(listed)
			listed = slices.Compact(listed)
			if want := slices.DeleteFunc(marked, func(name string) bool { return name == "." }); !slices.Equal(listed, want) {
				t.Errorf("%q are listed, want %q", listed, want)
			}
		})
	}
}

// TestImpliedLimits has layers that would make the driver keep too many paths, or write too much.
func TestImpliedLimits(t *testing.T) {
	deep := strings.Repeat(strings.Repeat("n", 39)+"/", 80)
	var long, many, later []registrytest.Entry
	for i := range 70 {
		long = append(long, registrytest.File(fmt.Sprint(i, "/", deep, "f"), ""))
	}
	// Each makes 100 directories.
	for i := range unpack.MaxImplied/100 + 1 {
		many = append(many, registrytest.File(fmt.Sprint(i, strings.Repeat("/d", 99), "/f"), ""))
	}
	for i := range 300 {
		later = append(later, registrytest.File(fmt.Sprint("d/", i, "/f"), ""), registrytest.Dir(fmt.Sprint("d/", i)))
	}
	for name, c := range map[string]struct {
		entries []registrytest.Entry
		limits  unpack.Limits
		refused string
	}{
		"bytes":         {long, unpack.Limits{}, "their paths have more than"},
		"number":        {many, unpack.Limits{}, "directories without entries"},
		"entries later": {later, unpack.Limits{}, ""},
		"disk":          {long, unpack.Limits{MaxBytes: 1 << 20}, "--max-layer-size"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "number" && testing.Short() {
				t.Skip("65536 directories take half a minute on a busy machine")
			}
			result, listed, err := unpackListing(t, mustTar(t, c.entries...), filepath.Join(workDir(t), "tree"), c.limits)
			if isUnpacked := result.Entries > 0; isUnpacked != (c.limits == unpack.Limits{}) {
				t.Errorf("the layer is unpacked: %t", isUnpacked)
			}
			if c.refused != "" {
				wantError(t, err, c.refused)
				if !errdefs.IsResourceExhausted(err) {
					t.Errorf("%v, want ResourceExhausted", err)
				}
				return
			}
			must(t, err)
			if !slices.Equal(listed, []string{"d"}) {
				t.Errorf("%d directories are listed", len(listed))
			}
		})
	}
}
