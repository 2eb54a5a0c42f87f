package compose

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// Document is a manifest or a configuration.
type Document struct {
	Descriptor ocispec.Descriptor
	Data       []byte
}

// Image is an image that was assembled.
type Image struct {
	Manifest, Config Document
	// Layers are its layers, the lowest first. The last one is the new one.
	Layers []ocispec.Descriptor
}

// Details are what an image says of its new layer.
type Details struct {
	// Created is the time of the image and of its layer.
	Created time.Time
	// CreatedBy is the command that the history shows for the layer.
	CreatedBy string
	// Annotations are annotations of the manifest.
	Annotations map[string]string
}

// history is an entry of the history of an image.
func (d Details) history() ocispec.History {
	created := d.Created.UTC()
	return ocispec.History{Created: &created, CreatedBy: d.CreatedBy}
}

// With returns the image that has a new layer on this one. name is the name of this image.
func (b Base) With(layer Layer, name string, details Details) (Image, error) {
	if len(b.Layers) >= image.MaxLayers {
		return Image{}, fmt.Errorf("%w: image %s has %d layers already, which is the maximum", errdefs.ErrFailedPrecondition, name, len(b.Layers))
	}
	config := maps.Clone(b.config)
	changed := map[string]any{
		"rootfs":  ocispec.RootFS{Type: "layers", DiffIDs: append(slices.Clone(b.DiffIDs), layer.DiffID)},
		"created": details.Created.UTC(),
	}
	// A history has an entry for each layer, or is left out.
	if len(b.history) > 0 {
		entry, err := json.Marshal(details.history())
		if err != nil {
			return Image{}, fmt.Errorf("encode the history of the image: %w", err)
		}
		changed["history"] = append(slices.Clone(b.history), entry)
	}
	for key, value := range changed {
		data, err := json.Marshal(value)
		if err != nil {
			return Image{}, fmt.Errorf("encode the configuration of the image: %w", err)
		}
		config[key] = data
	}
	annotations := map[string]string{
		ocispec.AnnotationBaseImageName: name, ocispec.AnnotationBaseImageDigest: b.Manifest.String(),
	}
	maps.Copy(annotations, details.Annotations)
	return assemble(config, append(slices.Clone(b.Layers), layer.Descriptor), annotations, details.Created)
}

// Alone returns an image of a layer alone. layers are the references of what belongs below it, the topmost first. It is an image like any
// other, but a container of it has the files of the layer only.
func Alone(layer Layer, platform ocispec.Platform, layers []string, details Details) (Image, error) {
	created := details.Created.UTC()
	config := ocispec.Image{
		Created: &created, Platform: platform, History: []ocispec.History{details.history()},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.DiffID}},
	}
	annotations := map[string]string{AnnotationLayers: strings.Join(layers, "\n")}
	maps.Copy(annotations, details.Annotations)
	return assemble(config, []ocispec.Descriptor{layer.Descriptor}, annotations, created)
}

// assemble returns the image with a configuration and layers.
func assemble(config any, layers []ocispec.Descriptor, annotations map[string]string, created time.Time) (Image, error) {
	annotations[ocispec.AnnotationCreated] = created.UTC().Format(time.RFC3339)
	encoded, err := newDocument(ocispec.MediaTypeImageConfig, config)
	if err != nil {
		return Image{}, err
	}
	manifest, err := newDocument(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: encoded.Descriptor, Layers: layers, Annotations: annotations,
	})
	return Image{Manifest: manifest, Config: encoded, Layers: layers}, err
}

func newDocument(mediaType string, value any) (Document, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return Document{}, fmt.Errorf("encode the %s: %w", mediaType, err)
	}
	if len(data) > maxDocument {
		return Document{}, fmt.Errorf("%w: the %s of the image would have %d bytes; registries take at most %d",
			errdefs.ErrFailedPrecondition, mediaType, len(data), maxDocument)
	}
	descriptor := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return Document{descriptor, data}, nil
}
