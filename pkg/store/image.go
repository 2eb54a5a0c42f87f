package store

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Image is an image, an artifact or an archive whose layers were pulled.
type Image struct {
	Version int `json:"version"`
	// Digest is what a reference is pinned to: of the index where there is one for many platforms, else of the manifest.
	// Of an archive it is the manifest's, the image ID's (docker), or the diff ID's (a plain tar).
	Digest digest.Digest `json:"digest"`
	// Manifest is the digest of the manifest for this node's platform.
	Manifest digest.Digest `json:"manifest,omitempty"`
	Platform string        `json:"platform,omitempty"`
	// Names are the references that led to it.
	Names []string `json:"names"`
	// Layers are the layers in the order of the manifest, the lowest first.
	Layers []ImageLayer `json:"layers"`
	// Archive is the file that it was read from.
	Archive *ArchiveFile `json:"archive,omitempty"`
	// Pulled is when it was last completed here.
	Pulled time.Time `json:"pulled"`
}

// ImageLayer is a layer of an image.
type ImageLayer struct {
	DiffID    digest.Digest `json:"diffID"`
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType,omitempty"`
	// Size of the blob in bytes.
	Size  int64  `json:"size"`
	Title string `json:"title,omitempty"`
}

func (i *Image) diffIDs() []digest.Digest {
	ids := make([]digest.Digest, len(i.Layers))
	for n, layer := range i.Layers {
		ids[n] = layer.DiffID
	}
	return ids
}

// Images are the images whose layers are all here, by name.
func (s *Store) Images() []Image {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Image
	for _, image := range s.images {
		if s.hasLocked(image) {
			list = append(list, *image)
		}
	}
	slices.SortFunc(list, func(a, b Image) int {
		return cmp.Or(slices.Compare(a.Names, b.Names), cmp.Compare(a.Digest, b.Digest))
	})
	return list
}

func (s *Store) hasLocked(image *Image) bool {
	return !slices.ContainsFunc(image.diffIDs(), func(id digest.Digest) bool { return s.layers[id] == nil })
}

// maxNames is how many of the references that led to an image are remembered.
const maxNames = 16

// enter writes an image down whose layers are all held, so that no collection forgets it meanwhile.
func (s *Store) enter(image Image) (*Image, error) {
	s.enterMu.Lock()
	defer s.enterMu.Unlock()
	s.mu.Lock()
	before := s.images[image.Digest]
	s.mu.Unlock()
	if before != nil {
		if image.Archive == nil {
			image.Archive = before.Archive
		}
		for _, name := range before.Names {
			if !slices.Contains(image.Names, name) && len(image.Names) < maxNames {
				image.Names = append(image.Names, name)
			}
		}
	}
	slices.Sort(image.Names)
	image.Version, image.Pulled = formatVersion, time.Now().UTC().Truncate(time.Second)
	if err := writeJSON(s.imagePath(image.Digest), image); err != nil {
		return nil, fmt.Errorf("write down image %s: %w", image.Digest, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images[image.Digest] = &image
	return &image, nil
}
