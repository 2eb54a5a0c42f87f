package dataroot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
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

// wantEmpty deletes what is in the trash, as often as directories may have been moved to its top.
func wantEmpty(t *testing.T, d *Deleter, rounds int) {
	t.Helper()
	for range rounds {
		must(t, d.empty(t.Context()))
	}
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
		next, err := linux.OpenDirAt(dir, name)
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
	wantEmpty(t, d, 1)
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
		"3000 levels":              {"down", 3000},
		"80 levels of 200 bytes":   {strings.Repeat("x", 200), 80},
		"1000 levels of 255 bytes": {strings.Repeat("x", 255), 1000},
	} {
		t.Run(name, func(t *testing.T) {
			d, dir := newDeleter(t)
			deep := filepath.Join(dir, "deep")
			makeDeep(t, deep, row.name, row.levels)
			must(t, d.Discard(deep))
			wantEmpty(t, d, row.levels/deleteDepth+2)
		})
	}
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
