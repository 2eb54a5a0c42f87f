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

// MaxLayers is how many layers an image may have: as many as overlayfs takes.
const MaxLayers = 500

// Annotations of artifacts that are no part of the OCI image specification.
const (
	// orasUnpack says that the blob is a directory in a tar (ORAS, "Artifact directories").
	orasUnpack = "io.deis.oras.content.unpack"
	// modelPath is the path of a file of a model (CNCF ModelPack specification).
	modelPath = "org.cncf.model.filepath"
	// modelTypes begins that specification's media types, which tell files from tars.
	modelTypes = "application/vnd.cncf.model."
)

// manifestOrIndex has the fields of both.
type manifestOrIndex struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	FSLayers      []any                `json:"fsLayers"`
}

// parseManifest reads a manifest or an index of OCI or Docker. It refuses content that could be taken for either
// (CVE-2021-41190).
func parseManifest(data []byte) (manifestOrIndex, error) {
	var d manifestOrIndex
	if err := json.Unmarshal(data, &d); err != nil {
		return d, fmt.Errorf("%w: read the manifest: %w", errdefs.ErrInvalidArgument, err)
	}
	isIndex, isManifest := len(d.Manifests) > 0, d.Config != nil || len(d.Layers) > 0
	switch {
	case d.SchemaVersion == 1 || len(d.FSLayers) > 0:
		return d, fmt.Errorf("%w: Docker schema 1 images are not supported; re-push with a current tool", errdefs.ErrInvalidArgument)
	case isIndex && isManifest:
		return d, fmt.Errorf("%w: the document is both a manifest and an index", errdefs.ErrInvalidArgument)
	case !isIndex && images.IsIndexType(d.MediaType):
		return d, fmt.Errorf("%w: the index has no manifests", errdefs.ErrInvalidArgument)
	case !isIndex && d.Config == nil:
		return d, fmt.Errorf("%w: the document is neither a manifest nor an index", errdefs.ErrInvalidArgument)
	case isManifest && len(d.Layers) == 0:
		return d, fmt.Errorf("%w: the image has no layers", errdefs.ErrInvalidArgument)
	case len(d.Layers) > MaxLayers:
		return d, fmt.Errorf("%w: the image has %d layers: overlayfs takes at most %d", errdefs.ErrInvalidArgument, len(d.Layers), MaxLayers)
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

func checkDescriptor(descriptor ocispec.Descriptor) error {
	if err := descriptor.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: digest %q: %w", errdefs.ErrInvalidArgument, truncate(string(descriptor.Digest)), err)
	}
	if descriptor.Size < 0 {
		return fmt.Errorf("%w: %s has %d bytes", errdefs.ErrInvalidArgument, descriptor.Digest, descriptor.Size)
	}
	return nil
}

// choose finds the manifest for a platform in an index.
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
		return ocispec.Descriptor{}, fmt.Errorf("%w: the image has no manifest for this node's platform; it has %s", errdefs.ErrNotFound, truncate(strings.Join(known, ", ")))
	}
	return *best, nil
}

// imageConfigTypes are the media types of the configuration of an image. With any other it is an artifact.
var imageConfigTypes = []string{ocispec.MediaTypeImageConfig, images.MediaTypeDockerSchema2Config}

// isImage reports whether a manifest is of an image, whose configuration has its diff IDs.
func (d manifestOrIndex) isImage() bool { return slices.Contains(imageConfigTypes, d.Config.MediaType) }

// layers returns the layers of a manifest. config is the image's configuration, which artifacts do not have.
func (d manifestOrIndex) layers(config []byte) ([]LayerBlob, error) {
	var image ocispec.Image
	if d.isImage() {
		if err := json.Unmarshal(config, &image); err != nil {
			return nil, fmt.Errorf("%w: read the image's configuration: %w", errdefs.ErrInvalidArgument, err)
		}
	}
	diffIDs := image.RootFS.DiffIDs
	// Some tools push artifacts with the media type of an image and an empty configuration.
	if len(diffIDs) > 0 && len(diffIDs) != len(d.Layers) {
		return nil, fmt.Errorf("%w: the image has %d layers, and its configuration has %d diff IDs", errdefs.ErrInvalidArgument, len(d.Layers), len(diffIDs))
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
	return blobs, nil
}

func checkDiffID(id digest.Digest) error {
	if id.Validate() != nil || id.Algorithm() != digest.SHA256 {
		return fmt.Errorf("%w: the image's configuration has diff ID %q; want sha256 and 64 digits", errdefs.ErrInvalidArgument, id)
	}
	return nil
}

// readAnnotations finds out what a blob of an artifact is.
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

// maxNameLength is the longest name of a file in bytes (NAME_MAX).
const maxNameLength = 255

// checkFileName refuses names that would not be a file in a layer, such as whiteouts. Only the unpacker can see that a
// path stays in the layer.
func checkFileName(name string) error {
	if name == "" {
		return nil
	}
	for component := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		isSpecial := component == "" || component == "." || component == ".." || strings.HasPrefix(component, unpack.WhiteoutPrefix)
		if isSpecial || len(component) > maxNameLength || strings.ContainsRune(component, 0) {
			return fmt.Errorf("%w: the artifact has a file named %q", errdefs.ErrInvalidArgument, truncate(name))
		}
	}
	return nil
}

// truncate keeps a text that others chose short enough for a message.
func truncate(text string) string {
	if len(text) > maxNameLength {
		return text[:maxNameLength] + "…"
	}
	return text
}
