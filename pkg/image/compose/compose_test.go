package compose_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/image/compose"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

var details = compose.Details{
	Created: time.Unix(1_700_000_000, 0), CreatedBy: "overlayctl commit", Annotations: map[string]string{"example.com/key": "value"},
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// blobs are the blobs of a registry.
type blobs map[digest.Digest][]byte

func (b blobs) add(mediaType string, data []byte) ocispec.Descriptor {
	id := digest.FromBytes(data)
	b[id] = data
	return ocispec.Descriptor{MediaType: mediaType, Digest: id, Size: int64(len(data))}
}

func (b blobs) addJSON(t *testing.T, mediaType string, value any) ocispec.Descriptor {
	t.Helper()
	data, err := json.Marshal(value)
	must(t, err)
	return b.add(mediaType, data)
}

func (b blobs) fetch(_ context.Context, descriptor ocispec.Descriptor) (io.ReadCloser, error) {
	data, ok := b[descriptor.Digest]
	if !ok {
		return nil, fmt.Errorf("%w: blob %s", errdefs.ErrNotFound, descriptor.Digest)
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

// addImage adds an image with two layers, in Docker's media types, with a field that OCI does not know.
func (b blobs) addImage(t *testing.T, history bool) ocispec.Descriptor {
	t.Helper()
	config := map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Healthcheck": map[string]any{"Test": []string{"CMD", "true"}}},
		"rootfs": ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromString("tar 1"), digest.FromString("tar 2")}},
	}
	if history {
		config["history"] = []map[string]any{{"created_by": "one", "x-unknown": 1}, {"created_by": "two"}}
	}
	return b.addJSON(t, images.MediaTypeDockerSchema2Manifest, ocispec.Manifest{
		MediaType: images.MediaTypeDockerSchema2Manifest,
		Config:    b.addJSON(t, images.MediaTypeDockerSchema2Config, config),
		Layers: []ocispec.Descriptor{
			b.add(images.MediaTypeDockerSchema2LayerGzip, []byte("blob 1")), b.add(ocispec.MediaTypeImageLayerZstd, []byte("blob 2")),
		},
	})
}

func (b blobs) readBase(t *testing.T, root ocispec.Descriptor) (compose.Base, error) {
	t.Helper()
	return compose.ReadBase(t.Context(), root, platforms.Only(platforms.MustParse("linux/amd64")), image.NewDocuments(), b.fetch)
}

func layerOf(t *testing.T, content string) compose.Layer {
	t.Helper()
	layer, err := compose.NewLayer(t.Context(), func(_ context.Context, to io.Writer) error {
		_, err := io.WriteString(to, content)
		return err
	})
	must(t, err)
	return layer
}

func TestImageKeepsItsBase(t *testing.T) {
	for name, history := range map[string]bool{"history": true, "no history": false} {
		t.Run(name, func(t *testing.T) {
			registry := blobs{}
			root := registry.addImage(t, history)
			base, err := registry.readBase(t, root)
			must(t, err)
			layer := layerOf(t, "new")
			made, err := base.With(layer, "registry.example.com/team/app:1", details)
			must(t, err)
			again, err := base.With(layerOf(t, "new"), "registry.example.com/team/app:1", details)
			must(t, err)
			if !reflect.DeepEqual(made, again) {
				t.Errorf("the second time it is %+v, the first %+v", again, made)
			}
			var manifest ocispec.Manifest
			must(t, json.Unmarshal(made.Manifest.Data, &manifest))
			var types []string
			for _, layer := range manifest.Layers {
				types = append(types, layer.MediaType)
			}
			want := []string{ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd, ocispec.MediaTypeImageLayerGzip}
			if !reflect.DeepEqual(types, want) || manifest.Layers[2].Digest != layer.Descriptor.Digest {
				t.Errorf("the layers are %v with the types %v", manifest.Layers, types)
			}
			names := manifest.Annotations
			if names[ocispec.AnnotationBaseImageDigest] != root.Digest.String() || names["example.com/key"] != "value" {
				t.Errorf("the annotations are %v", names)
			}
			var config struct {
				Config  map[string]any
				History []map[string]any
				Created time.Time
				RootFS  ocispec.RootFS
			}
			must(t, json.Unmarshal(made.Config.Data, &config))
			if config.Config["Healthcheck"] == nil || !config.Created.Equal(details.Created) {
				t.Errorf("the configuration is %s", made.Config.Data)
			}
			if len(config.RootFS.DiffIDs) != 3 || config.RootFS.DiffIDs[2] != digest.FromString("new") {
				t.Errorf("the diff IDs are %v", config.RootFS.DiffIDs)
			}
			entries := config.History
			if history && (len(entries) != 3 || entries[0]["x-unknown"] == nil || entries[2]["created_by"] != details.CreatedBy) {
				t.Errorf("the history is %v", entries)
			}
			if !history && config.History != nil {
				t.Errorf("there is the history %v, with fewer entries than layers", config.History)
			}
		})
	}
}

func TestBaseIsRefused(t *testing.T) {
	registry := blobs{}
	config := registry.addJSON(t, ocispec.MediaTypeImageConfig, ocispec.Image{
		RootFS: ocispec.RootFS{DiffIDs: []digest.Digest{digest.FromString("1")}},
	})
	layer := registry.add(ocispec.MediaTypeImageLayer, []byte("blob"))
	foreign := layer
	foreign.MediaType = images.MediaTypeDockerSchema2LayerForeignGzip
	gone := layer
	gone.Digest = digest.FromString("gone")
	for name, c := range map[string]struct {
		manifest ocispec.Manifest
		kind     error
		text     string
	}{
		"artifact": {
			ocispec.Manifest{Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{layer}}, compose.ErrNoBase, "artifact",
		},
		"layer that may not be distributed": {
			ocispec.Manifest{Config: config, Layers: []ocispec.Descriptor{foreign}}, compose.ErrNoBase, "media type",
		},
		"too few diff IDs": {
			ocispec.Manifest{Config: config, Layers: []ocispec.Descriptor{layer, layer}}, compose.ErrNoBase, "2 layers",
		},
		"configuration that is gone": {
			ocispec.Manifest{
				Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: gone.Digest, Size: 2}, Layers: []ocispec.Descriptor{layer},
			}, errdefs.ErrNotFound, "",
		},
		"large manifest": {
			ocispec.Manifest{
				Config: config, Layers: []ocispec.Descriptor{layer}, Annotations: map[string]string{"x": strings.Repeat("x", 5<<20)},
			}, errdefs.ErrFailedPrecondition, "maximum",
		},
	} {
		t.Run(name, func(t *testing.T) {
			c.manifest.MediaType = ocispec.MediaTypeImageManifest
			_, err := registry.readBase(t, registry.addJSON(t, c.manifest.MediaType, c.manifest))
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

// TestLayerThatChanged: a tar that is not the one that NewLayer read has no digest yet.
func TestLayerThatChanged(t *testing.T) {
	content := "before"
	layer, err := compose.NewLayer(t.Context(), func(_ context.Context, to io.Writer) error {
		_, err := io.WriteString(to, content)
		return err
	})
	must(t, err)
	for _, c := range []struct {
		content string
		want    error
	}{{"before", nil}, {"later", image.ErrContentMismatch}} {
		t.Run(c.content, func(t *testing.T) {
			content = c.content
			reader, err := layer.Open(t.Context())
			must(t, err)
			defer reader.Close()
			if _, err := io.Copy(io.Discard, reader); !errors.Is(err, c.want) {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

// TestLayerIsClosedEarly: what writes the tar has ended when Close returns, so that the upper may be closed.
func TestLayerIsClosedEarly(t *testing.T) {
	ended, reads := false, 0
	layer, err := compose.NewLayer(t.Context(), func(ctx context.Context, to io.Writer) error {
		if reads++; reads == 1 {
			return nil
		}
		defer func() { ended = true }()
		<-ctx.Done()
		return ctx.Err()
	})
	must(t, err)
	reader, err := layer.Open(t.Context())
	must(t, err)
	must(t, reader.Close())
	if !ended {
		t.Error("the tar is still written")
	}
}

func TestArchiveIsReadAgain(t *testing.T) {
	registry := blobs{}
	base, err := registry.readBase(t, registry.addImage(t, true))
	must(t, err)
	layer := layerOf(t, "new")
	complete, err := base.With(layer, "registry.example.com/team/app:1", details)
	must(t, err)
	alone, err := compose.Alone(layer, platforms.MustParse("linux/amd64"), []string{"dir://models/base"}, details)
	must(t, err)
	open := func(ctx context.Context, descriptor ocispec.Descriptor) (io.ReadCloser, error) {
		if descriptor.Digest == layer.Descriptor.Digest {
			return layer.Open(ctx)
		}
		return registry.fetch(ctx, descriptor)
	}
	for name, made := range map[string]compose.Image{"complete": complete, "alone": alone} {
		t.Run(name, func(t *testing.T) {
			file, err := os.Create(filepath.Join(t.TempDir(), "image.tar"))
			must(t, err)
			defer file.Close()
			must(t, compose.WriteArchive(t.Context(), file, made, "team/app:2", open))
			archive, err := image.OpenArchive(
				t.Context(), file, t.TempDir(), platforms.Only(platforms.MustParse("linux/amd64")), image.NewDocuments(), unpack.Limits{},
			)
			must(t, err)
			defer archive.Close()
			if archive.Manifest != made.Manifest.Descriptor.Digest || len(archive.Layers) != len(made.Layers) {
				t.Errorf("the archive is %+v", archive.Description)
			}
			if top := archive.Layers[len(archive.Layers)-1]; top.DiffID != layer.DiffID || top.Descriptor.Digest != layer.Descriptor.Digest {
				t.Errorf("the new layer is %+v", top)
			}
		})
	}
	t.Run("base layer that is gone", func(t *testing.T) {
		delete(registry, complete.Layers[0].Digest)
		if err := compose.WriteArchive(t.Context(), io.Discard, complete, "", open); !errdefs.IsNotFound(err) {
			t.Errorf("the error is %v", err)
		}
	})
	t.Run("base layer that differs", func(t *testing.T) {
		registry[complete.Layers[0].Digest] = []byte("blob 0")
		if err := compose.WriteArchive(t.Context(), io.Discard, complete, "", open); !errors.Is(err, image.ErrContentMismatch) {
			t.Errorf("the error is %v", err)
		}
	})
}
