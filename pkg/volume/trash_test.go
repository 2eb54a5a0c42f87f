package volume

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestTrash(t *testing.T) {
	dir := t.TempDir()
	trash := newTrash(filepath.Join(dir, "trash"))
	must(t, os.Mkdir(trash.dir, 0o700))
	precious := filepath.Join(dir, "precious")
	must(t, os.WriteFile(precious, []byte("precious"), 0o600))

	wide := filepath.Join(dir, "wide")
	must(t, os.Mkdir(wide, 0o700))
	for i := range 3*trashBatch + 1 {
		must(t, os.WriteFile(filepath.Join(wide, fmt.Sprint(i)), nil, 0))
	}
	must(t, os.Symlink(precious, filepath.Join(wide, "link")))
	must(t, os.Symlink(dir, filepath.Join(wide, "dirlink")))
	must(t, os.Mkdir(filepath.Join(wide, "closed"), 0))
	// Deeper than PATH_MAX and than any limit of descriptors.
	deep := filepath.Join(dir, "deep")
	must(t, os.Mkdir(deep, 0o700))
	fd, err := unix.Open(deep, unix.O_PATH|unix.O_DIRECTORY, 0)
	must(t, err)
	for range 3000 {
		must(t, unix.Mkdirat(fd, "down", 0o700))
		next, err := unix.Openat(fd, "down", unix.O_PATH|unix.O_DIRECTORY, 0)
		must(t, err)
		must(t, unix.Close(fd))
		fd = next
	}
	must(t, unix.Close(fd))

	for _, path := range []string{wide, deep, filepath.Join(dir, "missing"), wide} {
		must(t, trash.put(path))
	}
	for range 3000/trashDepth + 2 {
		if err := trash.empty(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(trash.dir)
	must(t, err)
	if len(entries) != 0 {
		t.Errorf("%d entries are left in the trash", len(entries))
	}
	if content, err := os.ReadFile(precious); err != nil || string(content) != "precious" {
		t.Errorf("a link was followed: %q, %v", content, err)
	}
}

func TestTrashStopsWithItsContext(t *testing.T) {
	dir := t.TempDir()
	trash := newTrash(dir)
	for i := range 10 {
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600))
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := trash.empty(ctx); err == nil {
		t.Error("it went on")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
