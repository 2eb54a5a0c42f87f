package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// sparseEntry returns the entry of a file of size bytes that is all hole, in the format of GNU tar.
func sparseEntry(t *testing.T, name string, size int64) []byte {
	t.Helper()
	var buffer bytes.Buffer
	must(t, tar.NewWriter(&buffer).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Format: tar.FormatGNU}))
	block := buffer.Bytes()[:512]
	block[156] = tar.TypeGNUSparse
	copy(block[386:], fmt.Sprintf("%011o\x00%011o\x00", size, 0))
	copy(block[483:], fmt.Sprintf("%011o\x00", size))
	copy(block[148:156], "        ")
	sum := 0
	for _, b := range block {
		sum += int(b)
	}
	copy(block[148:], fmt.Sprintf("%06o\x00 ", sum))
	return block
}

// plainEntry returns the entry of a file.
func plainEntry(t *testing.T, name, content string) []byte {
	t.Helper()
	var buffer bytes.Buffer
	writer := tar.NewWriter(&buffer)
	must(t, writer.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))}))
	_, err := writer.Write([]byte(content))
	must(t, err)
	must(t, writer.Flush())
	return buffer.Bytes()
}

// writeTar writes a tar of entries.
func writeTar(t *testing.T, entries ...[]byte) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.tar")
	must(t, os.WriteFile(path, append(bytes.Join(entries, nil), make([]byte, 1024)...), 0o600))
	file, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { file.Close() })
	return file
}

// TestManyManifests: an archive may have a manifest.json as often as it may have entries, each of which takes a block and has 8 MiB.
func TestManyManifests(t *testing.T) {
	file := writeTar(t, bytes.Repeat(sparseEntry(t, dockerManifestFile, MaxDocumentSize), 1000))
	began := time.Now()
	_, err := OpenArchive(t.Context(), file, t.TempDir(), platforms.Default(), NewDocuments(), unpack.Limits{})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "altogether") {
		t.Errorf("after %s: %v", time.Since(began), err)
	}
}

// TestSparseLayers: to read a sparse layer, or to ask for its size, must not take the headers of all entries before it each time.
func TestSparseLayers(t *testing.T) {
	const layers, others = 100, 3000
	var names, ids []string
	entries := [][]byte{bytes.Repeat(plainEntry(t, "blobs", ""), others)}
	for i := range layers {
		name := fmt.Sprintf("%064x/layer.tar", i)
		names, ids = append(names, fmt.Sprintf("%q", name)), append(ids, fmt.Sprintf("%q", digest.FromString(name)))
		entries = append(entries, sparseEntry(t, name, 1<<20))
	}
	config := strings.Repeat("c", 64) + ".json"
	entries = append(entries,
		plainEntry(t, config, fmt.Sprintf(`{"rootfs":{"diff_ids":[%s]}}`, strings.Join(ids, ","))),
		plainEntry(t, dockerManifestFile, fmt.Sprintf(`[{"Config":%q,"Layers":[%s]}]`, config, strings.Join(names, ","))))
	file := writeTar(t, entries...)
	// The tar reader asks whether the context has ended before each header.
	left := 10 * (others + layers)
	archive, err := OpenArchive(interrupted{t.Context(), &left}, file, t.TempDir(), platforms.Default(), NewDocuments(), unpack.Limits{})
	must(t, err)
	defer archive.Close()
	if len(archive.Layers) != layers || archive.Layers[layers-1].Descriptor.Size != 1<<20 {
		t.Fatalf("the image has %d layers, the last of %d bytes", len(archive.Layers), archive.Layers[layers-1].Descriptor.Size)
	}
	// There is no bound for this image, unless it is read again and again.
	left = maxSparseHeaders * 4
	for opened := 0; ; opened++ {
		blob, err := archive.OpenBlob(archive.Layers[opened%layers])
		if err == nil {
			blob.Close()
			continue
		}
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "sparse") || opened < layers {
			t.Errorf("%d layers were opened: %v", opened, err)
		}
		return
	}
}
