package portable

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	dockerref "github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/commit"
	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/image/compose"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
)

// Registry has the images of snapshots in registries. Secrets are the data of a Secret with a Docker config.json. They may be
// empty: the node's credentials are used beside them for what a VolumeSnapshotClass asks for, which is the operator's.
type Registry struct {
	client    *registry.Client
	documents *image.Documents
	committer *commit.Committer
}

// NewRegistry returns a Registry. The manifests that it reads take their memory from documents.
func NewRegistry(client *registry.Client, documents *image.Documents) *Registry {
	return &Registry{client, documents, commit.New(client, documents)}
}

// Snapshot is a snapshot that is pushed.
type Snapshot struct {
	Handle Handle
	// Name is that in the request.
	Name string
	// Volume is the handle of the volume, Size its size in bytes.
	Volume string
	Size   int64
	// Created is when the snapshot was taken. Each push makes the same image.
	Created time.Time
	// Layers are the layers of the volume, the topmost first, Requested those that its claim requested, and Resolved the digests of images
	// that a pod with the volume had.
	Layers, Requested []reference.Reference
	Resolved          reference.Digests
	// WriteTar writes what was written to the volume as the tar of a layer.
	WriteTar compose.WriteTar
}

// hadImages reports whether a pod with the volume had its images. Until then nobody knows whether its claim may read them, and they must
// not be copied with the operator's login to where the claim may read.
func (s Snapshot) hadImages() bool {
	return !slices.ContainsFunc(s.Layers, func(layer reference.Reference) bool {
		_, had := s.Resolved[layer.String()]
		return layer.Scheme() == reference.OCI && !had
	})
}

// CheckSecrets returns ErrInvalidArgument for secrets that are no logins for registries.
func CheckSecrets(secrets map[string]string) error {
	_, err := registry.ParseCredentials(secrets)
	return err
}

// Push pushes a snapshot, and returns the digest of its manifest. What the registry has is not sent again.
func (r *Registry) Push(ctx context.Context, s Snapshot, secrets map[string]string) (digest.Digest, error) {
	to, ok := s.Handle.named.(dockerref.NamedTagged)
	if !ok {
		return "", fmt.Errorf("%w: %s has no tag", errdefs.ErrInvalidArgument, s.Handle)
	}
	credentials, err := registry.ParseCredentials(secrets)
	if err != nil {
		return "", err
	}
	volume := commit.Volume{Layers: s.Layers, Resolved: s.Resolved, Apart: !s.hadImages(), WriteTar: s.WriteTar}
	details := compose.Details{
		Created: s.Created.Truncate(time.Second), CreatedBy: "overlay-csi: snapshot " + s.Name + " of volume " + s.Volume,
		Annotations: map[string]string{
			compose.AnnotationVolume: s.Volume, compose.AnnotationSize: strconv.FormatInt(s.Size, 10),
			compose.AnnotationRequested: compose.JoinReferences(s.Requested),
		},
	}
	return r.committer.Push(ctx, volume, to, credentials.AsOperator(), details, &commit.Progress{})
}

// EmptyTar writes the tar of a layer that changes nothing.
func EmptyTar(_ context.Context, to io.Writer) error {
	_, err := to.Write(make([]byte, 1024))
	return err
}

// errNoSnapshot is the error for an image that no driver pushed as a snapshot.
var errNoSnapshot = fmt.Errorf("%w: no snapshot of this driver", errdefs.ErrInvalidArgument)

// Read reads what the image of a snapshot says of it, for a claim in a namespace. It returns ErrNotFound if the registry does not have it,
// and ErrInvalidArgument if it is no snapshot.
func (r *Registry) Read(ctx context.Context, h Handle, secrets map[string]string, namespace string) (Image, error) {
	credentials, err := registry.ParseCredentials(secrets)
	if err != nil {
		return Image{}, err
	}
	return r.read(ctx, h, credentials.InNamespace(namespace))
}

// Get reads what the image of a snapshot says of it, for the operator.
func (r *Registry) Get(ctx context.Context, h Handle, secrets map[string]string) (Image, error) {
	credentials, err := registry.ParseCredentials(secrets)
	if err != nil {
		return Image{}, err
	}
	return r.read(ctx, h, credentials.AsOperator())
}

func (r *Registry) read(ctx context.Context, h Handle, credentials registry.Credentials) (Image, error) {
	repository := r.client.Repository(h.named, credentials)
	root, err := repository.Resolve(ctx)
	if err != nil {
		return Image{}, fmt.Errorf("read snapshot %s: %w", h, err)
	}
	annotations, err := compose.ReadAnnotations(ctx, root, r.documents, repository.Fetch)
	if errors.Is(err, compose.ErrNoBase) {
		return Image{}, fmt.Errorf("%w: image %s: %s", errNoSnapshot, h.Image(), err.Error())
	}
	if err != nil {
		return Image{}, fmt.Errorf("read snapshot %s: %w", h, err)
	}
	made, err := newImage(h, root.Digest, maps.Clone(annotations))
	if err != nil {
		return Image{}, fmt.Errorf("%w: image %s: %w", errNoSnapshot, h.Image(), err)
	}
	return made, nil
}

// Delete deletes the image of a snapshot. id is its digest, "" if it is not known. It returns nil if the registry does not have it, and if
// the registry deletes nothing. It returns ErrFailedPrecondition for an image that is no snapshot: whoever writes handles or moves tags
// must not have the operator's login delete other images.
func (r *Registry) Delete(ctx context.Context, h Handle, id digest.Digest, secrets map[string]string) error {
	credentials, err := registry.ParseCredentials(secrets)
	if err != nil {
		return err
	}
	repository := r.client.Repository(h.named, credentials.AsOperator())
	if id == "" {
		made, err := r.read(ctx, h, credentials.AsOperator())
		switch {
		case errdefs.IsNotFound(err):
			return nil
		case errors.Is(err, errNoSnapshot):
			return fmt.Errorf("%w: delete snapshot %s: %s; if the image is to stay, set deletionPolicy: Retain",
				errdefs.ErrFailedPrecondition, h, err.Error())
		case err != nil:
			return fmt.Errorf("delete snapshot %s: %w", h, err)
		}
		id = made.Digest
	}
	if err := repository.Delete(ctx, id); err != nil {
		return fmt.Errorf("delete snapshot %s: %w", h, err)
	}
	return nil
}
