package unpack_test

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// FuzzUnpack unpacks any tar. It checks that a directory beside the tree does not change.
func FuzzUnpack(f *testing.F) {
	for _, headers := range [][]tar.Header{
		{{Typeflag: tar.TypeReg, Name: "../outside/x"}, {Typeflag: tar.TypeDir, Name: "d"}},
		{{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "../../outside"}, {Typeflag: tar.TypeReg, Name: "l/x"}},
		{{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "/outside"}, {Typeflag: tar.TypeLink, Name: "h", Linkname: "l/file"}},
		{{Typeflag: tar.TypeReg, Name: "d/.wh..wh..opq"}, {Typeflag: tar.TypeReg, Name: "d/.wh.x"}, {Typeflag: tar.TypeReg, Name: ".wh..."}},
		{{Typeflag: tar.TypeReg, Name: "f", PAXRecords: map[string]string{
			"SCHILY.xattr.user.a": "b", "SCHILY.xattr.trusted.overlay.redirect": "/",
		}}},
		{{Typeflag: tar.TypeChar, Name: "c"}, {Typeflag: tar.TypeFifo, Name: "p"}, {Typeflag: tar.TypeDir, Name: "c"}},
	} {
		var buffer bytes.Buffer
		writer := tar.NewWriter(&buffer)
		for _, header := range headers {
			if err := writer.WriteHeader(&header); err != nil {
				f.Fatal(err)
			}
		}
		if err := writer.Close(); err != nil {
			f.Fatal(err)
		}
		f.Add(buffer.Bytes())
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		outside := filepath.Join(dir, "outside")
		if err := os.Mkdir(outside, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(outside, "file"), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
		before := look(t, outside)
		layer := filepath.Join(dir, "layer")
		if err := os.Mkdir(layer, 0o755); err != nil {
			t.Fatal(err)
		}
		scratch := filepath.Join(layer, "scratch")
		if err := os.Mkdir(scratch, 0o755); err != nil {
			t.Fatal(err)
		}
		// Errors are expected for most inputs.
		limits := unpack.Limits{MaxBytes: 1 << 20, MaxEntries: 1000}
		_, _ = unpack.Tar(t.Context(), bytes.NewReader(data), filepath.Join(layer, "tree"), scratch, limits)
		if after := look(t, outside); after != before {
			t.Errorf("%+v became %+v", before, after)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
			t.Errorf("there is more than the layer and what is outside: %v, %v", entries, err)
		}
		// The unpacker's own files, and a tree.
		if err := filepath.WalkDir(layer, func(path string, _ os.DirEntry, err error) error { return err }); err != nil {
			t.Error(err)
		}
	})
}

// seen is what a write to the directory, or to the file in it, would change.
type seen struct {
	dir, file unix.Timespec
	links     uint64
	mode      uint32
}

func look(t *testing.T, outside string) seen {
	var dir, file unix.Stat_t
	if err := unix.Stat(outside, &dir); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(filepath.Join(outside, "file"), &file); err != nil {
		t.Fatal(err)
	}
	return seen{dir.Ctim, file.Ctim, uint64(file.Nlink), file.Mode}
}
