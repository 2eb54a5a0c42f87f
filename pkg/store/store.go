// Package store is the node's store of layers: pulled from registries or read from archives, verified, unpacked once for
// each diff ID, and collected when no volume uses them.
package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
	"k8s.io/klog/v2"
)

// In the data root:
//
//	layers/sha256/<diff ID>/tree/        an unpacked layer, whiteouts and opaque directories as overlayfs has them
//	layers/sha256/<diff ID>/layer.json   what it is (Layer)
//	layers/incoming/<key>/blob           what has been downloaded of a layer, found again after a crash
//	layers/incoming/<key>/tree/          what has been unpacked of it, thrown away after a crash
//	images/<digest>.json                 the layers of an image (Image)
//
// A layer is unpacked in incoming, verified, synced with all of its content, and only then renamed to its diff ID:
// either whole or absent. What is in layers/sha256 is never written again. An image is written when its layers are there.
const (
	layersName   = "layers"
	sha256Name   = "sha256"
	incomingName = "incoming"
	imagesName   = "images"
	treeName     = "tree"
	layerName    = "layer.json"
	blobName     = "blob"
)

// formatVersion is raised when a driver of an earlier version could misread what this one writes.
const formatVersion = 1

// Config is what a store needs to know.
type Config struct {
	// Root is the data root, open. The store opens layers through it, on the mount that it is on.
	Root *os.File
	// Discard moves a file or directory of the data root out of the way at once, to be deleted later.
	Discard func(path string) error
	// Registries are where images come from.
	Registries *Registries
	// Limits bound what is taken from images.
	Limits Limits
	// Parallel is how many layers are downloaded and unpacked at the same time.
	Parallel int
	// StallTimeout is how long a registry may send next to nothing before the request is tried again.
	StallTimeout time.Duration
	// Backoff is the pause after the first failed request. It doubles with every one that follows.
	Backoff time.Duration
	// Collect says when layers that no volume uses are removed.
	Collect CollectConfig
	// Keep are references of images that are pulled at start and never collected.
	Keep []string
}

// Limits bound what one layer may take. Zero is no limit.
type Limits struct {
	// LayerBytes is the size of the content of a layer's files, holes included.
	LayerBytes int64
	// LayerEntries is the number of files, directories and links of a layer.
	LayerEntries int64
	// ReservePercent of the disk stay free: a pull that would take more of it ends.
	ReservePercent int
}

// Layer is an unpacked layer.
type Layer struct {
	Version int `json:"version"`
	// DiffID is the digest of the uncompressed tar (OCI image specification, "Layer DiffID").
	DiffID digest.Digest `json:"diffID"`
	// Digest and Title are those of the blob that it was unpacked from; Title only where that is a file, not a tar.
	Digest digest.Digest `json:"digest,omitempty"`
	Title  string        `json:"title,omitempty"`
	// Bytes are what its files take on the disk, about; Entries how many there are.
	Bytes   int64 `json:"bytes"`
	Entries int64 `json:"entries"`
	// Opaque: its root hides the image's lower layers. overlayfs does not look at that of a root.
	Opaque bool `json:"opaque,omitempty"`
	// Created is when it was unpacked.
	Created time.Time `json:"created"`
}

// Store is the store of one node. One process has it at a time.
type Store struct {
	config   Config
	path     string
	platform platforms.MatchComparer
	slots    *semaphore.Weighted
	syncer   *syncer
	// ctx is that of the pulls, which outlive the requests that began them.
	ctx  context.Context
	stop context.CancelFunc
	work sync.WaitGroup

	mu     sync.Mutex
	layers map[digest.Digest]*entry
	// blobs are the layers by the blob and title that they were unpacked from.
	blobs  map[blobKey]digest.Digest
	images map[digest.Digest]*Image
	// pulls and fetches are what is under way, by image and by layer.
	pulls   map[pullKey]*pull
	fetches map[blobKey]*fetch
	// kept are the images that Config.Keep names, as they were resolved at start.
	kept       map[string]digest.Digest
	collecting *collection
	users      users
	// enterMu lets one image at a time be written down, without publishes of others waiting for the disk.
	enterMu sync.Mutex
	// collectMu lets one collection at a time work.
	collectMu sync.Mutex
}

// entry is a layer and who has it at the moment.
type entry struct {
	Layer
	users int
	used  time.Time
}

type blobKey struct {
	digest digest.Digest
	title  string
}

// New opens the store in a data root, and throws away what a crash left half done. ctx ends everything that the store
// does in the background; Close waits for that.
func New(ctx context.Context, config Config) (*Store, error) {
	ctx, stop := context.WithCancel(ctx)
	s := &Store{
		config:   config,
		path:     config.Root.Name(),
		platform: platforms.Default(),
		slots:    semaphore.NewWeighted(int64(max(config.Parallel, 1))),
		ctx:      ctx,
		stop:     stop,
		layers:   map[digest.Digest]*entry{},
		blobs:    map[blobKey]digest.Digest{},
		images:   map[digest.Digest]*Image{},
		pulls:    map[pullKey]*pull{},
		fetches:  map[blobKey]*fetch{},
		kept:     map[string]digest.Digest{},
	}
	if err := s.open(); err != nil {
		stop()
		return nil, fmt.Errorf("open the layer store: %w", err)
	}
	s.syncer = newSyncer(config.Root)
	return s, nil
}

// Close ends the pulls. What they have downloaded is found again.
func (s *Store) Close() {
	s.stop()
	s.work.Wait()
}

func (s *Store) layersDir() string                { return filepath.Join(s.path, layersName, sha256Name) }
func (s *Store) layerDir(id digest.Digest) string { return filepath.Join(s.layersDir(), id.Encoded()) }
func (s *Store) incomingDir(key string) string {
	return filepath.Join(s.path, layersName, incomingName, key)
}
func (s *Store) imagePath(id digest.Digest) string {
	return filepath.Join(s.path, imagesName, id.Encoded()+".json")
}

func (s *Store) open() error {
	for _, dir := range []string{s.layersDir(), s.incomingDir(""), filepath.Join(s.path, imagesName)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	if err := s.loadLayers(); err != nil {
		return err
	}
	if err := s.loadImages(); err != nil {
		return err
	}
	// Trees that a crash cut off. Blobs stay: a pull that is asked for again goes on where it was.
	trees, err := filepath.Glob(filepath.Join(s.incomingDir("*"), treeName))
	if err != nil {
		return err
	}
	for _, tree := range trees {
		if err := s.config.Discard(tree); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) loadLayers() error {
	names, err := dirNames(s.layersDir())
	if err != nil {
		return err
	}
	for _, name := range names {
		dir := filepath.Join(s.layersDir(), name)
		var layer Layer
		used, err := readJSON(filepath.Join(dir, layerName), &layer)
		if err != nil || layer.DiffID.Validate() != nil || layer.DiffID.Encoded() != name || layer.Version != formatVersion {
			klog.FromContext(s.ctx).Info("What is no layer is thrown out of the layer store", "directory", dir, "reason", fmt.Sprint(err))
			if err := s.config.Discard(dir); err != nil {
				return err
			}
			continue
		}
		s.add(layer, used)
	}
	return nil
}

func (s *Store) loadImages() error {
	names, err := dirNames(filepath.Join(s.path, imagesName))
	if err != nil {
		return err
	}
	for _, name := range names {
		path := filepath.Join(s.path, imagesName, name)
		var image Image
		_, err := readJSON(path, &image)
		if err != nil || image.Digest.Validate() != nil || s.imagePath(image.Digest) != path || image.Version != formatVersion {
			if err := s.config.Discard(path); err != nil {
				return err
			}
			continue
		}
		s.images[image.Digest] = &image
	}
	return nil
}

// add enters a layer that is whole on disk.
func (s *Store) add(layer Layer, used time.Time) {
	s.layers[layer.DiffID] = &entry{Layer: layer, used: used}
	if layer.Digest != "" {
		s.blobs[blobKey{layer.Digest, layer.Title}] = layer.DiffID
	}
}

// LayerUse is a layer and when it was last used.
type LayerUse struct {
	Layer
	LastUsed time.Time `json:"lastUsed"`
}

// Layers are the layers of the store, by diff ID.
func (s *Store) Layers() []LayerUse {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]LayerUse, 0, len(s.layers))
	for _, e := range s.layers {
		list = append(list, LayerUse{e.Layer, e.used})
	}
	slices.SortFunc(list, func(a, b LayerUse) int { return strings.Compare(string(a.DiffID), string(b.DiffID)) })
	return list
}

func dirNames(path string) ([]string, error) {
	entries, err := os.ReadDir(path)
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

// readJSON reads a file that the store wrote, and when that was, or when it was last marked as used.
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
	temporary := path + ".new"
	file, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	return os.Rename(temporary, path)
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
