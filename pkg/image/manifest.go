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

	"github.com/overlay-csi/overlay-csi/pkg/unpack"
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

// Annotations and media types of artifacts that the OCI image specification does not define.
const (
	// orasUnpack is "true" if the blob is the tar of a directory (ORAS, "Artifact directories").
	orasUnpack = "io.deis.oras.content.unpack"
	// modelPath is the path of a file in a model (CNCF ModelPack specification).
	modelPath = "org.cncf.model.filepath"
	// modelTypes is the prefix of the media types of that specification. They contain ".tar" if the blob is a tar.
	modelTypes = "application/vnd.cncf.model."
)

// manifestOrIndex has the fields of a manifest and of an index.
type manifestOrIndex struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	FSLayers      []any                `json:"fsLayers"`
}

// parseManifest parses a manifest or an index of OCI or Docker. It returns an error if data could be either
// (CVE-2021-41190).
func parseManifest(data []byte) (manifestOrIndex, error) {
	var d manifestOrIndex
	if err := json.Unmarshal(data, &d); err != nil {
		return d, fmt.Errorf("%w: parse the manifest: %w", errdefs.ErrInvalidArgument, err)
	}
	isIndex, isManifest := len(d.Manifests) > 0, d.Config != nil || len(d.Layers) > 0
	switch {
	case d.SchemaVersion == 1 || len(d.FSLayers) > 0:
		return d, fmt.Errorf("%w: Docker schema 1 images are not supported; push the image again with a current tool", errdefs.ErrInvalidArgument)
	case isIndex && isManifest:
		return d, fmt.Errorf("%w: the document is both a manifest and an index", errdefs.ErrInvalidArgument)
	case !isIndex && images.IsIndexType(d.MediaType):
		return d, fmt.Errorf("%w: the index has no manifests", errdefs.ErrInvalidArgument)
	case !isIndex && d.Config == nil:
		return d, fmt.Errorf("%w: the document is neither a manifest nor an index", errdefs.ErrInvalidArgument)
	case isManifest && len(d.Layers) == 0:
		return d, fmt.Errorf("%w: the image has no layers", errdefs.ErrInvalidArgument)
	case len(d.Layers) > MaxLayers:
		return d, fmt.Errorf("%w: the image has %d layers, repeated ones included; the maximum is %d, which is that of overlayfs",
			errdefs.ErrInvalidArgument, len(d.Layers), MaxLayers)
	}
	descriptors := slices.Concat(d.Manifests, d.Layers)
	if d.Config != nil {
		descriptors = append(descriptors, *d.Config)
	}
	for _, descriptor := range descriptors {
		if err := checkDescriptor(descriptor); err != nil {
			return d, err
		}
	}
	return d, nil
}

// checkDescriptor returns an error if the digest or the size of a descriptor is invalid.
func checkDescriptor(descriptor ocispec.Descriptor) error {
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

// choose returns the descriptor of the manifest for a platform in an index.
func (d manifestOrIndex) choose(platform platforms.MatchComparer) (ocispec.Descriptor, error) {
	if len(d.Manifests) == 1 && d.Manifests[0].Platform == nil {
		return d.Manifests[0], nil
	}
	var best *ocispec.Descriptor
	var known []string
	for i := range d.Manifests {
		m := &d.Manifests[i]
		if m.Platform == nil {
			continue
		}
		known = append(known, platforms.Format(*m.Platform))
		if platform.Match(*m.Platform) && (best == nil || platform.Less(*m.Platform, *best.Platform)) {
			best = m
		}
	}
	if best == nil {
		return ocispec.Descriptor{}, fmt.Errorf("%w: the image has no manifest for this node's platform, only for %s",
			errdefs.ErrNotFound, truncate(strings.Join(known, ", ")))
	}
	return *best, nil
}

// imageConfigTypes lists the media types of the configurations of images. A manifest with another type is an artifact.
var imageConfigTypes = []string{ocispec.MediaTypeImageConfig, images.MediaTypeDockerSchema2Config}

// isImage reports whether a manifest is that of an image. The configuration of an image has the diff IDs of its layers.
func (d manifestOrIndex) isImage() bool { return slices.Contains(imageConfigTypes, d.Config.MediaType) }

// layers returns the layers of a manifest. config is the configuration of an image, and is ignored for an artifact.
func (d manifestOrIndex) layers(config []byte) ([]LayerBlob, error) {
	var image ocispec.Image
	if d.isImage() {
		if err := json.Unmarshal(config, &image); err != nil {
			return nil, fmt.Errorf("%w: parse the configuration of the image: %w", errdefs.ErrInvalidArgument, err)
		}
	}
	diffIDs := image.RootFS.DiffIDs
	// Some tools push artifacts with the media type of an image and an empty configuration.
	if len(diffIDs) > 0 && len(diffIDs) != len(d.Layers) {
		return nil, errDiffIDCount(len(d.Layers), len(diffIDs))
	}
	blobs := make([]LayerBlob, len(d.Layers))
	for i, descriptor := range d.Layers {
		blobs[i] = LayerBlob{Descriptor: descriptor}
		if len(diffIDs) > 0 {
			if err := checkDiffID(diffIDs[i]); err != nil {
				return nil, err
			}
			blobs[i].DiffID = diffIDs[i]
			continue
		}
		if err := blobs[i].readAnnotations(); err != nil {
			return nil, err
		}
	}
	return blobs, checkTexts(blobs)
}

// checkTexts returns an error if the media types and file names of the layers are too long together. It removes everything else that the
// manifest says, so that a pull does not keep it in memory.
func checkTexts(blobs []LayerBlob) error {
	length := 0
	for i, blob := range blobs {
		length += len(blob.Descriptor.MediaType) + len(blob.FileName)
		blobs[i].Descriptor = ocispec.Descriptor{MediaType: blob.Descriptor.MediaType, Digest: blob.Descriptor.Digest, Size: blob.Descriptor.Size}
	}
	if length > maxTexts {
		return fmt.Errorf("%w: the media types and file names of the layers have %d bytes; the maximum is %d; pack the files into one tar",
			errdefs.ErrInvalidArgument, length, maxTexts)
	}
	return nil
}

// errDiffIDCount returns the error for a configuration whose diff IDs do not match the layers of its manifest.
func errDiffIDCount(layers, diffIDs int) error {
	return fmt.Errorf("%w: the image has %d layers, but its configuration has %d diff IDs",
		errdefs.ErrInvalidArgument, layers, diffIDs)
}

// checkDiffID returns an error if a diff ID is not a SHA-256 digest.
func checkDiffID(id digest.Digest) error {
	if id.Validate() != nil || id.Algorithm() != digest.SHA256 {
		return fmt.Errorf("%w: the configuration of the image has the diff ID %q; want a SHA-256 digest", errdefs.ErrInvalidArgument, id)
	}
	return nil
}

// readAnnotations sets the format and the file name of the blob of an artifact.
func (b *LayerBlob) readAnnotations() error {
	mediaType, annotations := b.Descriptor.MediaType, b.Descriptor.Annotations
	isModel := strings.HasPrefix(mediaType, modelTypes)
	name := annotations[ocispec.AnnotationTitle]
	if path := annotations[modelPath]; path != "" {
		name = path
	}
	switch {
	case annotations[orasUnpack] == "true", isModel && strings.Contains(mediaType, ".tar"):
		b.format = tarFormat
	case name != "":
		b.format, b.FileName = fileFormat, name
	default:
		b.format = unknownFormat
	}
	return checkFileName(b.FileName)
}

const (
	// maxNameLength is the maximum length of a file name in bytes (NAME_MAX).
	maxNameLength = 255
	// maxPathLength is the maximum length of a path in bytes (PATH_MAX less the final NUL).
	maxPathLength = 4095
)

// checkFileName returns an error if name is not valid for a file in a layer, for example because it is a whiteout. It does
// not check links, which the unpacker resolves.
func checkFileName(name string) error {
	if name == "" {
		return nil
	}
	if len(name) > maxPathLength {
		return fmt.Errorf("%w: the artifact has a file name of %d bytes; the maximum is %d", errdefs.ErrInvalidArgument, len(name), maxPathLength)
	}
	for component := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		isSpecial := component == "" || component == "." || component == ".." || strings.HasPrefix(component, unpack.WhiteoutPrefix)
		if isSpecial || len(component) > maxNameLength || strings.ContainsRune(component, 0) {
			return fmt.Errorf("%w: the artifact has the invalid file name %q", errdefs.ErrInvalidArgument, truncate(name))
		}
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
