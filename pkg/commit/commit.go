package commit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	dockerref "github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/image/compose"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
)

// Volume is a volume whose changes become a layer.
type Volume struct {
	// Layers are the layers of the volume, the topmost first, and Resolved the digests of those that are images.
	Layers   []reference.Reference
	Resolved reference.Digests
	// Apart keeps what was written apart from the image below it: the new image names that, and does not consist of it.
	Apart bool
	// WriteTar writes what was written to the volume as the tar of a layer.
	WriteTar compose.WriteTar
}

// Committer makes images of volumes.
type Committer struct {
	registries *registry.Client
	documents  *image.Documents
	platform   ocispec.Platform
}

// New returns a Committer. The manifests that it reads take their memory from documents.
func New(registries *registry.Client, documents *image.Documents) *Committer {
	return &Committer{registries, documents, platforms.Normalize(platforms.DefaultSpec())}
}

// Progress is the progress of a push.
type Progress struct {
	// Total is the size of the image in bytes, 0 until it is known: the volume is read to its end before.
	Total atomic.Int64
	// Sent is the number of bytes that the registry has.
	Sent atomic.Int64
}

// Push makes an image of a volume, and pushes it under a name with a tag. It returns the digest of its manifest. What the registry has is
// not sent again: a push that failed is repeated, and goes on. It returns ErrNotFound, with the name of the image, if the image below is
// gone from its registry.
func (c *Committer) Push(
	ctx context.Context, v Volume, to dockerref.NamedTagged, credentials registry.Credentials, details compose.Details, progress *Progress,
) (digest.Digest, error) {
	made, err := c.assemble(ctx, v, credentials, details)
	if err != nil {
		return "", err
	}
	config, manifest := made.image.Config, made.image.Manifest
	blobs := []registry.Content{registry.Bytes(config.Descriptor, config.Data)}
	total := config.Descriptor.Size + manifest.Descriptor.Size
	for _, descriptor := range made.image.Layers {
		blobs = append(blobs, made.content(descriptor))
		total += descriptor.Size
	}
	progress.Total.Store(total)
	repository := c.registries.Repository(to, credentials)
	if err := repository.Push(ctx, registry.Bytes(manifest.Descriptor, manifest.Data), blobs, &progress.Sent); err != nil {
		return "", made.explain(err)
	}
	return manifest.Descriptor.Digest, nil
}

// WriteArchive makes an image of a volume, and writes it as an OCI archive. name is what the archive calls the image. It may be empty.
func (c *Committer) WriteArchive(
	ctx context.Context, to io.Writer, v Volume, name string, credentials registry.Credentials, details compose.Details,
) error {
	made, err := c.assemble(ctx, v, credentials, details)
	if err != nil {
		return err
	}
	open := func(ctx context.Context, descriptor ocispec.Descriptor) (io.ReadCloser, error) {
		return made.content(descriptor).Open(ctx)
	}
	return made.explain(compose.WriteArchive(ctx, to, made.image, name, open))
}

// assembled is an image that was assembled, and where its layers are.
type assembled struct {
	image compose.Image
	layer compose.Layer
	// base is the repository of the image below, nil if the image has the new layer alone.
	base *registry.Repository
}

// content returns the blob of a layer.
func (a assembled) content(descriptor ocispec.Descriptor) registry.Content {
	if a.base == nil || descriptor.Digest == a.layer.Descriptor.Digest {
		return registry.Content{Descriptor: descriptor, Open: a.layer.Open}
	}
	return a.base.Content(descriptor)
}

// explain returns an error with what to do about an image below that cannot be had.
func (a assembled) explain(err error) error {
	var refused *registry.Error
	if a.base == nil || !errors.As(err, &refused) || refused.Image != a.base.Named().String() {
		return err
	}
	return explainBase(err, refused)
}

// explainBase is explain for an error about the image below. refused is that of its registry.
func explainBase(err error, refused *registry.Error) error {
	switch {
	case errdefs.IsNotFound(err):
		return fmt.Errorf("the image below what was written is gone from its registry: %w; push it there again, or copy the files", err)
	case refused.User != "":
		return fmt.Errorf("read the image below what was written: %w; check that the secret has a login for %s that may pull it",
			err, refused.Registry)
	}
	return err
}

// assemble reads the volume and the image below it.
func (c *Committer) assemble(
	ctx context.Context, v Volume, credentials registry.Credentials, details compose.Details,
) (made assembled, err error) {
	base, isImage, err := c.base(v, credentials)
	if err != nil {
		return made, err
	}
	// The image is asked for first: reading the volume may take long.
	var read compose.Base
	if isImage {
		read, err = c.readBase(ctx, base)
		var refused *registry.Error
		switch {
		case errors.Is(err, compose.ErrNoBase):
			base = nil
		case errors.As(err, &refused) && (refused.User != "" || errdefs.IsNotFound(err)):
			return made, explainBase(err, refused)
		case err != nil:
			return made, fmt.Errorf("read the image below what was written: %w", err)
		}
	}
	layer, err := compose.NewLayer(ctx, v.WriteTar)
	if err != nil {
		return made, fmt.Errorf("read what was written to the volume: %w", err)
	}
	made = assembled{layer: layer, base: base}
	if base != nil {
		made.image, err = read.With(layer, base.Named().String(), details)
		return made, err
	}
	references, err := v.resolved()
	if err != nil {
		return made, err
	}
	made.image, err = compose.Alone(layer, c.platform, references, details)
	return made, err
}

// base returns the repository of the image that all layers of a volume are. It reports false if they are something else.
func (c *Committer) base(v Volume, credentials registry.Credentials) (base *registry.Repository, isImage bool, err error) {
	if v.Apart || len(v.Layers) != 1 || v.Layers[0].Scheme() != reference.OCI || v.Layers[0].Path() != "" {
		return nil, false, nil
	}
	resolved, err := v.resolve(v.Layers[0])
	if err != nil {
		return nil, false, err
	}
	named, err := registry.ParseName(resolved.Name())
	if err != nil {
		return nil, false, err
	}
	return c.registries.Repository(named, credentials), true, nil
}

func (c *Committer) readBase(ctx context.Context, base *registry.Repository) (compose.Base, error) {
	root, err := base.Resolve(ctx)
	if err != nil {
		return compose.Base{}, err
	}
	return compose.ReadBase(ctx, root, platforms.Only(c.platform), c.documents, base.Fetch)
}

// resolved returns the references of the layers, with digests in place of tags.
func (v Volume) resolved() ([]string, error) {
	var list []string
	for _, layer := range v.Layers {
		resolved, err := v.resolve(layer)
		if err != nil {
			return nil, err
		}
		list = append(list, resolved.String())
	}
	return list, nil
}

// resolve returns the reference to a layer with its digest, if it is an image.
func (v Volume) resolve(layer reference.Reference) (reference.Reference, error) {
	id, ok := v.Resolved[layer.String()]
	if !ok || layer.Scheme() != reference.OCI {
		return layer, nil
	}
	return layer.WithDigest(id)
}
