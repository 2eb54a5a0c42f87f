package cache

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// mergeBeyond is how many frozen uppers a cache may have until they are merged.
const mergeBeyond = 8

// interval is the time between two rounds of Run that no commit asked for.
const interval = time.Minute

// Run does what commits leave for later, until ctx is done: it writes versions to the disk, merges those of a cache that has many, and
// removes caches beyond the size that they may have.
func (s *Store) Run(ctx context.Context) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		if err := s.round(ctx); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Could not do all that caches need, will retry")
		}
		select {
		case <-ctx.Done():
			return
		case <-s.work:
		case <-ticker.C:
		}
	}
}

func (s *Store) round(ctx context.Context) error {
	keys, err := s.records.List()
	if err != nil || len(keys) == 0 {
		return err
	}
	err = s.settle(keys)
	for _, key := range keys {
		err = errors.Join(err, s.merge(ctx, key))
	}
	_, errCollect := s.collect(ctx, 0, false)
	// What versions replaced.
	return errors.Join(err, errCollect, s.config.Uppers.Sweep(ctx))
}

// merge merges the frozen uppers of a cache that has many. Views that are mounted keep what they have.
func (s *Store) merge(ctx context.Context, key record.CacheKey) error {
	found, run, unpin := s.plan(key)
	defer unpin()
	if len(run) < 2 || s.unmergeable[run[0].ID] {
		return nil
	}
	listed, err := s.config.Records.FrozenInUse()
	if err != nil {
		return err
	}
	merged := record.CacheVersion{Frozen: record.Frozen{ID: upper.NewFrozenID(), Backend: run[0].Backend, Group: run[0].Group}}
	// The sweep would discard it before it is complete, and a record lists it.
	defer s.config.Uppers.Pin(merged.ID)()
	ids := idsOf(run)
	err = s.config.Uppers.MergeFrozen(ctx, merged.Backend, ids, merged.ID, len(usersOf(found, listed)) > 0)
	if err == nil {
		merged.Bytes, _, err = s.config.Uppers.MeasureFrozen(ctx, merged.Backend, []string{merged.ID})
	}
	if err != nil {
		s.unmergeable[run[0].ID] = ctx.Err() == nil
		return errors.Join(fmt.Errorf("merge %d versions of cache %s: %w", len(run), key, err), s.config.Uppers.DiscardFrozen(merged.ID))
	}
	klog.FromContext(ctx).Info("Versions of a cache merged", keyCache, key, keyVersions, len(run), keyBytes, merged.Bytes)
	return s.replace(key, run, merged)
}

// plan returns a cache, and the versions of it to merge, none if there is nothing to do. They are not discarded until unpin is called.
func (s *Store) plan(key record.CacheKey) (found *record.Cache, run []record.CacheVersion, unpin func()) {
	defer s.config.Uppers.Hold()()
	found, err := s.load(key)
	if err == nil && len(found.Versions) > mergeBeyond {
		run = mergeable(found.Versions)
	}
	return found, run, s.config.Uppers.Pin(idsOf(run)...)
}

func idsOf(versions []record.CacheVersion) []string {
	ids := make([]string, len(versions))
	for i, version := range versions {
		ids[i] = version.ID
	}
	return ids
}

// mergeable returns the longest part of the versions that can be one: of one backend, with files that are stored with one group, and no
// disk images, which would have to be made with a size.
func mergeable(versions []record.CacheVersion) (longest []record.CacheVersion) {
	for start := 0; start < len(versions); {
		end := start + 1
		for end < len(versions) && versions[start].Backend == versions[end].Backend && sameGroup(versions[start].Group, versions[end].Group) {
			end++
		}
		if versions[start].Backend != upper.DiskImage && end-start > len(longest) {
			longest = versions[start:end]
		}
		start = end
	}
	return longest
}

func sameGroup(a, b *record.Group) bool { return (a == nil) == (b == nil) && (a == nil || *a == *b) }

// replace puts a merged version into a cache in place of those that it was made of, if the cache still has them. Others may have been
// committed above them.
func (s *Store) replace(key record.CacheKey, run []record.CacheVersion, merged record.CacheVersion) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	found, err := s.load(key)
	if err != nil {
		return nil // It was removed, and the sweep discards the merged version.
	}
	at := slices.IndexFunc(found.Versions, func(version record.CacheVersion) bool { return version.ID == run[0].ID })
	if at < 0 || at+len(run) > len(found.Versions) || !slices.EqualFunc(found.Versions[at:at+len(run)], run, sameVersion) {
		return nil
	}
	changed := *found
	changed.Versions = slices.Concat(found.Versions[:at], []record.CacheVersion{merged}, found.Versions[at+len(run):])
	if err := s.records.Save(&changed); err != nil {
		return err
	}
	return s.records.Use(key, found.LastUsed)
}

// settle writes the versions of caches to the disk, and then says in their records that it did. Of a cache that was committed to in an
// earlier boot, it keeps what had been written then. What is damaged is no cache.
func (s *Store) settle(keys []record.CacheKey) error {
	var unwritten []*record.Cache
	for _, key := range keys {
		found, err := s.records.Load(key)
		switch {
		case errors.Is(err, record.ErrDamaged):
			if err := s.remove(key); err != nil {
				return err
			}
		case err != nil, found.BootID == "":
		case found.BootID == s.config.BootID:
			unwritten = append(unwritten, found)
		default:
			if err := s.change(found, found.InBoot(s.config.BootID)); err != nil {
				return err
			}
		}
	}
	if len(unwritten) == 0 {
		return nil
	}
	if err := s.config.Sync(); err != nil {
		return err
	}
	for _, found := range unwritten {
		written := *found
		written.BootID, written.Before = "", nil
		if err := s.change(found, &written); err != nil {
			return err
		}
	}
	return nil
}

// change replaces the record of a cache, unless it was changed since. A cache without a version is removed.
func (s *Store) change(from, to *record.Cache) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, err := s.records.Load(from.Key())
	if err != nil || now.Generation != from.Generation || !slices.EqualFunc(now.Versions, from.Versions, sameVersion) {
		return nil
	}
	if len(to.Versions) == 0 {
		return s.records.Remove(to.Key(), s.config.Discard)
	}
	if err := s.records.Save(to); err != nil {
		return err
	}
	return s.records.Use(to.Key(), now.LastUsed)
}

func sameVersion(a, b record.CacheVersion) bool { return a.ID == b.ID }
