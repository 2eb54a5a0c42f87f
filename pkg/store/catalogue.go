package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/store/access"
)

// blobKey identifies the content of a layer by its blob. The same blob is another layer if it is a single file instead of a
// tar. The identifier of a blob whose digest is unknown says nothing of a blob with that digest.
type blobKey struct {
	digest        digest.Digest
	fileName      string
	digestUnknown bool
}

func keyOf(blob image.LayerBlob) blobKey {
	return blobKey{blob.Descriptor.Digest, blob.FileName, blob.DigestUnknown}
}

// maxOtherBlobs is the maximum number of blobs that are remembered besides one for each layer. A blob that is not remembered, and of which
// no diff ID is known, is downloaded again.
const maxOtherBlobs = 4096

// catalogue has the layers and images of the store, and the leases on layers.
type catalogue struct {
	layout

	mu     sync.Mutex
	layers map[digest.Digest]*LayerStatus
	// blobs maps blobs to the diff IDs of their layers.
	blobs  map[blobKey]digest.Digest
	images imageTable
	leases leaseTable

	// records has the layers that volumes use, and prefetch the names of the images that are prefetched.
	records  records
	prefetch []prefetchedName

	// saveMu serializes saveImage and addHolders. They do not hold mu while they write, because publishing a volume needs mu.
	saveMu sync.Mutex
}

// openCatalogue reads the catalogue of a store. It removes invalid layers and images.
func openCatalogue(ctx context.Context, layout layout, records records, prefetch []prefetchedName) (*catalogue, error) {
	c := &catalogue{
		layout:   layout,
		layers:   map[digest.Digest]*LayerStatus{},
		blobs:    map[blobKey]digest.Digest{},
		images:   newImageTable(),
		leases:   leaseTable{counts: map[digest.Digest]int{}},
		records:  records,
		prefetch: prefetch,
	}
	if err := c.loadLayers(ctx); err != nil {
		return nil, err
	}
	return c, c.loadImages(ctx)
}

func (c *catalogue) loadLayers(ctx context.Context) error {
	names, err := dirNames(c.layersDir())
	if err != nil {
		return err
	}
	for _, name := range names {
		dir := filepath.Join(c.layersDir(), name)
		var layer Layer
		used, err := readJSON(filepath.Join(dir, layerName), &layer)
		if err != nil || layer.DiffID.Validate() != nil || layer.DiffID.Encoded() != name || layer.Version != formatVersion {
			klog.FromContext(ctx).Info("Removing invalid layer directory", keyDirectory, dir, keyReason, fmt.Sprint(err))
			if err := c.discard(dir); err != nil {
				return err
			}
			continue
		}
		c.addLocked(layer, used)
	}
	return nil
}

func (c *catalogue) addLocked(layer Layer, used time.Time) {
	c.layers[layer.DiffID] = &LayerStatus{layer, used}
	if layer.Digest != "" {
		c.blobs[blobKey{digest: layer.Digest, fileName: layer.FileName}] = layer.DiffID
	}
}

// commit renames the directory at path to that of a layer, adds the layer, and acquires a reference on it. key is its blob.
// isNew is false if the layer was present, because it was also built by another fetch or from another blob. The directory at
// path then stays. A collection cannot come in between: remove takes the same lock.
func (c *catalogue) commit(path string, layer Layer, key blobKey) (isNew bool, _ error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := os.Rename(path, c.layerDir(layer.DiffID))
	isPresent := errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST)
	if err != nil && !isPresent {
		return false, err
	}
	now := time.Now()
	if c.layers[layer.DiffID] == nil {
		c.addLocked(layer, now)
	}
	if !isPresent || len(c.blobs) < len(c.layers)+maxOtherBlobs {
		c.blobs[key] = layer.DiffID
	}
	c.leases.acquire(layer.DiffID)
	c.layers[layer.DiffID].LastUsed = now
	return !isPresent, nil
}

// findLocked returns the layer of a blob, or nil if it is not present.
func (c *catalogue) findLocked(blob image.LayerBlob) *LayerStatus {
	if blob.DiffID != "" {
		return c.layers[blob.DiffID]
	}
	return c.layers[c.blobs[keyOf(blob)]]
}

// permission reports whether a layer may be used. It does no I/O.
type permission func(Layer) bool

// anyLayer is the permission to use every layer.
func anyLayer(Layer) bool { return true }

// has reports whether the layer of a blob is present and may be used.
func (c *catalogue) has(blob image.LayerBlob, may permission) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	layer := c.findLocked(blob)
	return layer != nil && may(layer.Layer)
}

// acquireBlob acquires a reference on the layer of a blob. It returns ErrNotFound if the layer is not present, or may not be used.
func (c *catalogue) acquireBlob(blob image.LayerBlob, may permission) (digest.Digest, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	layer := c.findLocked(blob)
	if layer == nil || !may(layer.Layer) {
		return "", fmt.Errorf("%w: layer %s", errdefs.ErrNotFound, blob.Descriptor.Digest)
	}
	return layer.DiffID, c.acquireLocked([]digest.Digest{layer.DiffID})
}

// acquireImage acquires references on the layers of an image. It returns ErrNotFound if the image or one of its layers is
// not present.
func (c *catalogue) acquireImage(id digest.Digest) (*Image, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	image, ok := c.images.images[id]
	if !ok {
		return nil, fmt.Errorf("%w: image %s", errdefs.ErrNotFound, id)
	}
	return image, c.acquireLocked(image.diffIDs())
}

// acquireManifest is like acquireImage for an image whose digest is that of a manifest or an index. Those of other archives are digests of
// something else, which may be the same document.
func (c *catalogue) acquireManifest(id digest.Digest) (*Image, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	image, ok := c.images.images[id]
	if !ok || image.Manifest == "" {
		return nil, fmt.Errorf("%w: image %s", errdefs.ErrNotFound, id)
	}
	return image, c.acquireLocked(image.diffIDs())
}

// acquireArchive is like acquireImage for the image of an archive.
func (c *catalogue) acquireArchive(archive image.ArchiveFile) (*Image, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, image := range c.images.images {
		if image.Archive != nil && *image.Archive == archive && c.acquireLocked(image.diffIDs()) == nil {
			return image, nil
		}
	}
	return nil, fmt.Errorf("%w: archive %s", errdefs.ErrNotFound, archive.Reference)
}

// acquire acquires a reference on each of the layers. It returns ErrNotFound, and acquires none, if one is not present.
func (c *catalogue) acquire(ids []digest.Digest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.acquireLocked(ids)
}

func (c *catalogue) acquireLocked(ids []digest.Digest) error {
	for _, id := range ids {
		if c.layers[id] == nil {
			return fmt.Errorf("%w: layer %s", errdefs.ErrNotFound, id)
		}
	}
	now := time.Now()
	for _, id := range ids {
		c.leases.acquire(id)
		c.layers[id].LastUsed = now
	}
	return nil
}

// addHolders adds to those who may have a layer. The caller holds a reference on it.
func (c *catalogue) addHolders(id digest.Digest, holders []access.ID) error {
	c.saveMu.Lock()
	defer c.saveMu.Unlock()
	c.mu.Lock()
	status := c.layers[id]
	isNew := slices.ContainsFunc(holders, func(holder access.ID) bool { return !slices.Contains(status.Holders, holder) })
	if isNew {
		status.Holders = access.AddHolders(status.Holders, holders)
	}
	layer := status.Layer
	c.mu.Unlock()
	if !isNew {
		return nil
	}
	if err := writeJSON(filepath.Join(c.layerDir(id), layerName), layer); err != nil {
		return fmt.Errorf("write %s of layer %s: %w", layerName, id, err)
	}
	return nil
}

// unref releases a reference on each of the layers.
func (c *catalogue) unref(ids []digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range ids {
		c.leases.release(id)
	}
}

// visible returns the layers of an image that are not hidden, the topmost first. It leaves out layers below an opaque one. It
// also leaves out repeated layers, because overlayfs refuses the same directory twice.
func (c *catalogue) visible(ids []digest.Digest) []digest.Digest {
	c.mu.Lock()
	defer c.mu.Unlock()
	visible := make([]digest.Digest, 0, len(ids))
	seen := make(map[digest.Digest]bool, len(ids))
	for _, id := range slices.Backward(ids) {
		if seen[id] {
			continue
		}
		seen[id] = true
		visible = append(visible, id)
		if c.layers[id].Opaque {
			break
		}
	}
	return visible
}

// listLayers returns the layers, sorted by diff ID.
func (c *catalogue) listLayers() []LayerStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]LayerStatus, 0, len(c.layers))
	for _, layer := range c.layers {
		list = append(list, *layer)
	}
	slices.SortFunc(list, func(a, b LayerStatus) int { return strings.Compare(string(a.DiffID), string(b.DiffID)) })
	return list
}

// listImages returns the images whose layers are all present, sorted by name.
func (c *catalogue) listImages() []Image {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []Image
	for _, image := range c.images.images {
		if c.hasLayersLocked(image) {
			list = append(list, *image)
		}
	}
	slices.SortFunc(list, func(a, b Image) int {
		return cmp.Or(slices.Compare(a.Names, b.Names), cmp.Compare(a.Digest, b.Digest))
	})
	return list
}

// mayUse reports whether a layer is present and may be used.
func (c *catalogue) mayUse(id digest.Digest, mayUse func(Layer) bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	layer := c.layers[id]
	return layer != nil && mayUse(layer.Layer)
}

// hasLayersLocked reports whether all layers of an image are present.
func (c *catalogue) hasLayersLocked(image *Image) bool {
	return !slices.ContainsFunc(image.Layers, func(layer ImageLayer) bool { return c.layers[layer.DiffID] == nil })
}

// markUsed sets the time of the last use of the layers in used to now. It also stores the times of all layers on disk, as
// modification times of layer.json.
func (c *catalogue) markUsed(used map[digest.Digest][]string) {
	now := time.Now()
	last := map[digest.Digest]time.Time{}
	c.mu.Lock()
	for id, layer := range c.layers {
		if len(used[id]) > 0 {
			layer.LastUsed = now
		}
		last[id] = layer.LastUsed
	}
	c.mu.Unlock()
	for id, at := range last {
		// The times only determine the order of garbage collection, so that errors are not important.
		_ = os.Chtimes(filepath.Join(c.layerDir(id), layerName), at, at)
	}
}

// beginGC protects the layers that have a lease now or get one before endGC.
func (c *catalogue) beginGC() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leases.beginGC()
}

// endGC ends the protection that beginGC began.
func (c *catalogue) endGC() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leases.endGC()
}

// remove removes a layer and the images that contain it. It returns false if the layer is leased or protected. If dryRun is
// true it removes nothing.
func (c *catalogue) remove(id digest.Digest, dryRun bool) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.layers[id] == nil || c.leases.isHeld(id) {
		return false, nil
	}
	if dryRun {
		return true, nil
	}
	if err := c.discard(c.layerDir(id)); err != nil {
		return false, fmt.Errorf("remove layer %s: %w", id, err)
	}
	delete(c.layers, id)
	for key, of := range c.blobs {
		if of == id {
			delete(c.blobs, key)
		}
	}
	for digest, image := range c.images.images {
		if slices.Contains(image.diffIDs(), id) {
			if err := c.forgetLocked(digest); err != nil {
				return true, err
			}
		}
	}
	return true, nil
}
