package store

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

// maxLayers is how many layers an image may have: as many as overlayfs takes.
const maxLayers = 500

// source is a layer as an image describes it.
type source struct {
	descriptor ocispec.Descriptor
	// diffID is "" where the image does not say it.
	diffID digest.Digest
	form   form
	// title is the path of the one file that the blob is.
	title string
	// anyBlob says that the descriptor's digest only stands for the blob, whose own is not known.
	anyBlob bool
}

func (s source) key() blobKey { return blobKey{s.descriptor.Digest, s.title} }

// form is what a blob is.
type form int

const (
	tarForm form = iota
	// fileForm is a file as it is.
	fileForm
	// unknownForm is a tar if it looks like one, else a file without a name.
	unknownForm
)

// Annotations of artifacts that are no part of the OCI image specification.
const (
	// orasUnpack says that the blob is a directory in a tar (ORAS, "Artifact directories").
	orasUnpack = "io.deis.oras.content.unpack"
	// modelPath is the path of a file of a model (CNCF ModelPack specification).
	modelPath = "org.cncf.model.filepath"
	// modelTypes begins that specification's media types, which tell files from tars.
	modelTypes = "application/vnd.cncf.model."
)

// document is what a manifest and an index have in common.
type document struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	FSLayers      []any                `json:"fsLayers"`
}

// parseDocument reads a manifest or an index of OCI or Docker. What could be taken for either is refused
// (CVE-2021-41190).
func parseDocument(data []byte) (document, error) {
	var d document
	if err := json.Unmarshal(data, &d); err != nil {
		return d, fmt.Errorf("%w: read the manifest: %w", errdefs.ErrInvalidArgument, err)
	}
	isIndex, isManifest := len(d.Manifests) > 0, d.Config != nil || len(d.Layers) > 0
	switch {
	case d.SchemaVersion == 1 || len(d.FSLayers) > 0:
		return d, fmt.Errorf("%w: the manifest is of Docker's schema 1: push the image anew with a tool of this decade", errdefs.ErrInvalidArgument)
	case isIndex && isManifest:
		return d, fmt.Errorf("%w: the manifest is an index too", errdefs.ErrInvalidArgument)
	case !isIndex && images.IsIndexType(d.MediaType):
		return d, fmt.Errorf("%w: the index has no manifests", errdefs.ErrInvalidArgument)
	case !isIndex && d.Config == nil:
		return d, fmt.Errorf("%w: it is neither a manifest nor an index", errdefs.ErrInvalidArgument)
	case isManifest && len(d.Layers) == 0:
		return d, fmt.Errorf("%w: the image has no layers", errdefs.ErrInvalidArgument)
	case len(d.Layers) > maxLayers:
		return d, fmt.Errorf("%w: the image has %d layers: overlayfs takes at most %d", errdefs.ErrInvalidArgument, len(d.Layers), maxLayers)
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
		return fmt.Errorf("%w: digest %q: %w", errdefs.ErrInvalidArgument, descriptor.Digest, err)
	}
	if descriptor.Size < 0 {
		return fmt.Errorf("%w: %s has %d bytes", errdefs.ErrInvalidArgument, descriptor.Digest, descriptor.Size)
	}
	return nil
}

// choose finds the manifest for a platform in an index.
func (d document) choose(platform platforms.MatchComparer) (ocispec.Descriptor, error) {
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
		return ocispec.Descriptor{}, fmt.Errorf("%w: the image is not for this node's platform: there are %s", errdefs.ErrNotFound, strings.Join(known, ", "))
	}
	return *best, nil
}

// imageConfigTypes are the media types of the configuration of an image. With any other it is an artifact.
var imageConfigTypes = []string{ocispec.MediaTypeImageConfig, images.MediaTypeDockerSchema2Config}

// isImage reports whether a manifest is of an image, whose configuration has its diff IDs.
func (d document) isImage() bool { return slices.Contains(imageConfigTypes, d.Config.MediaType) }

// sources are the layers of a manifest with its configuration, which is not looked at where it is an artifact.
func (d document) sources(config []byte) ([]source, error) {
	var image ocispec.Image
	if d.isImage() {
		if err := json.Unmarshal(config, &image); err != nil {
			return nil, fmt.Errorf("%w: read the image's configuration: %w", errdefs.ErrInvalidArgument, err)
		}
	}
	diffIDs := image.RootFS.DiffIDs
	// Some tools push artifacts with the media type of an image and an empty configuration.
	if len(diffIDs) > 0 && len(diffIDs) != len(d.Layers) {
		return nil, fmt.Errorf("%w: the image has %d layers, and its configuration %d diff IDs", errdefs.ErrInvalidArgument, len(d.Layers), len(diffIDs))
	}
	sources := make([]source, len(d.Layers))
	for i, descriptor := range d.Layers {
		sources[i] = source{descriptor: descriptor}
		if len(diffIDs) > 0 {
			if diffIDs[i].Validate() != nil || diffIDs[i].Algorithm() != digest.SHA256 {
				return nil, fmt.Errorf("%w: the image's configuration has diff ID %q: it is sha256 and 64 digits", errdefs.ErrInvalidArgument, diffIDs[i])
			}
			sources[i].diffID = diffIDs[i]
			continue
		}
		if err := sources[i].artifact(); err != nil {
			return nil, err
		}
	}
	return sources, nil
}

// artifact tells by its annotations what a blob of an artifact is.
func (s *source) artifact() error {
	mediaType, annotations := s.descriptor.MediaType, s.descriptor.Annotations
	isModel := strings.HasPrefix(mediaType, modelTypes)
	title := annotations[ocispec.AnnotationTitle]
	if path := annotations[modelPath]; path != "" {
		title = path
	}
	switch {
	case annotations[orasUnpack] == "true", isModel && strings.Contains(mediaType, ".tar"):
		s.form = tarForm
	case title != "":
		s.form, s.title = fileForm, title
	default:
		s.form = unknownForm
	}
	return checkTitle(s.title)
}

// checkTitle refuses what would be something else than a file in a layer. That it stays in the layer is the unpacker's
// to see to.
func checkTitle(title string) error {
	if title == "" {
		return nil
	}
	for component := range strings.SplitSeq(strings.Trim(title, "/"), "/") {
		if component == "" || component == "." || component == ".." || strings.HasPrefix(component, whiteoutPrefix) || len(component) > 255 || strings.ContainsRune(component, 0) {
			return fmt.Errorf("%w: the artifact has a file named %q", errdefs.ErrInvalidArgument, title)
		}
	}
	return nil
}

// platformName is how a platform is written.
func platformName(platform ocispec.Platform) string { return platforms.Format(platform) }
