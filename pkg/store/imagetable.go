package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"
)

// What registries and archives say of images is kept in memory and read at start, so that its total must have a bound. Records are
// weighed by their size in JSON. In memory they take up to twice that.
const (
	// maxImageRecords is the maximum total weight of the records of images in bytes: those of 4096 images with up to 16 layers.
	maxImageRecords = 16 << 20
	// keptImageRecords is the weight that is left when images are forgotten, so that not every pull looks for images to forget.
	keptImageRecords = maxImageRecords / 8 * 7
	// maxRecord is the maximum size of one record in bytes. package image bounds what a record contains: one of MaxLayers layers, with the
	// longest names, has less.
	maxRecord = 2 << 20
	// recordBlock is what the smallest record weighs in bytes: a block of the file system.
	recordBlock = 4 << 10
)

// weigh returns the weight of a record of size bytes.
func weigh(size int64) int64 { return (size + recordBlock - 1) / recordBlock * recordBlock }

// imageTable has the images of the store. The catalogue's lock guards it.
type imageTable struct {
	images  map[digest.Digest]*Image
	weights map[digest.Digest]int64
	total   int64
}

func newImageTable() imageTable {
	return imageTable{images: map[digest.Digest]*Image{}, weights: map[digest.Digest]int64{}}
}

// put adds an image, or replaces it. size is the size of its record in bytes.
func (t *imageTable) put(image *Image, size int64) {
	t.remove(image.Digest)
	t.images[image.Digest], t.weights[image.Digest] = image, weigh(size)
	t.total += weigh(size)
}

func (t *imageTable) remove(id digest.Digest) {
	t.total -= t.weights[id]
	delete(t.images, id)
	delete(t.weights, id)
}

// protection says how late an image is forgotten.
type protection int

const (
	unprotected protection = iota
	// usedByVolume protects an image whose layers are all used by volumes. Without its record, a volume is published again only if the
	// registry answers.
	usedByVolume
	// isPrefetched protects an image that the operator configured. Its record protects its layers from garbage collection.
	isPrefetched
)

// toForget returns the images to forget before a record of size bytes is added, the least recently pulled first. protects returns the
// protection of an image. The bound holds whatever it returns, because pods choose what volumes use.
func (t *imageTable) toForget(size int64, protects func(*Image) protection) []digest.Digest {
	type candidate struct {
		*Image
		protection
	}
	var candidates []candidate
	for _, image := range t.images {
		candidates = append(candidates, candidate{image, protects(image)})
	}
	slices.SortFunc(candidates, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.protection, b.protection), a.Pulled.Compare(b.Pulled), cmp.Compare(a.Digest, b.Digest))
	})
	var ids []digest.Digest
	for left := t.total + weigh(size); left > keptImageRecords && len(candidates) > 0; candidates = candidates[1:] {
		ids = append(ids, candidates[0].Digest)
		left -= t.weights[candidates[0].Digest]
	}
	return ids
}

// recordFile is the file of a record that is not read yet.
type recordFile struct {
	path     string
	size     int64
	modified time.Time
}

// listRecords returns the files in a directory of records, the last written first.
func listRecords(dir string) ([]recordFile, error) {
	names, err := dirNames(dir)
	if err != nil {
		return nil, err
	}
	files := make([]recordFile, len(names))
	for i, name := range names {
		path := filepath.Join(dir, name)
		info, err := os.Lstat(path)
		if err != nil {
			return nil, fmt.Errorf("look at a record: %w", err)
		}
		files[i] = recordFile{path, info.Size(), info.ModTime()}
	}
	slices.SortFunc(files, func(a, b recordFile) int {
		return cmp.Or(b.modified.Compare(a.modified), cmp.Compare(a.path, b.path))
	})
	return files, nil
}

// loadImages reads the images, the last pulled first. It discards those for which there is no room, and those of which a layer is
// missing: a crash came between the removal of the layer and that of the image.
func (c *catalogue) loadImages(ctx context.Context) error {
	files, err := listRecords(c.imagesDir())
	if err != nil {
		return err
	}
	for _, file := range files {
		var image Image
		_, err := readJSON(file.path, &image)
		switch {
		case err == nil && (image.Digest.Validate() != nil || c.imagePath(image.Digest) != file.path || image.Version != formatVersion):
			err = errors.New("it is not a record of this version")
		case err == nil && !c.hasLayersLocked(&image):
			err = errors.New("a layer is missing")
		case err == nil && c.images.total+weigh(file.size) > maxImageRecords && !c.isPrefetched(&image):
			err = fmt.Errorf("the records of images have more than %d bytes", maxImageRecords)
		}
		if err == nil {
			c.images.put(&image, file.size)
			continue
		}
		klog.FromContext(ctx).Info("Forgetting image", keyFile, file.path, keyReason, err.Error())
		if err := c.discard(file.path); err != nil {
			return err
		}
	}
	return nil
}

// saveImage writes an image. The caller holds references on its layers. saveImage forgets other images if there is no room for its
// record.
func (c *catalogue) saveImage(image Image) (*Image, error) {
	c.saveMu.Lock()
	defer c.saveMu.Unlock()
	c.mu.Lock()
	before := c.images.images[image.Digest]
	c.mu.Unlock()
	if before != nil {
		if (before.Manifest == "") != (image.Manifest == "") {
			// A document can be a manifest and, in a docker archive, a configuration. Each names other layers.
			return nil, fmt.Errorf("%w: image %s is on the node as %s, which has other content; remove one of the two",
				errdefs.ErrFailedPrecondition, image.Digest, before.Names[0])
		}
		if image.Archive == nil {
			image.Archive = before.Archive
		}
		image.addNames(before.Names)
		image.Prefetched = before.Prefetched
	}
	slices.Sort(image.Names)
	image.Version, image.Pulled = formatVersion, time.Now().UTC().Truncate(time.Second)
	return c.writeImage(image)
}

// addPrefetched adds the name that an image was prefetched by to its record, which loses those that the operator has removed from the
// configuration.
func (c *catalogue) addPrefetched(id digest.Digest, name prefetchedName) error {
	c.saveMu.Lock()
	defer c.saveMu.Unlock()
	c.mu.Lock()
	before := c.images.images[id]
	c.mu.Unlock()
	if before == nil {
		return fmt.Errorf("%w: image %s was forgotten after its pull", errdefs.ErrUnavailable, id)
	}
	image := *before
	image.Prefetched = nil
	for _, configured := range c.prefetch {
		if configured.text == name.text || configured.hasPrefetched(before) {
			image.Prefetched = append(image.Prefetched, configured.named.String())
		}
	}
	if slices.Equal(image.Prefetched, before.Prefetched) {
		return nil
	}
	_, err := c.writeImage(image)
	return err
}

// writeImage writes the record of an image. The caller holds saveMu.
func (c *catalogue) writeImage(image Image) (*Image, error) {
	data, err := json.Marshal(image)
	if err != nil {
		return nil, fmt.Errorf("write image %s: %w", image.Digest, err)
	}
	if len(data) > maxRecord {
		return nil, fmt.Errorf("%w: the record of image %s has %d bytes; the maximum is %d",
			errdefs.ErrInvalidArgument, image.Digest, len(data), maxRecord)
	}
	if err := c.forgetFor(int64(len(data))); err != nil {
		return nil, err
	}
	if err := writeFile(c.imagePath(image.Digest), data); err != nil {
		return nil, fmt.Errorf("write image %s: %w", image.Digest, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.images.put(&image, int64(len(data)))
	return &image, nil
}

// forgetFor forgets images if there is no room for a record of size bytes. Their layers stay until they are collected. The caller holds
// saveMu.
func (c *catalogue) forgetFor(size int64) error {
	c.mu.Lock()
	hasRoom := c.images.total+weigh(size) <= maxImageRecords
	c.mu.Unlock()
	if hasRoom {
		return nil
	}
	// Without this answer the images of volumes have no protection. They can be pulled again.
	used, _ := c.records.LayersInUse()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range c.images.toForget(size, func(image *Image) protection {
		isUnused := func(layer ImageLayer) bool { return len(used[layer.DiffID]) == 0 }
		switch {
		case c.isPrefetched(image):
			return isPrefetched
		case !slices.ContainsFunc(image.Layers, isUnused):
			return usedByVolume
		}
		return unprotected
	}) {
		if err := c.forgetLocked(id); err != nil {
			return err
		}
	}
	return nil
}

func (c *catalogue) forgetLocked(id digest.Digest) error {
	c.images.remove(id)
	if err := c.discard(c.imagePath(id)); err != nil {
		return fmt.Errorf("remove image %s: %w", id, err)
	}
	return nil
}

// isPrefetched reports whether an image was prefetched, or is to be.
func (c *catalogue) isPrefetched(image *Image) bool {
	return slices.ContainsFunc(c.prefetch, func(name prefetchedName) bool { return name.isOf(image) })
}

// isPreloaded reports whether the operator has an image prefetched from a repository.
func (c *catalogue) isPreloaded(id digest.Digest, repository string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	image, ok := c.images.images[id]
	return ok && slices.ContainsFunc(c.prefetch, func(name prefetchedName) bool {
		return name.named.Name() == repository && name.hasPrefetched(image)
	})
}
