package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobOf returns a descriptor of any blob.
func blobOf(mediaType string, annotations map[string]string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromString("x"), Size: 1, Annotations: annotations}
}

func titled(name string) ocispec.Descriptor {
	return blobOf("x/y", map[string]string{ocispec.AnnotationTitle: name})
}

// describeDocument describes the image of a manifest or index that is given as a value.
func describeDocument(t *testing.T, document any) (Description, error) {
	t.Helper()
	data, err := json.Marshal(document)
	if err != nil {
		t.Fatal(err)
	}
	root := ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
	fetch := func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(data)), nil
	}
	return Describe(t.Context(), root, platforms.Default(), NewDocuments(), fetch)
}

// TestManifestIsBounded checks what a manifest may have of each thing that the store keeps.
func TestManifestIsBounded(t *testing.T) {
	long := strings.Repeat("a/", 2047)
	repeat := func(count int, layer ocispec.Descriptor) []ocispec.Descriptor {
		return slices.Repeat([]ocispec.Descriptor{layer}, count)
	}
	longType := blobOf(strings.Repeat("x", 255), titled(long+"f").Annotations)
	for name, c := range map[string]struct {
		layers []ocispec.Descriptor
		// word is in the error. It is "" if the manifest is valid.
		word string
	}{
		"layers":                  {repeat(500, titled("f")), ""},
		"too many layers":         {repeat(501, titled("f")), "has 501 layers, repeated ones included; the maximum is 500"},
		"a media type":            {[]ocispec.Descriptor{blobOf(strings.Repeat("x", 255), nil)}, ""},
		"a too long media type":   {[]ocispec.Descriptor{blobOf(strings.Repeat("x", 256), nil)}, "has 256 bytes; the maximum is 255"},
		"a file name":             {[]ocispec.Descriptor{titled(long + "f")}, ""},
		"a too long file name":    {[]ocispec.Descriptor{titled(long + "ff")}, "file name of 4096 bytes; the maximum is 4095"},
		"file names":              {repeat(31, titled(long+"f")), ""},
		"too much of file names":  {repeat(32, titled(long+"f")), "have 131136 bytes; the maximum is 131072"},
		"too much of media types": {repeat(32, longType), "have"},
	} {
		t.Run(name, func(t *testing.T) {
			config := blobOf("application/vnd.oci.empty.v1+json", nil)
			got, err := describeDocument(t, ocispec.Manifest{Config: config, Layers: c.layers})
			if c.word != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.word) {
					t.Errorf("the error is %v; want InvalidArgument with %q", err, c.word)
				}
				return
			}
			if err != nil || len(got.Layers) != len(c.layers) {
				t.Errorf("%d layers, error %v", len(got.Layers), err)
			}
		})
	}
}

// TestDescriptionKeepsNoAnnotations checks that a pull does not keep what it does not need.
func TestDescriptionKeepsNoAnnotations(t *testing.T) {
	blob := titled("f")
	blob.URLs, blob.Data, blob.ArtifactType = []string{"https://x"}, []byte("x"), "x/y"
	blob.Platform = &ocispec.Platform{OS: "linux"}
	got, err := describeDocument(t, ocispec.Manifest{Config: blobOf("x/y", nil), Layers: []ocispec.Descriptor{blob}})
	if err != nil {
		t.Fatal(err)
	}
	want := ocispec.Descriptor{MediaType: blob.MediaType, Digest: blob.Digest, Size: blob.Size}
	if got.Layers[0].FileName != "f" || fmt.Sprint(got.Layers[0].Descriptor) != fmt.Sprint(want) {
		t.Errorf("the layer %+v; want the descriptor %+v", got.Layers[0], want)
	}
}

// TestList checks that a list counts what it does not keep.
func TestList(t *testing.T) {
	for text, want := range map[string]int{
		"null": 0, "[]": 0, " [ ] ": 0, "[1]": 1, `[[]]`: 1, `[{}]`: 1, `[ "" ]`: 1, `["a,\"]", [1,2], {"a":[1,2],"b":3} ]`: 3,
		"[" + strings.Repeat(`{"a":[1,2]},`, 2000) + "null]": 2001,
	} {
		var got list[any]
		if err := json.Unmarshal([]byte(text), &got); err != nil || got.count != want || len(got.items) != min(want, maxListed) {
			t.Errorf("%.40s: %d elements, %d kept, error %v; want %d elements", text, got.count, len(got.items), err, want)
		}
	}
	var got list[any]
	if err := json.Unmarshal([]byte(`{}`), &got); err == nil {
		t.Error("an object is taken for a list")
	}
}

// TestOllama describes a model of Ollama. Its configuration is that of an image, with the digests of the blobs as diff IDs.
func TestOllama(t *testing.T) {
	types := []string{"model", "template", "license", "license", "params", "a/../b"}
	describe := func(types []string) (Description, error) {
		var layers []ocispec.Descriptor
		var config ocispec.Image
		for i, kind := range types {
			layer := blobOf("application/vnd.ollama.image."+kind, nil)
			layer.Digest = digest.FromString(fmt.Sprint(i))
			layers = append(layers, layer)
			config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, layer.Digest)
		}
		configData, err := json.Marshal(config)
		must(t, err)
		image := ocispec.Manifest{Config: blobOf("application/vnd.docker.container.image.v1+json", nil), Layers: layers}
		image.Config.Size = int64(len(configData))
		manifest, err := json.Marshal(image)
		must(t, err)
		root := ocispec.Descriptor{Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
		fetch := func(_ context.Context, descriptor ocispec.Descriptor) (io.ReadCloser, error) {
			if descriptor.Digest == root.Digest {
				return io.NopCloser(bytes.NewReader(manifest)), nil
			}
			return io.NopCloser(bytes.NewReader(configData)), nil
		}
		return Describe(t.Context(), root, platforms.Default(), NewDocuments(), fetch)
	}
	got, err := describe(types[:5])
	must(t, err)
	var names []string
	for _, layer := range got.Layers {
		if layer.DiffID != "" {
			t.Errorf("%s has the digest of a file as its diff ID", layer.FileName)
		}
		names = append(names, layer.FileName)
	}
	if want := []string{"model.gguf", "template", "license", "license-2", "params.json"}; !slices.Equal(names, want) {
		t.Errorf("the files %q; want %q", names, want)
	}
	if _, err := describe(types); !errdefs.IsInvalidArgument(err) {
		t.Errorf("the error is %v", err)
	}
}

// TestEncryptedLayer checks that the reason for which an encrypted image is refused is in the error.
func TestEncryptedLayer(t *testing.T) {
	layers := []ocispec.Descriptor{blobOf("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", nil)}
	_, err := describeDocument(t, ocispec.Manifest{Config: blobOf("x/y", nil), Layers: layers})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "is encrypted") {
		t.Errorf("the error is %v", err)
	}
}

// TestManifestKeepsOnlyWhatHasABound: a pull keeps the manifest while it waits for the configuration, for minutes.
func TestManifestKeepsOnlyWhatHasABound(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	names := map[string]string{
		"org.opencontainers.image.ref.name": long, "vnd.docker.reference.type": long, "org.opencontainers.image.title": "f",
	}
	layer, config := blobOf("x/y", names), blobOf("x/config", names)
	layer.Platform, config.Platform = &ocispec.Platform{OS: long}, &ocispec.Platform{OS: long}
	data, err := json.Marshal(ocispec.Manifest{MediaType: long, Config: config, Layers: []ocispec.Descriptor{layer}})
	must(t, err)
	got, err := parseManifest(data)
	must(t, err)
	if left := fmt.Sprintf("%+v %+v", got, *got.Config); len(left) > 1<<10 || got.Layers.items[0].Annotations.Title != "f" {
		t.Errorf("%d bytes are kept", len(left))
	}
	err = NewDocuments().Read(t.Context(), ocispec.Descriptor{Size: 3}, func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader("\"\xff\"")), nil
	}, func([]byte) error { return nil })
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("a document that is not UTF-8: %v", err)
	}
}
