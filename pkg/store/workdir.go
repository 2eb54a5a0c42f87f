package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// maxBlobAge is how long the download of a layer that nobody goes on with stays.
const maxBlobAge = 24 * time.Hour

// workDirs are the directories in incoming: one for each layer that is being made or archive that is being read.
type workDirs struct {
	layout
	mu   sync.Mutex
	open map[string]bool
}

// openWorkDirs removes everything but blobs: a pull that is asked for again goes on where it was.
func openWorkDirs(layout layout) (*workDirs, error) {
	w := &workDirs{layout: layout, open: map[string]bool{}}
	names, err := dirNames(w.incomingDir())
	for _, name := range names {
		dir := workDir{w, name}
		err = errors.Join(err, dir.clear())
	}
	return w, err
}

// workDir is one of them, in the hands of one fetch or import.
type workDir struct {
	dirs *workDirs
	name string
}

// layerWorkDirName is the name of the directory in which a layer is made.
func layerWorkDirName(blob image.LayerBlob) string {
	if blob.FileName == "" {
		return blob.Descriptor.Digest.Encoded()
	}
	return blob.Descriptor.Digest.Encoded() + "-" + digest.FromString(blob.FileName).Encoded()[:16]
}

// archiveWorkDirName is the name of the directory in which an archive is decompressed.
func archiveWorkDirName(archive image.ArchiveFile) string {
	return "archive-" + archive.Key().Encoded()
}

// acquire makes the directory if it is missing. No garbage collection removes it before it is released.
func (w *workDirs) acquire(name string) (*workDir, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	dir := &workDir{w, name}
	if err := os.MkdirAll(dir.path(), 0o700); err != nil {
		return nil, fmt.Errorf("make a work directory: %w", err)
	}
	w.open[name] = true
	return dir, nil
}

// removeAbandoned removes the directories that nobody works in, but for downloads that are not old yet.
func (w *workDirs) removeAbandoned() error {
	names, err := dirNames(w.incomingDir())
	if err != nil {
		return fmt.Errorf("list downloads: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range names {
		dir := workDir{w, name}
		info, err := os.Stat(dir.join(blobName))
		if w.open[name] || (err == nil && time.Since(info.ModTime()) < maxBlobAge) {
			continue
		}
		if err := dir.discard(); err != nil {
			return fmt.Errorf("remove a download: %w", err)
		}
	}
	return nil
}

func (d *workDir) path() string            { return filepath.Join(d.dirs.incomingDir(), d.name) }
func (d *workDir) join(name string) string { return filepath.Join(d.path(), name) }
func (d *workDir) discard() error          { return d.dirs.layout.discard(d.path()) }

// release leaves the directory to the next one, or to garbage collection.
func (d *workDir) release() {
	d.dirs.mu.Lock()
	defer d.dirs.mu.Unlock()
	delete(d.dirs.open, d.name)
}

// recreate empties the directory.
func (d *workDir) recreate() error {
	if err := d.discard(); err != nil {
		return err
	}
	return os.MkdirAll(d.path(), 0o700)
}

// clear removes everything but the blob.
func (d *workDir) clear() error { return d.removeExcept(blobName) }

// removeExcept removes everything in the directory but one name.
func (d *workDir) removeExcept(kept string) error {
	names, err := dirNames(d.path())
	for _, name := range names {
		if name != kept {
			err = errors.Join(err, d.dirs.layout.discard(d.join(name)))
		}
	}
	return err
}
