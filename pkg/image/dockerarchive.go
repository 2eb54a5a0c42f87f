package image

import (
	"context"
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
	Layers list[string]
}

// describeDocker sets the description from the manifest.json of a docker archive. Layers in it have names instead of digests.
func (a *Archive) describeDocker(ctx context.Context) error {
	var manifest dockerImage
	err := a.readDocument(ctx, dockerManifestFile, func(data []byte) (err error) {
		manifest, err = parseDockerManifest(data)
		return err
	})
	if err != nil {
		return err
	}
	var config imageConfig
	err = a.readDocument(ctx, manifest.Config, func(data []byte) (err error) {
		a.Digest = digest.FromBytes(data)
		if config, err = parseConfig(data); err == nil {
			err = config.checkDiffIDs(manifest.Layers.count)
		}
		return err
	})
	if err != nil {
		return err
	}
	if a.Platform, err = formatPlatform(config.imagePlatform.ocispec()); err != nil {
		return err
	}
	for i, id := range config.RootFS.DiffIDs.items {
		name := manifest.Layers.items[i]
		size, err := a.files.size(name)
		if err != nil {
			return err
		}
		a.Layers = append(a.Layers, LayerBlob{Descriptor: ocispec.Descriptor{Digest: id, Size: size}, DiffID: id, DigestUnknown: true})
		a.names[id] = name
	}
	return nil
}

// parseDockerManifest returns the image of a manifest.json, which must have exactly one.
func parseDockerManifest(data []byte) (dockerImage, error) {
	var images list[dockerImage]
	if err := json.Unmarshal(data, &images); err != nil {
		return dockerImage{}, fmt.Errorf("%w: parse %s: %w", errdefs.ErrInvalidArgument, dockerManifestFile, err)
	}
	if images.count != 1 {
		return dockerImage{}, errImageCount(images.count)
	}
	image := images.items[0]
	if image.Layers.count == 0 || image.Layers.count > MaxLayers {
		return dockerImage{}, fmt.Errorf("%w: the image has %d layers; want 1 to %d", errdefs.ErrInvalidArgument, image.Layers.count, MaxLayers)
	}
	length := len(image.Config)
	for _, name := range image.Layers.items {
		length += len(name)
	}
	if length > maxTexts {
		return dockerImage{}, fmt.Errorf("%w: the names in %s have %d bytes; the maximum is %d",
			errdefs.ErrInvalidArgument, dockerManifestFile, length, maxTexts)
	}
	return image, nil
}
