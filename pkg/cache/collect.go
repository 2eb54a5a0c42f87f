package cache

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/dustin/go-humanize"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/record"
)

// Status describes a cache.
type Status struct {
	record.CacheKey
	// Versions is how many frozen uppers its newest version consists of, and Bytes what they take of the disk.
	Versions int
	Bytes    int64
	LastUsed time.Time
	// Users are the volumes that have one of its frozen uppers.
	Users []string
}

// List returns all caches, by namespace and name.
func (s *Store) List() ([]Status, error) {
	keys, err := s.records.List()
	if err != nil {
		return nil, err
	}
	listed, err := s.config.Records.FrozenInUse()
	if err != nil {
		return nil, err
	}
	var list []Status
	for _, key := range keys {
		found, err := s.load(key)
		switch {
		case errdefs.IsNotFound(err):
			continue
		case err != nil && !errors.Is(err, record.ErrDamaged):
			return nil, err
		}
		list = append(list, Status{
			CacheKey: key, Versions: len(found.Versions), Bytes: found.Bytes(), LastUsed: found.LastUsed, Users: usersOf(found, listed),
		})
	}
	return list, nil
}

// usersOf returns who else lists a frozen upper of a cache.
func usersOf(found *record.Cache, listed map[string][]string) (users []string) {
	for _, version := range found.Versions {
		for _, user := range listed[version.ID] {
			if user != record.CacheUser(found.Key()) && !slices.Contains(users, user) {
				users = append(users, user)
			}
		}
	}
	return users
}

// collect removes the caches that no volume uses, the least recently used first, until all of them together are within the size that they
// may have, and need bytes more are free. It returns how much it removed, or with dryRun would remove.
func (s *Store) collect(ctx context.Context, need int64, dryRun bool) (removed int64, err error) {
	list, err := s.List()
	if err != nil {
		return 0, err
	}
	var total int64
	for _, cache := range list {
		total += cache.Bytes
	}
	count := len(list)
	slices.SortStableFunc(list, func(a, b Status) int { return cmp.Or(a.LastUsed.Compare(b.LastUsed), cmp.Compare(b.Bytes, a.Bytes)) })
	for _, cache := range list {
		if total <= s.config.MaxBytes && count <= maxCaches && removed >= need || ctx.Err() != nil {
			break
		}
		if len(cache.Users) > 0 {
			continue
		}
		if !dryRun {
			if err := s.remove(cache.CacheKey); err != nil {
				return removed, err
			}
			klog.FromContext(ctx).Info("Cache removed", keyCache, cache.CacheKey, keyBytes, humanize.IBytes(uint64(cache.Bytes)))
		}
		total -= cache.Bytes
		removed += cache.Bytes
		count--
	}
	if removed == 0 || dryRun {
		return removed, nil
	}
	return removed, s.config.Uppers.Sweep(ctx)
}

// Reclaim removes caches that no volume uses, the least recently used first, until it has removed that many bytes. It returns how many it
// removed, or with dryRun would remove. They are in the trash then.
func (s *Store) Reclaim(ctx context.Context, bytes int64, dryRun bool) (int64, error) {
	return s.collect(ctx, bytes, dryRun)
}
