package store

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// In the data root:
//
//	layers/sha256/<diff ID>/tree/        an unpacked layer, with whiteouts and opaque directories of overlayfs
//	layers/sha256/<diff ID>/layer.json   its description (Layer)
//	layers/sha256/<diff ID>/implied      the directories that its tar has no entry for (compose.go), if there are any
//	layers/incoming/<key>/blob           the download of a layer from one source, resumed after a crash
//	layers/incoming/<key>/holders        who may have what the download has, as salted hashes
//	layers/incoming/<key>/tree/          the layer while it is unpacked, deleted after a crash
//	layers/incoming/<key>/scratch/       temporary files of the unpacker
//	images/<digest>.json                 the description of an image (Image)
//	access                               which logins registries accepted for which images (package access)
//
// A layer is unpacked in incoming, verified, and synced. Then its directory is renamed to its diff ID. It is therefore
// either complete or absent. The tree of a layer in layers/sha256 is not modified. An image is written after its layers.
const (
	layersName   = "layers"
	sha256Name   = "sha256"
	incomingName = "incoming"
	imagesName   = "images"
	accessName   = "access"
	treeName     = "tree"
	scratchName  = "scratch"
	layerName    = "layer.json"
	impliedName  = unpack.ImpliedName
	blobName     = "blob"
	holdersName  = "holders"
)

// formatVersion is the version of layer.json and of the files of images. A change that earlier drivers would misread
// increments it.
const formatVersion = 1

// layout provides the paths of the store.
type layout struct {
	// root is the open data root. Layers are opened relative to it.
	root *os.File
	// path is the path of the data root.
	path string
	// discard moves a file or directory of the data root to the trash.
	discard func(path string) error
}

func (l layout) layersDir() string                { return filepath.Join(l.path, layersName, sha256Name) }
func (l layout) layerDir(id digest.Digest) string { return filepath.Join(l.layersDir(), id.Encoded()) }
func (l layout) incomingDir() string              { return filepath.Join(l.path, layersName, incomingName) }
func (l layout) imagesDir() string                { return filepath.Join(l.path, imagesName) }
func (l layout) accessPath() string               { return filepath.Join(l.path, accessName) }
func (l layout) imagePath(id digest.Digest) string {
	return filepath.Join(l.imagesDir(), id.Encoded()+".json")
}

// create creates the directories of the store.
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
		return nil, fmt.Errorf("open layer %s: %w", id, err)
	}
	return dir, nil
}

// dirNames returns the names of the entries of a directory.
func dirNames(path string) ([]string, error) {
	entries, err := os.ReadDir(path)
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

// readJSON reads a file that writeJSON wrote. It returns the modification time of the file, which markUsed sets. It does not read a file
// of more than maxRecord bytes, which only an earlier driver wrote.
func readJSON(path string, into any) (time.Time, error) {
	file, err := os.Open(path)
	if err != nil {
		return time.Time{}, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return time.Time{}, err
	}
	if info.Size() > maxRecord {
		return time.Time{}, fmt.Errorf("the file has %d bytes; the maximum is %d", info.Size(), maxRecord)
	}
	data := make([]byte, info.Size())
	if _, err := io.ReadFull(file, data); err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), json.Unmarshal(data, into)
}

// writeJSON writes a file atomically, and syncs it.
func writeJSON(path string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return writeFile(path, data)
}

// writeFile writes a file atomically, and syncs it.
func writeFile(path string, data []byte) error {
	dir, err := linux.OpenDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return linux.WriteFileAtomic(dir, filepath.Base(path), data, true)
}
