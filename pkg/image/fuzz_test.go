package image

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/containerd/platforms"
)

// withDigest returns a document with a digest in place of the word DIGEST.
func withDigest(document string) string {
	return strings.ReplaceAll(document, "DIGEST", "sha256:"+strings.Repeat("0", 64))
}

// FuzzManifest parses any manifest and any configuration.
func FuzzManifest(f *testing.F) {
	for _, seed := range []string{
		`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"DIGEST","size":2},` +
			`"layers":[{"digest":"DIGEST","size":1}]}`,
		`{"schemaVersion":2,"manifests":[{"digest":"DIGEST","size":1,` +
			`"platform":{"os":"linux","architecture":"amd64"}}]}`,
		`{"schemaVersion":2,"config":{"mediaType":"x","digest":"DIGEST"},` +
			`"layers":[{"digest":"DIGEST","annotations":{"org.opencontainers.image.title":"../.wh.x"}}]}`,
		`{"schemaVersion":1,"fsLayers":[{}]}`,
	} {
		f.Add([]byte(withDigest(seed)), []byte(withDigest(`{"rootfs":{"diff_ids":["DIGEST"]}}`)))
	}
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		d, err := parseManifest(manifest)
		if err != nil {
			return
		}
		if d.isIndex() {
			_, _ = d.choose(platforms.Default())
			return
		}
		parsed, err := parseConfig(config)
		if err != nil {
			return
		}
		blobs, err := d.layers(parsed)
		if err != nil {
			return
		}
		if len(blobs) == 0 || len(blobs) > MaxLayers {
			t.Errorf("%d layers", len(blobs))
		}
		for _, blob := range blobs {
			if blob.Descriptor.Digest.Validate() != nil || blob.Descriptor.Size < 0 || checkFileName(blob.FileName) != nil {
				t.Errorf("%+v", blob)
			}
		}
	})
}

// FuzzDockerManifest parses any manifest.json of a docker archive.
func FuzzDockerManifest(f *testing.F) {
	f.Add([]byte(`[{"Config":"x.json","Layers":["a/layer.tar"]}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		image, err := parseDockerManifest(data)
		if err == nil && (image.Layers.count == 0 || len(image.Layers.items) > MaxLayers) {
			t.Errorf("%d layers", image.Layers.count)
		}
	})
}

// FuzzDecompress decompresses any stream.
func FuzzDecompress(f *testing.F) {
	f.Add([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0, 0, 0})
	f.Add([]byte{0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		reader, err := decompress(bytes.NewReader(data))
		if err != nil {
			return
		}
		defer reader.Close()
		_, _ = io.CopyN(io.Discard, reader, 16<<20)
		looksLikeTar(data)
	})
}
