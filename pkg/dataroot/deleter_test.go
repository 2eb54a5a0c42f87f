package dataroot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// newDeleter returns a deleter, and a directory on the file system of its trash.
func newDeleter(t *testing.T) (d *Deleter, dir string) {
	t.Helper()
	dir = t.TempDir()
	trash := filepath.Join(dir, "trash")
	must(t, os.Mkdir(trash, 0o700))
	d, err := NewDeleter(trash)
	must(t, err)
	t.Cleanup(func() { d.Close() })
	return d, dir
}

// wantEmpty deletes what is in the trash.
func wantEmpty(t *testing.T, d *Deleter) {
	t.Helper()
	must(t, d.empty(t.Context()))
	entries, err := os.ReadDir(d.trash.Name())
	must(t, err)
	if len(entries) != 0 {
		t.Errorf("%d entries are left in the trash", len(entries))
	}
}

// TestWait: who waits for the deleter goes on when its directories are gone, or with the request.
func TestWait(t *testing.T) {
	d, dir := newDeleter(t)
	ended, end := context.WithCancel(t.Context())
	end()
	if err := d.Wait(ended); err == nil {
		t.Error("Wait did not wait for what an earlier process left")
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { d.Run(ctx) })
	for range 3 {
		must(t, os.MkdirAll(filepath.Join(dir, "tree/a/b"), 0o700))
		must(t, d.Discard(filepath.Join(dir, "tree")))
		must(t, d.Wait(t.Context()))
		entries, err := os.ReadDir(d.trash.Name())
		must(t, err)
		if len(entries) != 0 {
			t.Errorf("%d entries are left in the trash", len(entries))
		}
	}
	stop()
	running.Wait()
}

// makeDeep makes a directory with nested directories of one name.
func makeDeep(t *testing.T, path, name string, levels int) {
	t.Helper()
	must(t, os.Mkdir(path, 0o700))
	dir, err := linux.OpenDir(path)
	must(t, err)
	for range levels {
		must(t, linux.Mkdirat(dir, name, 0o700))
		next, err := linux.OpenNamed(dir, name, path)
		must(t, err)
		must(t, dir.Close())
		dir = next
	}
	must(t, dir.Close())
}

func TestDeleter(t *testing.T) {
	d, dir := newDeleter(t)
	precious := filepath.Join(dir, "precious")
	must(t, os.WriteFile(precious, []byte("precious"), 0o600))
	wide := filepath.Join(dir, "wide")
	must(t, os.Mkdir(wide, 0o700))
	for i := range 3*deleteBatch + 1 {
		must(t, os.WriteFile(filepath.Join(wide, fmt.Sprint(i)), nil, 0))
	}
	must(t, os.Symlink(precious, filepath.Join(wide, "link")))
	must(t, os.Symlink(dir, filepath.Join(wide, "dirlink")))
	must(t, os.Mkdir(filepath.Join(wide, "closed"), 0))

	for _, path := range []string{wide, filepath.Join(dir, "missing"), wide} {
		must(t, d.Discard(path))
	}
	wantEmpty(t, d)
	if content, err := os.ReadFile(precious); err != nil || string(content) != "precious" {
		t.Errorf("a link was followed: %q, %v", content, err)
	}
}

// TestDeleteDeepTrees deletes trees that are deeper than there are descriptors, and trees with paths longer than PATH_MAX
// within the depth that is followed at once.
func TestDeleteDeepTrees(t *testing.T) {
	for name, row := range map[string]struct {
		name   string
		levels int
	}{
		"16000 levels":             {"down", 16000},
		"80 levels of 200 bytes":   {strings.Repeat("x", 200), 80},
		"1000 levels of 255 bytes": {strings.Repeat("x", 255), 1000},
	} {
		t.Run(name, func(t *testing.T) {
			d, dir := newDeleter(t)
			deep := filepath.Join(dir, "deep")
			makeDeep(t, deep, row.name, row.levels)
			must(t, d.Discard(deep))
			wantEmpty(t, d)
		})
	}
}

// TestDeleteTreeDeeperThanIsKnown deletes trees of which the way back is not known, with directories and files on each level.
func TestDeleteTreeDeeperThanIsKnown(t *testing.T) {
	for _, levels := range []int{1, treeOpen, treeOpen + 1, 150} {
		t.Run(fmt.Sprint(levels, " levels are known"), func(t *testing.T) {
			d, dir := newDeleter(t)
			d.levels = levels
			deep := filepath.Join(dir, "deep")
			must(t, os.Mkdir(deep, 0o700))
			for path, level := deep, 0; level < 100; level++ {
				path = filepath.Join(path, "d")
				must(t, os.MkdirAll(filepath.Join(path, "a/b/c"), 0o700))
				must(t, os.MkdirAll(filepath.Join(path, "z/y"), 0o700))
				must(t, os.WriteFile(filepath.Join(path, "f"), nil, 0o600))
			}
			must(t, d.Discard(deep))
			wantEmpty(t, d)
		})
	}
}

// TestDeleteSiblingsBelowWhatIsKnown: a pod makes many directories at the bottom of a tree that is deeper than is known. They are deleted
// in one pass, and not each from the top.
func TestDeleteSiblingsBelowWhatIsKnown(t *testing.T) {
	const levels, siblings = 50, 200
	_, dir := newDeleter(t)
	deep := filepath.Join(dir, "deep")
	makeDeep(t, deep, "d", levels-1)
	for i := range siblings {
		must(t, os.MkdirAll(filepath.Join(deep+strings.Repeat("/d", levels-1), fmt.Sprint(i), "child"), 0o700))
	}
	parent, err := os.Open(dir)
	must(t, err)
	defer parent.Close()
	steps := 0
	for passes := 0; ; passes++ {
		tree := tree{name: "deep", levels: levels, pace: &pace{began: time.Now()}}
		top, err := linux.OpenNamed(parent, "deep", "deep")
		must(t, err)
		must(t, tree.enter(top))
		for len(tree.open) > 0 {
			must(t, tree.step(t.Context()))
			steps++
		}
		if !tree.cut {
			break
		}
		if passes > 3 {
			t.Fatal("there are more than 3 passes")
		}
	}
	if most := 6 * (levels + siblings); steps > most {
		t.Errorf("%d steps for %d directories", steps, levels+2*siblings)
	}
}

// TestDeleterLeavesWhatWasMovedAway: a directory that is moved out of a tree while its files are deleted does not lead out of it.
func TestDeleterLeavesWhatWasMovedAway(t *testing.T) {
	_, dir := newDeleter(t)
	deep, precious := filepath.Join(dir, "deep"), filepath.Join(dir, "precious")
	makeDeep(t, deep, "d", 2*treeOpen)
	must(t, os.Mkdir(precious, 0o700))
	must(t, os.WriteFile(filepath.Join(precious, "file"), nil, 0o600))
	parent, err := os.Open(dir)
	must(t, err)
	defer parent.Close()
	tree := tree{name: "deep", levels: treeLevels, pace: &pace{}}
	top, err := linux.OpenNamed(parent, "deep", "deep")
	must(t, err)
	defer tree.close()
	must(t, tree.enter(top))
	for len(tree.ids) < 2*treeOpen {
		must(t, tree.step(t.Context()))
	}
	must(t, os.Rename(deep+strings.Repeat("/d", len(tree.ids)-1), filepath.Join(precious, "moved")))
	for err == nil && len(tree.open) > 0 {
		err = tree.step(t.Context())
	}
	if !errors.Is(err, linux.ErrMoved) {
		t.Errorf("%v, want ErrMoved", err)
	}
	if _, err := os.Lstat(filepath.Join(precious, "file")); err != nil {
		t.Error(err)
	}
}

// TestDeleteDeepTreeOnBtrfs deletes a deep tree in a subvolume, from which nothing can be renamed.
func TestDeleteDeepTreeOnBtrfs(t *testing.T) {
	needs.Root(t)
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	if err := errors.Join(drivertest.MakeImage("btrfs", image, 256<<20, ""), drivertest.MountImage("btrfs", image, dir)); err != nil {
		t.Skipf("no btrfs here: %v", err)
	}
	t.Cleanup(func() { _ = linux.UnmountLazily(dir) })
	trash, base := filepath.Join(dir, "trash"), filepath.Join(dir, "volume")
	must(t, errors.Join(os.Mkdir(trash, 0o700), os.Mkdir(base, 0o700)))
	must(t, exec.Command("btrfs", "subvolume", "create", filepath.Join(base, "data")).Run())
	makeDeep(t, filepath.Join(base, "data/deep"), "down", 200)
	d, err := NewDeleter(trash)
	must(t, err)
	defer d.Close()
	must(t, d.Discard(base))
	wantEmpty(t, d)
}

func TestDeleterStopsWithItsContext(t *testing.T) {
	d, _ := newDeleter(t)
	for i := range 10 {
		must(t, os.WriteFile(filepath.Join(d.trash.Name(), fmt.Sprint(i)), nil, 0o600))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.empty(ctx); err == nil {
		t.Error("it went on")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
