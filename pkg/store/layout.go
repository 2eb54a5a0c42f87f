package store

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// In the data root:
//
//	layers/sha256/<diff ID>/tree/        an unpacked layer, whiteouts and opaque directories as overlayfs has them
//	layers/sha256/<diff ID>/layer.json   its description (Layer)
//	layers/incoming/<key>/blob           what has been downloaded of a layer, found again after a crash
//	layers/incoming/<key>/tree/          what has been unpacked of it, deleted after a crash
//	layers/incoming/<key>/scratch/       what the unpacker needs meanwhile
//	images/<digest>.json                 the layers of an image (Image)
//
// A layer is unpacked in incoming, verified, synced with all of its content, and only then renamed to its diff ID: it is
// either whole or absent. What is in layers/sha256 is never written again. An image is written after its layers.
const (
	layersName   = "layers"
	sha256Name   = "sha256"
	incomingName = "incoming"
	imagesName   = "images"
	treeName     = "tree"
	scratchName  = "scratch"
	layerName    = "layer.json"
	blobName     = "blob"
)

// formatVersion is raised when a driver of an earlier version could misread what this one writes.
const formatVersion = 1

// layout knows the names of everything in the store.
type layout struct {
	// root is the data root. Layers are opened through it, on the mount that it is on.
	root *os.File
	path string
	// discard moves a file or directory of the data root out of the way at once, to be deleted later.
	discard func(path string) error
}

func (l layout) layersDir() string                { return filepath.Join(l.path, layersName, sha256Name) }
func (l layout) layerDir(id digest.Digest) string { return filepath.Join(l.layersDir(), id.Encoded()) }
func (l layout) incomingDir() string              { return filepath.Join(l.path, layersName, incomingName) }
func (l layout) imagesDir() string                { return filepath.Join(l.path, imagesName) }
func (l layout) imagePath(id digest.Digest) string {
	return filepath.Join(l.imagesDir(), id.Encoded()+".json")
}

// create makes the directories of an empty store.
func (l layout) create() error {
	for _, dir := range []string{l.layersDir(), l.incomingDir(), l.imagesDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	return nil
}

// openTree opens the tree of a layer.
func (l layout) openTree(id digest.Digest) (*os.File, error) {
	name := filepath.Join(layersName, sha256Name, id.Encoded(), treeName)
	dir, err := linux.Open(l.root, name, linux.O_PATH|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open layer: %w", err)
	}
	return dir, nil
}

func dirNames(path string) ([]string, error) {
	entries, err := os.ReadDir(path)
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

// readJSON reads a file that the store wrote, and its modification time, which markUsed sets.
func readJSON(path string, into any) (time.Time, error) {
	info, err := os.Stat(path)
	if err != nil {
		return time.Time{}, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), json.Unmarshal(data, into)
}

// writeJSON writes a file whole or not at all, and syncs it.
func writeJSON(path string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	dir, err := linux.OpenDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return linux.WriteFileAtomic(dir, filepath.Base(path), data, true)
}
