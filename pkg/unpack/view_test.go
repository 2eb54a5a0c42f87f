package unpack_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// newMounter returns a mounter with its directory in work.
func newMounter(t *testing.T, work string) *overlay.Mounter {
	t.Helper()
	dir := filepath.Join(work, "mounter")
	must(t, os.Mkdir(dir, 0o755))
	features, err := overlay.Probe(dir)
	must(t, err)
	mounter, err := overlay.NewMounter(overlay.Config{
		Dir: dir, Features: features, MountUtils: mount.NewWithoutSystemd(""), Commands: utilexec.New(),
	})
	must(t, err)
	t.Cleanup(func() { must(t, mounter.Close()) })
	return mounter
}

// TestNoViewShowsAWhiteout mounts layers whose whiteouts hide nothing, and checks that programs can read the view.
func TestNoViewShowsAWhiteout(t *testing.T) {
	needs.Root(t)
	needs.Installed(t, "cp", "tar", "ls")
	file := func(name string) registrytest.Entry { return registrytest.File(name, "x") }
	dir := registrytest.Dir
	work := workDir(t)
	mounter := newMounter(t, work)
	for name, c := range map[string]struct {
		// layers are the layers, the lowest first.
		layers [][]registrytest.Entry
		// want are the files of the view.
		want string
	}{
		"no directory below": {
			layers: [][]registrytest.Entry{{file("x")}, {dir("d"), file("d/.wh.gone"), file("d/own")}}, want: "d d/own x",
		},
		"no entry for the directory": {layers: [][]registrytest.Entry{{file("x")}, {file("d/e/.wh.gone")}}, want: "d d/e x"},
		"lowest layer":               {layers: [][]registrytest.Entry{{dir("d"), file("d/.wh.gone"), file("d/own")}}, want: "d d/own"},
		"lowest layer's root":        {layers: [][]registrytest.Entry{{file(".wh.gone"), file("own")}}, want: "own"},
		"a file below": {
			layers: [][]registrytest.Entry{{file("d")}, {dir("d"), file("d/.wh.gone"), file("d/own")}}, want: "d d/own",
		},
		"whiteouts, then opaque": {
			layers: [][]registrytest.Entry{{file("d/gone")}, {file("d/.wh.gone"), file("d/own"), file("d/.wh..wh..opq")}}, want: "d d/own",
		},
		"opaque, then whiteouts": {
			layers: [][]registrytest.Entry{{file("d/gone")}, {file("d/.wh..wh..opq"), file("d/.wh.gone"), file("d/own")}}, want: "d d/own",
		},
		"whiteouts deep, then opaque": {
			layers: [][]registrytest.Entry{{file("d/e/gone")}, {file("d/e/.wh.gone"), file("d/.wh..wh..opq")}}, want: "d d/e",
		},
		"whiteout of the directory": {
			layers: [][]registrytest.Entry{{file("d/gone")}, {dir("d"), file("d/.wh.gone"), file(".wh.d")}}, want: "d",
		},
		"whiteout below a whiteout": {
			layers: [][]registrytest.Entry{{file("d/gone")}, {file(".wh.d")}, {file("d/.wh.gone"), file("d/own")}}, want: "d d/own",
		},
		"in a directory that is merged": {
			layers: [][]registrytest.Entry{{file("d/gone"), file("d/stays")}, {file("d/.wh.gone")}}, want: "d d/stays",
		},
		"opaque in the middle": {
			layers: [][]registrytest.Entry{{file("d/a")}, {file("d/.wh.gone"), file("d/.wh..wh..opq"), file("d/b")}, {file("d/.wh.b"), file("d/c")}},
			want:   "d d/c",
		},
	} {
		t.Run(name, func(t *testing.T) {
			base := filepath.Join(work, strings.ReplaceAll(name, " ", "-"))
			for _, dir := range []string{"", "view", "upper", "work"} {
				must(t, os.Mkdir(filepath.Join(base, dir), 0o755))
			}
			var lowers []*os.File
			for i, entries := range c.layers {
				tree := filepath.Join(base, fmt.Sprint("tree-", i))
				mustUnpack(t, mustTar(t, entries...), tree)
				lowers = slices.Insert(lowers, 0, openPath(t, tree))
			}
			view := filepath.Join(base, "view")
			target := openPath(t, view)
			must(t, mounter.Overlay(overlay.Spec{Lowers: lowers, Attributes: overlay.Attributes{ReadOnly: true}}, target))
			t.Cleanup(func() { must(t, unix.Unmount(view, unix.MNT_DETACH)) })
			wantView(t, view, base, c.want)
			must(t, unix.Unmount(view, 0))
			must(t, mounter.Overlay(overlay.Spec{
				Lowers: lowers, Upper: openPath(t, filepath.Join(base, "upper")), Work: openPath(t, filepath.Join(base, "work")),
			}, target))
			wantView(t, view, base, c.want)
			// The name is free, also after it was used.
			gone := "gone"
			if strings.HasPrefix(c.want, "d") {
				gone = "d/gone"
			}
			must(t, os.WriteFile(filepath.Join(view, gone), nil, 0o644))
			must(t, os.Remove(filepath.Join(view, gone)))
			wantView(t, view, base, c.want)
		})
	}
}

// wantView checks the names in a view, and that programs can list and copy it.
func wantView(t *testing.T, view, scratch, want string) {
	t.Helper()
	var names []string
	err := filepath.WalkDir(view, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(view, path)
		if err != nil || name == "." {
			return err
		}
		names = append(names, name)
		_, err = os.Lstat(path)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if got := strings.Join(names, " "); got != want {
		t.Errorf("the view has %q instead of %q", got, want)
	}
	run(t, "ls", "-lR", view)
	run(t, "tar", "-cf", filepath.Join(scratch, "copy.tar"), "-C", view, ".")
	copied := filepath.Join(scratch, "copy")
	run(t, "cp", "-a", view, copied)
	must(t, os.RemoveAll(copied))
}
