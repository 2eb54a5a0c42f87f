package erofs_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/erofstest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// TestLayersOfOverlays has images as the layers of a view, which nobody sees mounted: with whiteouts and an opaque directory, with other
// owners, written to, and as the layer of another view.
func TestLayersOfOverlays(t *testing.T) {
	needs.Root(t)
	work, remove, err := drivertest.WorkDir()
	must(t, err)
	t.Cleanup(func() { must(t, remove()) })
	mounter := newMounter(t, work)

	below := build(t)
	for _, name := range []string{"a", "b", "gone"} {
		below.file(below.Root(), name, int64(len(name)), map[int64]string{0: name})
	}
	opaque := below.dir(below.Root(), "opaque")
	below.file(opaque, "hidden", 1, map[int64]string{0: "x"})
	merged := below.dir(below.Root(), "merged")
	below.file(merged, "gone", 1, map[int64]string{0: "x"})
	below.file(merged, "stays", 1, map[int64]string{0: "x"})
	below.write()

	above := build(t)
	above.file(above.Root(), "a", 5, map[int64]string{0: "above"})
	_, err = above.Mknod(above.Root(), "gone", syscall.S_IFCHR, 0)
	must(t, err)
	opaque = above.dir(above.Root(), "opaque")
	must(t, above.SetXattr(opaque, "trusted.overlay.opaque", []byte("y")))
	above.file(opaque, "own", 1, map[int64]string{0: "x"})
	merged = above.dir(above.Root(), "merged")
	_, err = above.Mknod(merged, "gone", syscall.S_IFCHR, 0)
	must(t, err)
	must(t, above.SetXattr(merged, "trusted.overlay.origin", nil))
	above.write()

	lowers := []*os.File{erofstest.MountFile(t, above.metadata, above.data), erofstest.MountFile(t, below.metadata, below.data)}
	const want = "a=above b=b merged/stays=x opaque/own=x"
	spec := overlay.Spec{Lowers: lowers, Attributes: overlay.Attributes{ReadOnly: true}}
	view := mountView(t, mounter, work, "read-only", spec)
	wantFiles(t, view, want, 0)

	mapped := spec
	mapped.LayerOwner = overlay.IDs{UID: 1000, GID: 1000}
	wantFiles(t, mountView(t, mounter, work, "mapped", mapped), want, 1000)

	for _, dir := range []string{"upper", "work"} {
		must(t, os.Mkdir(filepath.Join(work, dir), 0o755))
	}
	written := overlay.Spec{Lowers: lowers, Upper: open(t, filepath.Join(work, "upper")), Work: open(t, filepath.Join(work, "work"))}
	view = mountView(t, mounter, work, "written", written)
	must(t, os.WriteFile(filepath.Join(view, "b"), []byte("written"), 0o644))
	must(t, os.WriteFile(filepath.Join(view, "gone"), []byte("again"), 0o644))
	must(t, os.Remove(filepath.Join(view, "merged/stays")))
	must(t, os.Rename(filepath.Join(view, "opaque"), filepath.Join(view, "renamed")))
	const after = "a=above b=written gone=again renamed/own=x"
	wantFiles(t, view, after, 0)

	again := overlay.Spec{Lowers: []*os.File{open(t, view)}, Attributes: overlay.Attributes{ReadOnly: true}}
	wantFiles(t, mountView(t, mounter, work, "again", again), after, 0)
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), " - erofs ") {
		t.Errorf("the images are mounted for all to see, %v", err)
	}
}

func newMounter(t *testing.T, work string) *overlay.Mounter {
	t.Helper()
	dir := filepath.Join(work, "mounter")
	must(t, os.Mkdir(dir, 0o755))
	features, err := overlay.Probe(dir)
	must(t, err)
	if !features.MountAPI || !features.LayerFD {
		t.Skip("this kernel takes no layers by descriptor")
	}
	mounter, err := overlay.NewMounter(overlay.Config{
		Dir: dir, Features: features, MountUtils: mount.NewWithoutSystemd(""), Commands: utilexec.New(),
	})
	must(t, err)
	t.Cleanup(func() { must(t, mounter.Close()) })
	return mounter
}

// mountView mounts a view in work until the test ends.
func mountView(t *testing.T, mounter *overlay.Mounter, work, name string, spec overlay.Spec) string {
	t.Helper()
	view := filepath.Join(work, name)
	must(t, os.Mkdir(view, 0o755))
	must(t, mounter.Overlay(spec, open(t, view)))
	t.Cleanup(func() { must(t, unix.Unmount(view, unix.MNT_DETACH)) })
	return view
}

// wantFiles checks the regular files of a view, their content, and their owner.
func wantFiles(t *testing.T, view, want string, owner uint32) {
	t.Helper()
	var got []string
	must(t, filepath.WalkDir(view, func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var stat unix.Stat_t
		must(t, unix.Lstat(path, &stat))
		if stat.Uid != owner || stat.Gid != owner {
			t.Errorf("%s belongs to %d:%d", path, stat.Uid, stat.Gid)
		}
		if !entry.Type().IsRegular() {
			return nil
		}
		content, err := os.ReadFile(path)
		name, _ := filepath.Rel(view, path)
		got = append(got, fmt.Sprintf("%s=%s", name, content))
		return err
	}))
	if got := strings.Join(got, " "); got != want {
		t.Errorf("the view has %s\nwant %s", got, want)
	}
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	dir, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
	must(t, err)
	t.Cleanup(func() { dir.Close() })
	return dir
}
