package portable

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image/compose"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// Image is what the image of a snapshot says of it.
type Image struct {
	Digest digest.Digest
	// Volume is the handle of the volume.
	Volume  string
	Created time.Time
	// Size is the least size in bytes of a volume that is made of it, 0 if it may have none.
	Size int64

	// self is the image, with its digest.
	self reference.Reference
	// base is the image that this one consists of, beside what was written to the volume. It is zero if the image has that alone.
	base reference.Reference
	// below are the layers that belong below the image if it has no base, and requested those that the claim requested, the topmost first.
	below, requested []reference.Reference
}

// newImage returns the image of a snapshot with a digest and annotations. It returns ErrInvalidArgument if it is none.
func newImage(h Handle, id digest.Digest, annotations map[string]string) (Image, error) {
	made := Image{Digest: id, Volume: annotations[compose.AnnotationVolume]}
	plain, err := reference.Parse("oci://" + h.Image())
	if err != nil {
		return Image{}, err
	}
	if made.self, err = plain.WithDigest(id); err != nil {
		return Image{}, err
	}
	if made.Size, err = strconv.ParseInt(annotations[compose.AnnotationSize], 10, 64); err != nil || made.Size < 0 {
		return Image{}, fmt.Errorf("annotation %s: it is %.64q; a snapshot has the size of its volume there",
			compose.AnnotationSize, annotations[compose.AnnotationSize])
	}
	if len(made.Volume) > maxMade {
		return Image{}, fmt.Errorf("annotation %s has %d bytes; the handle of a volume has at most %d",
			compose.AnnotationVolume, len(made.Volume), maxMade)
	}
	if made.Created, err = time.Parse(time.RFC3339, annotations[ocispec.AnnotationCreated]); err != nil || made.Created.UTC().Year() < 1 {
		// The parser's error would repeat all of it.
		return Image{}, fmt.Errorf("annotation %s: it is %.64q; a snapshot has the time there that it was taken at",
			ocispec.AnnotationCreated, annotations[ocispec.AnnotationCreated])
	}
	for key, into := range map[string]*[]reference.Reference{
		compose.AnnotationLayers: &made.below, compose.AnnotationRequested: &made.requested,
	} {
		if text := annotations[key]; text != "" {
			if *into, err = reference.ParseList(text); err != nil {
				return Image{}, fmt.Errorf("annotation %s: %w", key, err)
			}
		}
	}
	if name := annotations[ocispec.AnnotationBaseImageName]; name != "" && made.below == nil {
		if made.base, err = reference.Parse("oci://" + name); err != nil {
			return Image{}, fmt.Errorf("annotation %s: %w", ocispec.AnnotationBaseImageName, err)
		}
	}
	return made, nil
}

// Requested returns the layers as the claim of the snapshot has requested them.
func (i Image) Requested() []reference.Reference { return i.requested }

// LayersFor returns the layers of a volume that is made from the snapshot: its image, and what belongs below that. requested are the layers
// of the request, which must be those of the snapshot, as they were requested or resolved. A request without any gets what consists of
// images alone. The annotations of an image in a registry choose nothing else: whoever may push there must not choose directories of
// nodes. It returns ErrInvalidArgument for other layers.
func (i Image) LayersFor(requested []reference.Reference) ([]reference.Reference, error) {
	if i.base != (reference.Reference{}) {
		if len(requested) == 0 || slices.Equal(requested, i.requested) || areLayers(requested, []reference.Reference{i.base}) {
			return []reference.Reference{i.self}, nil
		}
		return nil, i.others(requested, []reference.Reference{i.base})
	}
	// Above what was requested may be the images of other snapshots, which the volume was made from.
	if slices.Equal(requested, i.requested) && !slices.ContainsFunc(i.below, isNoImage) {
		// A volume that was made from a snapshot of these layers, and is on the image of that.
		requested = nil
	}
	images := len(i.below) - len(requested)
	if images < 0 || !areLayers(requested, i.below[images:]) || slices.ContainsFunc(i.below[:images], isNoImage) {
		return nil, i.others(requested, i.below)
	}
	if 1+len(i.below) > reference.MaxReferences {
		return nil, fmt.Errorf("%w: snapshot %s has %d layers; the maximum is %d",
			errdefs.ErrFailedPrecondition, i.self, 1+len(i.below), reference.MaxReferences)
	}
	return slices.Concat([]reference.Reference{i.self}, i.below), nil
}

// areLayers reports whether layers are the requested ones, or those with digests for tags.
func areLayers(requested, layers []reference.Reference) bool {
	return slices.Equal(requested, layers) || reference.AreResolved(requested, layers)
}

// isNoImage reports whether a layer is anything but a whole image with a digest.
func isNoImage(layer reference.Reference) bool {
	return layer.Scheme() != reference.OCI || layer.Path() != "" || !layer.HasDigest()
}

func (i Image) others(requested, layers []reference.Reference) error {
	if len(requested) == 0 {
		return fmt.Errorf("%w: the claim names no layers, and snapshot %s was written on %v; request these",
			errdefs.ErrInvalidArgument, i.self, layers)
	}
	return fmt.Errorf("%w: the volume is to have layers %v, and its source %s has %v; what was written stays on the layers that it was "+
		"written on: request the same ones", errdefs.ErrInvalidArgument, requested, i.self, layers)
}

// SizeFor returns the size in bytes of a volume that is made from the snapshot. requested is the size of the request and limit its limit,
// 0 for none. It returns ErrOutOfRange if the volume would be smaller than that of the snapshot.
func (i Image) SizeFor(requested, limit int64) (int64, error) {
	if requested > 0 && requested < i.Size || limit > 0 && limit < i.Size {
		return 0, fmt.Errorf("%w: the source %s has %d bytes, and the volume must not have less", errdefs.ErrOutOfRange, i.self, i.Size)
	}
	if size := max(requested, i.Size); size > 0 {
		return size, nil
	}
	return limit, nil
}
