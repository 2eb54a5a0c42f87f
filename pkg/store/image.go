package store

import (
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/store/access"
)

// Layer is an unpacked layer.
type Layer struct {
	Version int `json:"version"`
	// DiffID is the digest of the uncompressed tar (OCI image specification, "Layer DiffID").
	DiffID digest.Digest `json:"diffID"`
	// Digest is the digest of the blob of the layer. It is empty if it is unknown.
	Digest digest.Digest `json:"digest,omitempty"`
	// FileName is the path in the layer if the blob is a single file. It is empty if the blob is a tar.
	FileName string `json:"fileName,omitempty"`
	// Bytes is an estimate of the disk space that the layer takes.
	Bytes int64 `json:"bytes"`
	// Entries is the number of entries in the tar.
	Entries int64 `json:"entries"`
	// Opaque reports whether the layer hides all lower layers of its image. overlayfs ignores the attribute on the root of
	// a layer.
	Opaque bool `json:"opaque,omitempty"`
	// Created is the time when the layer was unpacked.
	Created time.Time `json:"created"`
	// Holders are those who may have the layer. A layer of an earlier driver has none: each registry is asked for its blob again.
	Holders []access.ID `json:"holders,omitempty"`
}

// LayerStatus is a layer with the time of its last use.
type LayerStatus struct {
	Layer
	LastUsed time.Time `json:"lastUsed"`
}

// Image is a pulled image, artifact or archive.
type Image struct {
	Version int `json:"version"`
	// Digest is the digest that a reference resolves to. It is the digest of the index of a multi-platform image, or else of
	// the manifest. It is the image ID of a docker archive, and the diff ID of the tar of a root file system.
	Digest digest.Digest `json:"digest"`
	// Manifest is the digest of the manifest for this node's platform.
	Manifest digest.Digest `json:"manifest,omitempty"`
	Platform string        `json:"platform,omitempty"`
	// Names are the references that the image was pulled by.
	Names []string `json:"names"`
	// Prefetched are the names of Config.Prefetch that the image was prefetched by. They are apart from Names, which pods choose.
	Prefetched []string `json:"prefetched,omitempty"`
	// Layers are the layers in the order of the manifest, the lowest first. A layer of attributes may follow (addAttributes).
	Layers []ImageLayer `json:"layers"`
	// Archive identifies the archive that the image was read from. It is nil for an image from a registry.
	Archive *image.ArchiveFile `json:"archive,omitempty"`
	// Pulled is the time when the last pull was complete.
	Pulled time.Time `json:"pulled"`
}

// ImageLayer is a layer of an image.
type ImageLayer struct {
	DiffID    digest.Digest `json:"diffID"`
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType,omitempty"`
	// Size is the size of the blob in bytes.
	Size     int64  `json:"size"`
	FileName string `json:"fileName,omitempty"`
}

func (i *Image) diffIDs() []digest.Digest {
	ids := make([]digest.Digest, len(i.Layers))
	for n, layer := range i.Layers {
		ids[n] = layer.DiffID
	}
	return ids
}

const (
	// maxNames is the maximum length of Image.Names.
	maxNames = 16
	// maxNameBytes is the maximum total length of Image.Names in bytes, unless the first name alone has more. The name of an archive may
	// have 12 KiB.
	maxNameBytes = 16 << 10
)

// addNames adds names that the image was pulled by before, as long as there is room for them.
func (i *Image) addNames(names []string) {
	size := 0
	for _, name := range i.Names {
		size += len(name)
	}
	for _, name := range names {
		if size += len(name); len(i.Names) == maxNames || size > maxNameBytes {
			return
		}
		if !slices.Contains(i.Names, name) {
			i.Names = append(i.Names, name)
		}
	}
}
