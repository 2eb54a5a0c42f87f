package image

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// dockerManifestFile is the name of the file that describes the images of a docker archive.
const dockerManifestFile = "manifest.json"

// dockerImage is an image in a docker archive. Its fields are names of files in the archive.
type dockerImage struct {
	Config string
	Layers []string
}

// describeDocker sets the description from the manifest.json of a docker archive. Layers in it have names instead of digests.
func (a *Archive) describeDocker() error {
	data, err := readDocument(a.files, dockerManifestFile)
	if err != nil {
		return err
	}
	manifest, err := parseDockerManifest(data)
	if err != nil {
		return err
	}
	config, err := readDocument(a.files, manifest.Config)
	if err != nil {
		return err
	}
	var parsed ocispec.Image
	if err := json.Unmarshal(config, &parsed); err != nil {
		return fmt.Errorf("%w: parse the configuration of the image: %w", errdefs.ErrInvalidArgument, err)
	}
	diffIDs := parsed.RootFS.DiffIDs
	if len(diffIDs) != len(manifest.Layers) {
		return errDiffIDCount(len(manifest.Layers), len(diffIDs))
	}
	a.Digest = digest.FromBytes(config)
	if a.Platform, err = formatPlatform(parsed.Platform); err != nil {
		return err
	}
	a.Layers = make([]LayerBlob, len(diffIDs))
	for i, id := range diffIDs {
		if err := checkDiffID(id); err != nil {
			return err
		}
		blob, size, err := a.files.open(manifest.Layers[i])
		if err != nil {
			return err
		}
		blob.Close()
		a.Layers[i] = LayerBlob{Descriptor: ocispec.Descriptor{Digest: id, Size: size}, DiffID: id, DigestUnknown: true}
		a.names[id] = manifest.Layers[i]
	}
	return nil
}

// parseDockerManifest returns the image of a manifest.json, which must have exactly one.
func parseDockerManifest(data []byte) (dockerImage, error) {
	var images []dockerImage
	if err := json.Unmarshal(data, &images); err != nil {
		return dockerImage{}, fmt.Errorf("%w: parse %s: %w", errdefs.ErrInvalidArgument, dockerManifestFile, err)
	}
	switch {
	case len(images) != 1:
		return dockerImage{}, errImageCount(len(images))
	case len(images[0].Layers) == 0 || len(images[0].Layers) > MaxLayers:
		return dockerImage{}, fmt.Errorf("%w: the image has %d layers; want 1 to %d",
			errdefs.ErrInvalidArgument, len(images[0].Layers), MaxLayers)
	}
	return images[0], nil
}
