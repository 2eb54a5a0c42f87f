package image

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// MaxLayers is the maximum number of layers of an image, repeated ones included. overlayfs takes 500 (OVL_MAX_STACK).
	MaxLayers = 500
	// maxMediaType is the maximum length of a media type in bytes: two names of 127 and a slash (RFC 6838, 4.2).
	maxMediaType = 255
	// maxPlatform is the maximum length of the name of a platform in bytes.
	maxPlatform = 255
	// maxTexts is the maximum total length of the media types and file names of the layers of an image in bytes. The store keeps them
	// in memory for each image. 500 layers may have 256 bytes each.
	maxTexts = 128 << 10
)

// manifestOrIndex has the fields of a manifest and of an index.
type manifestOrIndex struct {
	SchemaVersion int              `json:"schemaVersion"`
	MediaType     string           `json:"mediaType"`
	Manifests     list[descriptor] `json:"manifests"`
	Config        *descriptor      `json:"config"`
	Layers        list[descriptor] `json:"layers"`
	FSLayers      list[skipped]    `json:"fsLayers"`
}

// descriptor has the fields of a descriptor that matter here. Nothing else of a manifest is kept, because it may be large.
type descriptor struct {
	MediaType   string         `json:"mediaType"`
	Digest      digest.Digest  `json:"digest"`
	Size        int64          `json:"size"`
	Platform    *imagePlatform `json:"platform"`
	Annotations annotations    `json:"annotations"`
}

// imagePlatform has the fields of a platform that matter here.
type imagePlatform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
}

func (p imagePlatform) ocispec() ocispec.Platform {
	return ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}
}

// annotations are the annotations of a layer, or of an image in an index, that matter here.
type annotations struct {
	// ReferenceType says of a manifest in an index that it describes another one (BuildKit, "Image attestation storage").
	ReferenceType string `json:"vnd.docker.reference.type"`
	// RefName is the name of an image in a layout (OCI image specification, "Pre-Defined Annotation Keys").
	RefName string `json:"org.opencontainers.image.ref.name"`
	// Title is the path of a file (the same source).
	Title string `json:"org.opencontainers.image.title"`
	// ModelPath is the path of a file in a model (CNCF ModelPack specification), CNAIPath its former name.
	ModelPath string `json:"org.cncf.model.filepath"`
	CNAIPath  string `json:"org.cnai.model.filepath"`
	// OrasUnpack is "true" if the blob is the tar of a directory (ORAS, "Artifact directories").
	OrasUnpack string `json:"io.deis.oras.content.unpack"`
}

// ocispec returns the descriptor without its annotations.
func (d descriptor) ocispec() ocispec.Descriptor {
	converted := ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
	if d.Platform != nil {
		platform := d.Platform.ocispec()
		converted.Platform = &platform
	}
	return converted
}

// isIndex reports whether it is an index.
func (d manifestOrIndex) isIndex() bool { return d.Manifests.count > 0 }

// parseManifest parses a manifest or an index of OCI or Docker. It returns an error if data could be either
// (CVE-2021-41190).
func parseManifest(data []byte) (manifestOrIndex, error) {
	var d manifestOrIndex
	if err := json.Unmarshal(data, &d); err != nil {
		return d, fmt.Errorf("%w: parse the manifest: %w", errdefs.ErrInvalidArgument, err)
	}
	isIndex, isManifest := d.isIndex(), d.Config != nil || d.Layers.count > 0
	switch {
	case d.SchemaVersion == 1 || d.FSLayers.count > 0:
		return d, fmt.Errorf("%w: Docker schema 1 images are not supported; push the image again with a current tool",
			errdefs.ErrInvalidArgument)
	case isIndex && isManifest:
		return d, fmt.Errorf("%w: the document is both a manifest and an index", errdefs.ErrInvalidArgument)
	case !isIndex && images.IsIndexType(d.MediaType):
		return d, fmt.Errorf("%w: the index has no manifests", errdefs.ErrInvalidArgument)
	case !isIndex && d.Config == nil:
		return d, fmt.Errorf("%w: the document is neither a manifest nor an index", errdefs.ErrInvalidArgument)
	case isManifest && d.Layers.count == 0:
		return d, fmt.Errorf("%w: the image has no layers", errdefs.ErrInvalidArgument)
	case d.Layers.count > MaxLayers:
		return d, fmt.Errorf("%w: the image has %d layers, repeated ones included; the maximum is %d, which is that of overlayfs",
			errdefs.ErrInvalidArgument, d.Layers.count, MaxLayers)
	case d.Manifests.count > maxListed:
		return d, fmt.Errorf("%w: the index has %d manifests; the maximum is %d", errdefs.ErrInvalidArgument, d.Manifests.count, maxListed)
	}
	descriptors := slices.Concat(d.Manifests.items, d.Layers.items)
	if d.Config != nil {
		descriptors = append(descriptors, *d.Config)
	}
	for _, descriptor := range descriptors {
		if err := checkDescriptor(descriptor); err != nil {
			return d, err
		}
	}
	if err := d.checkTexts(); err != nil || isIndex {
		return d, err
	}
	return d.bounded(), nil
}

// bounded returns a manifest with only what has a bound: a pull keeps it while it waits for the configuration.
func (d manifestOrIndex) bounded() manifestOrIndex {
	d.MediaType = ""
	config := descriptor{MediaType: d.Config.MediaType, Digest: d.Config.Digest, Size: d.Config.Size}
	d.Config = &config
	for i := range d.Layers.items {
		layer := &d.Layers.items[i]
		layer.Platform, layer.Annotations.ReferenceType, layer.Annotations.RefName = nil, "", ""
	}
	return d
}

// checkTexts returns an error if the media types and names of the layers are too long together.
func (d manifestOrIndex) checkTexts() error {
	length := 0
	for _, layer := range d.Layers.items {
		names := layer.Annotations
		length += len(layer.MediaType) + len(names.Title) + len(names.ModelPath) + len(names.CNAIPath) + len(names.OrasUnpack)
	}
	if length > maxTexts {
		return fmt.Errorf("%w: the media types and file names of the layers have %d bytes; the maximum is %d; pack the files into one tar",
			errdefs.ErrInvalidArgument, length, maxTexts)
	}
	return nil
}

// checkDescriptor returns an error if the digest or the size of a descriptor is invalid.
func checkDescriptor(descriptor descriptor) error {
	if err := descriptor.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: parse digest %q: %w", errdefs.ErrInvalidArgument, truncate(string(descriptor.Digest)), err)
	}
	if descriptor.Size < 0 {
		return fmt.Errorf("%w: %s has a size of %d bytes", errdefs.ErrInvalidArgument, descriptor.Digest, descriptor.Size)
	}
	if len(descriptor.MediaType) > maxMediaType {
		return fmt.Errorf("%w: the media type of %s has %d bytes; the maximum is %d",
			errdefs.ErrInvalidArgument, descriptor.Digest, len(descriptor.MediaType), maxMediaType)
	}
	return nil
}

// formatPlatform returns the name of a platform, for example "linux/amd64".
func formatPlatform(platform ocispec.Platform) (string, error) {
	if length := len(platform.OS) + len(platform.Architecture) + len(platform.Variant); length > maxPlatform {
		return "", fmt.Errorf("%w: the name of the platform has %d bytes; the maximum is %d", errdefs.ErrInvalidArgument, length, maxPlatform)
	}
	return platforms.Format(platform), nil
}

// attestation is the value of the annotation of a manifest that BuildKit adds to an index for each image.
const attestation = "attestation-manifest"

// images returns the manifests of an index without those that describe another one, and without those of an unknown platform if there are
// others.
func (d manifestOrIndex) images() []descriptor {
	images := slices.DeleteFunc(slices.Clone(d.Manifests.items), func(m descriptor) bool {
		return m.Annotations.ReferenceType == attestation
	})
	known := slices.DeleteFunc(slices.Clone(images), func(m descriptor) bool {
		return m.Platform != nil && m.Platform.OS == "unknown"
	})
	if len(known) > 0 {
		return known
	}
	return images
}

// choose returns the descriptor of the manifest for a platform in an index. Data is for no platform: if the index has one image, it is
// that, whatever platform the index says.
func (d manifestOrIndex) choose(platform platforms.MatchComparer) (ocispec.Descriptor, error) {
	images := d.images()
	var best ocispec.Descriptor
	var known []string
	isOne := len(images) > 0
	for _, m := range images {
		isOne = isOne && m.Digest == images[0].Digest
		if m.Platform == nil {
			continue
		}
		candidate := m.ocispec()
		name, err := formatPlatform(*candidate.Platform)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		known = append(known, name)
		if platform.Match(*candidate.Platform) && (best.Platform == nil || platform.Less(*candidate.Platform, *best.Platform)) {
			best = candidate
		}
	}
	switch {
	case best.Platform != nil:
		return best, nil
	case isOne:
		return images[0].ocispec(), nil
	}
	return ocispec.Descriptor{}, fmt.Errorf("%w: the image has no manifest for this node's platform, only for %s",
		errdefs.ErrNotFound, truncate(strings.Join(known, ", ")))
}

// imageConfigTypes lists the media types of the configurations of images. A manifest with another type is an artifact.
var imageConfigTypes = []string{ocispec.MediaTypeImageConfig, images.MediaTypeDockerSchema2Config}

// isImage reports whether a manifest is that of an image. The configuration of an image has the diff IDs of its layers.
func (d manifestOrIndex) isImage() bool { return slices.Contains(imageConfigTypes, d.Config.MediaType) }

// imageConfig has the fields of the configuration of an image that matter here.
type imageConfig struct {
	imagePlatform
	RootFS struct {
		DiffIDs list[digest.Digest] `json:"diff_ids"`
	} `json:"rootfs"`
}

func parseConfig(data []byte) (imageConfig, error) {
	var config imageConfig
	if err := json.Unmarshal(data, &config); err != nil {
		return config, fmt.Errorf("%w: parse the configuration of the image: %w", errdefs.ErrInvalidArgument, err)
	}
	return config, nil
}

// checkDiffIDs returns an error if the configuration does not have one valid diff ID for each layer.
func (c imageConfig) checkDiffIDs(layers int) error {
	if count := c.RootFS.DiffIDs.count; count != layers {
		return errDiffIDCount(layers, count)
	}
	for _, id := range c.RootFS.DiffIDs.items {
		if err := checkDiffID(id); err != nil {
			return err
		}
	}
	return nil
}

// layers returns the layers of a manifest. config is the configuration of an image, and empty for an artifact.
func (d manifestOrIndex) layers(config imageConfig) ([]LayerBlob, error) {
	diffIDs := config.RootFS.DiffIDs
	// Some tools push artifacts with the media type of an image and an empty configuration.
	if diffIDs.count > 0 {
		if err := config.checkDiffIDs(d.Layers.count); err != nil {
			return nil, err
		}
	}
	blobs := make([]LayerBlob, d.Layers.count)
	for i, layer := range d.Layers.items {
		blobs[i] = LayerBlob{Descriptor: ocispec.Descriptor{MediaType: layer.MediaType, Digest: layer.Digest, Size: layer.Size}}
		if strings.HasSuffix(layer.MediaType, encryptedSuffix) {
			return nil, fmt.Errorf("%w: layer %s is encrypted (%s); encrypted images are not supported",
				errdefs.ErrInvalidArgument, layer.Digest, layer.MediaType)
		}
		if strings.HasPrefix(layer.MediaType, ollamaTypes) {
			// The configuration has the digests of the blobs as diff IDs.
			blobs[i].nameOllama(blobs[:i])
			if err := checkFileName(blobs[i].FileName); err != nil {
				return nil, err
			}
			continue
		}
		if diffIDs.count > 0 {
			blobs[i].DiffID = diffIDs.items[i]
			continue
		}
		if err := blobs[i].setName(layer.Annotations); err != nil {
			return nil, err
		}
	}
	return blobs, nil
}

// errDiffIDCount returns the error for a configuration whose diff IDs do not match the layers of its manifest.
func errDiffIDCount(layers, diffIDs int) error {
	return fmt.Errorf("%w: the image has %d layers, but its configuration has %d diff IDs",
		errdefs.ErrInvalidArgument, layers, diffIDs)
}

// checkDiffID returns an error if a diff ID is not a SHA-256 digest.
func checkDiffID(id digest.Digest) error {
	if id.Validate() != nil || id.Algorithm() != digest.SHA256 {
		return fmt.Errorf("%w: the configuration of the image has the diff ID %q; want a SHA-256 digest",
			errdefs.ErrInvalidArgument, truncate(string(id)))
	}
	return nil
}

// truncate returns text with at most maxNameLength bytes for an error. The text is from an untrusted source.
func truncate(text string) string {
	if len(text) > maxNameLength {
		return text[:maxNameLength] + "…"
	}
	return text
}
