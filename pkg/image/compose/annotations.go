package compose

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// AnnotationLayers is the annotation of an image that has the upper of a volume alone: the references of the layers that belong below it,
// the topmost first, one a line. Tags are resolved to digests.
const AnnotationLayers = "io.github.overlay-csi.layers"

// The annotations of an image that is a snapshot of a volume.
const (
	// AnnotationVolume has the handle of the volume.
	AnnotationVolume = "io.github.overlay-csi.volume"
	// AnnotationSize has the size of the volume in bytes.
	AnnotationSize = "io.github.overlay-csi.size"
	// AnnotationRequested has the references of the layers as the volume's claim has requested them, the topmost first, one a line.
	AnnotationRequested = "io.github.overlay-csi.requested-layers"
)

// JoinReferences returns references as annotations have them.
func JoinReferences[T fmt.Stringer](references []T) string {
	lines := make([]string, len(references))
	for i, reference := range references {
		lines[i] = reference.String()
	}
	return strings.Join(lines, "\n")
}

// ReadAnnotations reads the annotations of the manifest of one image. It returns ErrNoBase for an index, as of an image for several
// platforms.
func ReadAnnotations(
	ctx context.Context, root ocispec.Descriptor, documents *image.Documents, fetch image.Fetch,
) (map[string]string, error) {
	if !images.IsManifestType(root.MediaType) {
		return nil, fmt.Errorf("%w: %s has the media type %q", ErrNoBase, root.Digest, root.MediaType)
	}
	var manifest struct {
		Annotations map[string]string `json:"annotations"`
	}
	err := read(ctx, root, documents, fetch, &manifest)
	return manifest.Annotations, err
}
