package store

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestBlobsOfALayerAreBounded: a tar can be compressed in any number of ways, each of which is another blob of the same layer.
func TestBlobsOfALayerAreBounded(t *testing.T) {
	dir := t.TempDir()
	layout := layout{path: dir, discard: os.RemoveAll}
	if err := layout.create(); err != nil {
		t.Fatal(err)
	}
	c, err := openCatalogue(t.Context(), layout, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	layer := Layer{DiffID: digest.FromString("layer"), Digest: digest.FromString("0")}
	built := filepath.Join(dir, "built")
	for i := range maxOtherBlobs + 100 {
		if err := os.MkdirAll(filepath.Join(built, treeName), 0o700); err != nil {
			t.Fatal(err)
		}
		if _, err := c.commit(built, layer, blobKey{digest: digest.FromString(fmt.Sprint(i))}); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.blobs) > maxOtherBlobs+1 {
		t.Errorf("the catalogue has %d blobs of one layer", len(c.blobs))
	}
	if c.blobs[blobKey{digest: layer.Digest}] != layer.DiffID {
		t.Error("the first blob is forgotten")
	}
}
