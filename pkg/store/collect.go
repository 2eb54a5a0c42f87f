package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// CollectConfig says when layers that no volume uses are removed, as kubelet's image collection does.
type CollectConfig struct {
	// HighPercent is how full the disk is when collection begins, LowPercent how full it is when it ends.
	HighPercent, LowPercent int
	// MinAge is how long a layer must not have been used.
	MinAge time.Duration
	// Interval is the time between two looks at the disk.
	Interval time.Duration
}

// blobAge is how long the download of a layer that nobody asks for any more is kept.
const blobAge = 24 * time.Hour

// users tell which layers volumes use: from their state as it is at the moment, not from counters.
type users interface {
	LayerUsers() (map[digest.Digest][]string, error)
}

// collection is one collection that is under way. A layer that was held at its beginning or is taken meanwhile is not
// removed by it: the volume that it is for may have read the state too late to be in it, and let go of the layer since.
type collection struct{ protected map[digest.Digest]bool }

func (c *collection) protect(id digest.Digest) {
	if c != nil {
		c.protected[id] = true
	}
}

// Collected is what a collection removed, or would remove.
type Collected struct {
	Layers []LayerUse `json:"layers"`
	Bytes  int64      `json:"bytes"`
}

// Run pulls the images that are to be kept here, and collects layers until ctx is done.
func (s *Store) Run(ctx context.Context, users users) {
	s.mu.Lock()
	s.users = users
	s.mu.Unlock()
	for _, name := range s.config.Keep {
		s.work.Go(func() { s.keep(ctx, name) })
	}
	ticker := time.NewTicker(s.config.Collect.Interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if _, err := s.Collect(ctx, CollectRequest{}); err != nil {
			klog.FromContext(ctx).Error(err, "Could not collect layers; it is tried again")
		}
	}
}

// CollectRequest asks for a collection.
type CollectRequest struct {
	// DryRun removes nothing.
	DryRun bool
	// All removes every layer that is not used and old enough, however full the disk is. Bytes removes until so many
	// are gone. Without either it is down to the low mark, where the disk is fuller than the high mark.
	All   bool
	Bytes int64
}

// Collect removes layers that no volume uses, the least recently used first, and the images that had them.
func (s *Store) Collect(ctx context.Context, request CollectRequest) (Collected, error) {
	s.collectMu.Lock()
	defer s.collectMu.Unlock()
	s.mu.Lock()
	if s.users == nil {
		s.mu.Unlock()
		return Collected{}, errors.New("collect layers: the volumes' state has not been read yet")
	}
	current := &collection{protected: map[digest.Digest]bool{}}
	for id, e := range s.layers {
		if e.users > 0 {
			current.protect(id)
		}
	}
	s.collecting = current
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.collecting = nil
		s.mu.Unlock()
	}()
	// Only now: a volume whose layers are not held any more has its state on disk.
	used, err := s.users.LayerUsers()
	if err != nil {
		return Collected{}, fmt.Errorf("collect layers: %w", err)
	}
	wanted, err := s.wanted(request)
	if err != nil {
		return Collected{}, err
	}
	s.mark(used)
	if !request.DryRun {
		if err := s.collectBlobs(); err != nil {
			return Collected{}, err
		}
	}
	return s.sweep(ctx, used, wanted, request.DryRun)
}

// wanted is how many bytes are to be removed.
func (s *Store) wanted(request CollectRequest) (int64, error) {
	if request.All {
		return 1 << 62, nil
	}
	if request.Bytes > 0 {
		return request.Bytes, nil
	}
	var stat unix.Statfs_t
	if err := unix.Fstatfs(int(s.config.Root.Fd()), &stat); err != nil {
		return 0, fmt.Errorf("fstatfs %s: %w", s.path, err)
	}
	// As df has it: of what is not root's alone.
	total := int64(stat.Blocks-stat.Bfree+stat.Bavail) * stat.Bsize
	taken := int64(stat.Blocks-stat.Bfree) * stat.Bsize
	if total == 0 || taken*100 < total*int64(s.config.Collect.HighPercent) {
		return 0, nil
	}
	return taken - total*int64(s.config.Collect.LowPercent)/100, nil
}

// mark notes on the layers that are in use that they were just now. It is what is left of that after a restart.
func (s *Store) mark(used map[digest.Digest][]string) {
	now := time.Now()
	s.mu.Lock()
	for id, e := range s.layers {
		if len(used[id]) > 0 {
			e.used = now
		}
	}
	last := map[digest.Digest]time.Time{}
	for id, e := range s.layers {
		last[id] = e.used
	}
	s.mu.Unlock()
	for id, at := range last {
		// It only orders what is collected: what cannot be noted does not matter.
		_ = os.Chtimes(filepath.Join(s.layerDir(id), layerName), at, at)
	}
}

// sweep removes layers until enough is gone.
func (s *Store) sweep(ctx context.Context, used map[digest.Digest][]string, wanted int64, dryRun bool) (Collected, error) {
	var collected Collected
	kept := s.keptLayers()
	candidates := s.Layers()
	slices.SortStableFunc(candidates, func(a, b LayerUse) int { return cmp.Or(a.LastUsed.Compare(b.LastUsed), cmp.Compare(b.Bytes, a.Bytes)) })
	for _, layer := range candidates {
		if collected.Bytes >= wanted || ctx.Err() != nil {
			break
		}
		if len(used[layer.DiffID]) > 0 || kept[layer.DiffID] || time.Since(layer.LastUsed) < s.config.Collect.MinAge {
			continue
		}
		removed, err := s.remove(layer.DiffID, dryRun)
		if err != nil {
			return collected, err
		}
		if removed {
			collected.Layers = append(collected.Layers, layer)
			collected.Bytes += layer.Bytes
		}
	}
	if len(collected.Layers) > 0 && !dryRun {
		klog.FromContext(ctx).Info("Collected layers that no volume uses", "layers", len(collected.Layers), "bytes", humanize.IBytes(uint64(collected.Bytes)))
	}
	return collected, ctx.Err()
}

// remove takes a layer out of the store, where nobody has it.
func (s *Store) remove(id digest.Digest, dryRun bool) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.layers[id]
	if e == nil || e.users > 0 || s.collecting.protected[id] {
		return false, nil
	}
	if dryRun {
		return true, nil
	}
	if err := s.config.Discard(s.layerDir(id)); err != nil {
		return false, fmt.Errorf("collect layer %s: %w", id, err)
	}
	delete(s.layers, id)
	for key, of := range s.blobs {
		if of == id {
			delete(s.blobs, key)
		}
	}
	for digest, image := range s.images {
		if slices.Contains(image.diffIDs(), id) {
			delete(s.images, digest)
			if err := s.config.Discard(s.imagePath(digest)); err != nil {
				return true, fmt.Errorf("forget image %s: %w", digest, err)
			}
		}
	}
	return true, nil
}

// collectBlobs removes downloads that nobody has gone on with.
func (s *Store) collectBlobs() error {
	names, err := dirNames(s.incomingDir(""))
	if err != nil {
		return fmt.Errorf("list downloads: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	busy := map[string]bool{}
	for key := range s.fetches {
		busy[buildName(key)] = true
	}
	for key := range s.pulls {
		busy[archiveName(key.image)] = true
	}
	for _, name := range names {
		dir := s.incomingDir(name)
		info, err := os.Stat(filepath.Join(dir, blobName))
		if busy[name] || (err == nil && time.Since(info.ModTime()) < blobAge) {
			continue
		}
		if err := s.config.Discard(dir); err != nil {
			return fmt.Errorf("remove a download: %w", err)
		}
	}
	return nil
}

// collectFor collects for a pull that needs so many bytes.
func (s *Store) collectFor(ctx context.Context, bytes int64) {
	if _, err := s.Collect(ctx, CollectRequest{Bytes: bytes}); err != nil {
		klog.FromContext(ctx).Error(err, "Could not collect layers for a pull")
	}
}

// keptLayers are those of the images that the operator wants kept: what their names stood for at start, and as long as
// that is not known, all that ever had those names.
func (s *Store) keptLayers() map[digest.Digest]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	layers := map[digest.Digest]bool{}
	for _, image := range s.images {
		for _, name := range s.config.Keep {
			resolved, ok := s.kept[name]
			if ok && resolved != image.Digest || !ok && !slices.Contains(image.Names, name) {
				continue
			}
			for _, id := range image.diffIDs() {
				layers[id] = true
			}
		}
	}
	return layers
}
