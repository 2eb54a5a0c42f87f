package unpack_test

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestDirectoryTimesBesideRenames: a rename anywhere on the machine keeps the kernel from being sure of a lookup through "..", which
// is no reason to leave a directory with a wrong time.
func TestDirectoryTimesBesideRenames(t *testing.T) {
	needs.Root(t)
	at := time.Unix(1_600_000_000, 123_456_789)
	entries := []registrytest.Entry{
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: "a/", Mode: 0o755, ModTime: at}},
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: "b/", Mode: 0o755, ModTime: at}},
		{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: "a/link", Linkname: "../b", Mode: 0o777, ModTime: at}},
	}
	const directories = 2000
	for i := range directories {
		name := fmt.Sprintf("a/link/d%d/", i)
		entries = append(entries, registrytest.Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755, ModTime: at}})
	}
	data, err := registrytest.Tar(entries...)
	must(t, err)

	renameElsewhere(t)
	for pass := range 3 {
		dir := t.TempDir()
		mustUnpack(t, data, filepath.Join(dir, "tree"))
		wrong := 0
		for i := range directories {
			info, err := os.Stat(filepath.Join(dir, "tree", "b", fmt.Sprintf("d%d", i)))
			must(t, err)
			if !info.ModTime().Equal(at) {
				wrong++
			}
		}
		if wrong > 0 {
			t.Fatalf("pass %d: %d of %d directories have a wrong time", pass, wrong, directories)
		}
	}
}

// renameElsewhere renames a directory to and fro until the test ends.
func renameElsewhere(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	must(t, os.Mkdir(a, 0o755))
	stop, stopped := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() {
		close(stop)
		<-stopped
	})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			_ = unix.Rename(a, b)
			_ = unix.Rename(b, a)
		}
	}()
}
