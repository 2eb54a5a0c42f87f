package store

import (
	"fmt"
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/store/merged"
)

// Lease protects the layers of an image from garbage collection until Release.
type Lease struct {
	Image Image
	// Dirs are the open directories of the layers, the topmost first. Release closes them.
	Dirs []*os.File

	catalogue *catalogue
	layers    []digest.Digest
}

// Release closes the directories and ends the protection of the layers.
func (l *Lease) Release() {
	closeAll(l.Dirs)
	l.catalogue.unref(l.layers)
}

// openLease opens the layers of an image at a path in the image. The Lease takes over the caller's references on the layers.
// openLease releases them after an error.
func openLease(c *catalogue, image *Image, path string) (*Lease, error) {
	l := &Lease{Image: *image, catalogue: c, layers: image.diffIDs()}
	for _, id := range c.visible(l.layers) {
		dir, err := c.openTree(id)
		if err != nil {
			l.Release()
			return nil, err
		}
		l.Dirs = append(l.Dirs, dir)
	}
	if path == "" {
		return l, nil
	}
	dirs, err := merged.Open(l.Dirs, path)
	if err != nil {
		l.Release()
		return nil, fmt.Errorf("?path=/%s: %w", path, err)
	}
	closeAll(l.Dirs)
	l.Dirs = dirs
	return l, nil
}

func closeAll(files []*os.File) {
	for _, file := range files {
		file.Close()
	}
}

// leaseTable counts the references on each layer. The catalogue's lock guards it.
type leaseTable struct {
	counts map[digest.Digest]int
	// protected has the layers that were referenced at any time since beginGC. It is nil outside of garbage collection. A
	// volume may have saved its record after the collector read the records.
	protected map[digest.Digest]bool
}

func (t *leaseTable) acquire(id digest.Digest) {
	t.counts[id]++
	if t.protected != nil {
		t.protected[id] = true
	}
}

func (t *leaseTable) release(id digest.Digest) {
	if t.counts[id]--; t.counts[id] == 0 {
		delete(t.counts, id)
	}
}

func (t *leaseTable) isHeld(id digest.Digest) bool { return t.counts[id] > 0 || t.protected[id] }

func (t *leaseTable) beginGC() {
	t.protected = map[digest.Digest]bool{}
	for id := range t.counts {
		t.protected[id] = true
	}
}

func (t *leaseTable) endGC() { t.protected = nil }
