package store

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Use is the layers of an image, held open and safe from collection until Close.
type Use struct {
	Image Image
	// Dirs are the directories of the layers, the topmost first. They belong to the Use.
	Dirs  []*os.File
	store *Store
	held  []digest.Digest
}

// Close lets go of the layers.
func (u *Use) Close() {
	for _, dir := range u.Dirs {
		dir.Close()
	}
	u.store.release(u.held)
}

// Use opens the layers of an image at path in it (relative and clean, "" for the whole of it), without asking any
// registry. It is nil where the image is not here with all of its layers.
func (s *Store) Use(id digest.Digest, path string) (*Use, error) {
	s.mu.Lock()
	image, ok := s.images[id]
	held := ok && s.holdLocked(image.diffIDs())
	s.mu.Unlock()
	if !held {
		return nil, nil
	}
	return s.use(image, path)
}

// use opens the layers of an image, which are held.
func (s *Store) use(image *Image, path string) (*Use, error) {
	u := &Use{Image: *image, store: s, held: image.diffIDs()}
	for _, id := range s.visible(u.held) {
		dir, err := s.openTree(id)
		if err != nil {
			u.Close()
			return nil, err
		}
		u.Dirs = append(u.Dirs, dir)
	}
	if path == "" {
		return u, nil
	}
	stack, err := openInStack(u.Dirs, path)
	if err != nil {
		u.Close()
		return nil, fmt.Errorf("?path=/%s: %w", path, err)
	}
	for _, dir := range u.Dirs {
		dir.Close()
	}
	u.Dirs = stack
	return u, nil
}

// visible are the layers that show anything, the topmost first. One that is there twice shows nothing where it is lower,
// and overlayfs takes a directory once.
func (s *Store) visible(ids []digest.Digest) []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	visible := make([]digest.Digest, 0, len(ids))
	seen := make(map[digest.Digest]bool, len(ids))
	for _, id := range slices.Backward(ids) {
		if seen[id] {
			continue
		}
		seen[id] = true
		visible = append(visible, id)
		if s.layers[id].Opaque {
			break
		}
	}
	return visible
}

func (s *Store) openTree(id digest.Digest) (*os.File, error) {
	name := filepath.Join(layersName, sha256Name, id.Encoded(), treeName)
	fd, err := unix.Openat(int(s.config.Root.Fd()), name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	path := filepath.Join(s.path, name)
	if err != nil {
		return nil, &os.PathError{Op: "open layer", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// holdLocked keeps layers from being collected, all of them or, where one is not here, none.
func (s *Store) holdLocked(ids []digest.Digest) bool {
	for _, id := range ids {
		if s.layers[id] == nil {
			return false
		}
	}
	now := time.Now()
	for _, id := range ids {
		s.layers[id].users++
		s.layers[id].used = now
		s.collecting.protect(id)
	}
	return true
}

func (s *Store) release(ids []digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		s.layers[id].users--
	}
}
