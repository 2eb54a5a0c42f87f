package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/store/access"
)

// maxBlobAge is the age at which an abandoned download is removed although nobody needs its space.
const maxBlobAge = 24 * time.Hour

// workDirs manages the directories in incoming, one for each layer or archive in progress.
type workDirs struct {
	layout
	mu sync.Mutex
	// held counts who needs a directory.
	held map[string]int
}

// openWorkDirs returns the work directories of a store. It removes everything in them except for downloads, which later pulls
// resume.
func openWorkDirs(layout layout) (*workDirs, error) {
	w := &workDirs{layout: layout, held: map[string]int{}}
	names, err := dirNames(w.incomingDir())
	for _, name := range names {
		dir := workDir{w, name}
		err = errors.Join(err, dir.clear())
	}
	return w, err
}

// workDir is a work directory. One fetch or import owns it from acquire to release.
type workDir struct {
	dirs *workDirs
	name string
}

// archiveWorkDirName returns the name of the work directory for an archive.
func archiveWorkDirName(archive image.ArchiveFile) string {
	return "archive-" + archive.Key().Encoded()
}

// acquire creates a work directory if it does not exist, and protects it from garbage collection until release.
func (w *workDirs) acquire(name string) (*workDir, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	dir := &workDir{w, name}
	if err := os.MkdirAll(dir.path(), 0o700); err != nil {
		return nil, fmt.Errorf("create a work directory: %w", err)
	}
	w.held[name]++
	return dir, nil
}

// acquireEmpty is acquire for what cannot go on where an earlier process ended.
func (w *workDirs) acquireEmpty(name string) (*workDir, error) {
	dir, err := w.acquire(name)
	if err != nil {
		return nil, err
	}
	if err := dir.recreate(); err != nil {
		dir.release()
		return nil, err
	}
	return dir, nil
}

// hold protects work directories from garbage collection until unhold. They need not exist.
func (w *workDirs) hold(names []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range names {
		w.held[name]++
	}
}

// unhold ends the protection that hold began.
func (w *workDirs) unhold(names []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range names {
		if w.held[name]--; w.held[name] == 0 {
			delete(w.held, name)
		}
	}
}

// downloaded returns the number of bytes that a work directory has of a download.
func (w *workDirs) downloaded(name string) int64 { return (&workDir{w, name}).downloaded() }

// downloaded returns the number of bytes that the directory has of a download.
func (d *workDir) downloaded() int64 {
	info, err := os.Stat(d.join(blobName))
	if err != nil {
		return 0
	}
	return info.Size()
}

// removeAbandoned removes the directories that no fetch or pull needs, except for those with downloads that are younger than age. It
// returns the size of the downloads in bytes. If dryRun is true it removes nothing.
func (w *workDirs) removeAbandoned(age time.Duration, dryRun bool) (bytes int64, _ error) {
	names, err := dirNames(w.incomingDir())
	if err != nil {
		return 0, fmt.Errorf("list downloads: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range names {
		dir := workDir{w, name}
		info, err := os.Stat(dir.join(blobName))
		if w.held[name] > 0 || (err == nil && time.Since(info.ModTime()) < age) {
			continue
		}
		if err == nil {
			bytes += info.Size()
		}
		if dryRun {
			continue
		}
		if err := dir.discard(); err != nil {
			return bytes, fmt.Errorf("remove download %s: %w", name, err)
		}
	}
	return bytes, nil
}

func (d *workDir) path() string            { return filepath.Join(d.dirs.incomingDir(), d.name) }
func (d *workDir) join(name string) string { return filepath.Join(d.path(), name) }
func (d *workDir) discard() error          { return d.dirs.layout.discard(d.path()) }

// release ends the protection of the directory.
func (d *workDir) release() { d.dirs.unhold([]string{d.name}) }

// recreate empties the directory.
func (d *workDir) recreate() error {
	if err := d.discard(); err != nil {
		return err
	}
	return os.MkdirAll(d.path(), 0o700)
}

// clear removes everything in the directory except for the download.
func (d *workDir) clear() error { return d.removeExcept(blobName, holdersName) }

// downloadHolders are those who may have a download, parts of which a registry may have sent to different holders. They are stored beside
// the download, because another pull may resume it.
type downloadHolders struct {
	dir     *workDir
	access  *access.Verifier
	current []access.ID
}

// openHolders returns the holders of the download in the directory. It removes a download whose holders are unknown, such as that of an
// earlier driver.
func (d *workDir) openHolders(verifier *access.Verifier) (*downloadHolders, error) {
	holders := &downloadHolders{dir: d, access: verifier}
	if d.downloaded() == 0 {
		return holders, nil
	}
	if _, err := readJSON(d.join(holdersName), &holders.current); err != nil || len(holders.current) == 0 {
		holders.current = nil
		return holders, d.recreate()
	}
	return holders, nil
}

// narrow leaves only those who also may have what is about to be added to the download.
func (h *downloadHolders) narrow(to []access.ID) error {
	common := to
	if h.current != nil {
		common = h.access.CommonHolders(h.current, to)
	}
	if h.current != nil && slices.Equal(common, h.current) {
		return nil
	}
	data, err := json.Marshal(common)
	if err != nil {
		return err
	}
	dir, err := linux.OpenDir(h.dir.path())
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := linux.WriteFileAtomic(dir, holdersName, data, false); err != nil {
		return fmt.Errorf("write who may have the download: %w", err)
	}
	h.current = common
	return nil
}

// removeExcept removes everything in the directory except for some entries.
func (d *workDir) removeExcept(exceptions ...string) error {
	names, err := dirNames(d.path())
	for _, name := range names {
		if !slices.Contains(exceptions, name) {
			err = errors.Join(err, d.dirs.layout.discard(d.join(name)))
		}
	}
	return err
}
