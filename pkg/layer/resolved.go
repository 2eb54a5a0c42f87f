package layer

import (
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/store"
)

// ResolvedLayers are the directories of a volume's layers, open until Close, so that they stay the ones that were resolved when paths
// are renamed or layers are collected.
type ResolvedLayers struct {
	// Dirs are the directories, the topmost first.
	Dirs []*os.File
	// Fingerprints are those of the directories, "" for one that may change.
	Fingerprints []linux.Fingerprint
	// Digests has the image digest that each oci:// and archive:// reference was resolved to.
	Digests reference.Digests
	// Stored are the diff IDs of the layers that are in the layer store.
	Stored []digest.Digest
	// Caches are the caches among the layers, whose directories are not in Dirs.
	Caches []CacheLayer

	owned  []*os.File
	leases []*store.Lease
	seen   map[string]bool
}

// CacheLayer is a cache among the layers. Under is how many of the directories of the other layers lie above it.
type CacheLayer struct {
	Name  string
	Under int
}

func newResolvedLayers() *ResolvedLayers {
	return &ResolvedLayers{Digests: reference.Digests{}, seen: map[string]bool{}}
}

// Close closes the directories and releases the leases on stored layers.
func (l *ResolvedLayers) Close() {
	for _, dir := range l.owned {
		dir.Close()
	}
	for _, lease := range l.leases {
		lease.Release()
	}
}

// Paths returns the paths that the directories had when they were opened.
func (l *ResolvedLayers) Paths() []string {
	paths := make([]string, len(l.Dirs))
	for i, dir := range l.Dirs {
		paths[i] = dir.Name()
	}
	return paths
}

// addDir adds a directory below the others and takes it over.
func (l *ResolvedLayers) addDir(dir *os.File, fingerprint linux.Fingerprint) {
	l.owned = append(l.owned, dir)
	l.Dirs, l.Fingerprints = append(l.Dirs, dir), append(l.Fingerprints, fingerprint)
}

// addImage adds the layers of an image below the others and takes over the lease. A layer that is there already, because two images
// share it, is left out: overlayfs takes a directory once, and the lower one would show nothing more.
func (l *ResolvedLayers) addImage(ref reference.Reference, lease *store.Lease) error {
	l.leases = append(l.leases, lease)
	l.Digests[ref.String()] = lease.Image.Digest
	for _, layer := range lease.Image.Layers {
		l.Stored = append(l.Stored, layer.DiffID)
	}
	for _, dir := range lease.Dirs {
		if l.seen[dir.Name()] {
			continue
		}
		l.seen[dir.Name()] = true
		fingerprint, err := linux.FingerprintOf(dir)
		if err != nil {
			return err
		}
		l.Dirs, l.Fingerprints = append(l.Dirs, dir), append(l.Fingerprints, fingerprint)
	}
	return nil
}
