package store_test

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestTarOfGit takes a tar of git archive, which begins with a PAX global header, as an archive and as a layer.
func TestTarOfGit(t *testing.T) {
	global := registrytest.Entry{Header: tar.Header{
		Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "e6acb02"},
	}}
	data := mustTar(t, global, registrytest.Dir("src"), registrytest.File("src/main.go", "x"))
	n := newNode(t)
	path := filepath.Join(t.TempDir(), "git.tar")
	must(t, os.WriteFile(path, data, 0o644))
	imported, err := n.importFile(path, "")
	must(t, err)
	defer imported.Release()
	wantFile(t, filepath.Join(imported.Dirs[0].Name(), "src/main.go"), "x")

	l, err := registrytest.LayerOf(data)
	must(t, err)
	r := n.startRegistry(registrytest.Options{})
	pulled, err := n.pull(push(t, r, "git:1", image(t, layer(t, registrytest.File("f", "x")), l)), "", registry.Credentials{})
	must(t, err)
	defer pulled.Release()
	wantFile(t, filepath.Join(pulled.Dirs[0].Name(), "src/main.go"), "x")
}

// TestWrongBlobsAreInvalid checks the error of blobs whose digest is right, but which cannot be decompressed.
func TestWrongBlobsAreInvalid(t *testing.T) {
	data := mustTar(t, registrytest.File("f", strings.Repeat("text of a file\n", 10_000)))
	// The compressed data of gzip is between a header of 10 bytes and a trailer of 8.
	whole := registrytest.Gzip(data)
	change := func(at int) []byte {
		changed := bytes.Clone(whole)
		changed[at] ^= 0xff
		return changed
	}
	n := newNode(t)
	r := n.startRegistry(registrytest.Options{})
	for name, c := range map[string]struct {
		blob  []byte
		words []string
	}{
		"gzip data":        {blob: change(30), words: []string{"flate"}},
		"gzip checksum":    {blob: change(len(whole) - 8), words: []string{"gzip", "checksum"}},
		"truncated gzip":   {blob: whole[:len(whole)/2], words: []string{"unexpected EOF"}},
		"gzip of half":     {blob: registrytest.Gzip(data[:len(data)/2]), words: []string{"unexpected EOF"}},
		"zstd data":        {blob: append(zstdOf(25, nil), 7, 0, 0), words: []string{"decompress"}},
		"truncated zstd":   {blob: zstdOf(25, data)[:1000], words: []string{"unexpected EOF"}},
		"zstd window":      {blob: zstdOf(26, data), words: []string{"32 MiB", "--long"}},
		"zstd window, big": {blob: zstdOf(41, data), words: []string{"32 MiB", "--long"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := static.NewLayer(c.blob, types.OCILayer)
			_, err := n.pull(push(t, r, "a:1", image(t, l)), "", registry.Credentials{})
			wantError(t, err, append(c.words, mustHex(t, l))...)
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("the error is of another kind: %v", err)
			}
		})
	}
	l, err := registrytest.LayerOf(zstdOf(25, data))
	must(t, err)
	n.mustPull(push(t, r, "a:2", image(t, l)))
}

// zstdOf returns data in a frame of zstd whose window is a power of two (RFC 8878, 3.1.1).
func zstdOf(windowLog byte, data []byte) []byte {
	frame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0, (windowLog - 10) << 3}
	const maxBlock = 128 << 10
	for block := range slices.Chunk(data, maxBlock) {
		frame = append(frame, byte(len(block)<<3), byte(len(block)>>5), byte(len(block)>>13))
		frame = append(frame, block...)
	}
	if data == nil {
		return frame
	}
	// The last block is empty.
	return append(frame, 1, 0, 0)
}
