package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/dustin/go-humanize"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

const (
	// MaxVersions is how many frozen uppers a cache may have. They are merged long before, unless that fails.
	MaxVersions = 64
	// maxCaches is how many caches a node keeps, so that those of nothing take no end of files.
	maxCaches = 1000
)

// Keys of log messages.
const (
	keyCache    = "cache"
	keyBytes    = "bytes"
	keyVersions = "versions"
)

// uppers are the frozen uppers of the node.
type uppers interface {
	CheckFrozen(backend upper.Backend, id string) error
	// MergeFrozen makes one of several, the topmost first, which is on the disk when it returns.
	MergeFrozen(ctx context.Context, backend upper.Backend, ids []string, into string, isApart bool) error
	MeasureFrozen(ctx context.Context, backend upper.Backend, ids []string) (bytes, inodes int64, err error)
	DiscardFrozen(id string) error
	// Sweep discards those that no record lists. It does nothing until what Hold returns is called, and leaves those that are pinned.
	Sweep(ctx context.Context) error
	Hold() (release func())
	Pin(ids ...string) (unpin func())
}

// Config configures a Store. All fields are required.
type Config struct {
	// BootID identifies the current boot of the node.
	BootID string
	// MaxBytes is how much all caches may take of the disk. What is 0 keeps none.
	MaxBytes int64
	Records  *record.Store
	Uppers   uppers
	// Discard moves a directory to the trash.
	Discard func(path string) error
	// Sync writes the file system of the data root to the disk.
	Sync func() error
}

// Store has the caches of a node.
type Store struct {
	config  Config
	records *record.Caches
	// mu is held by whoever changes the record of a cache.
	mu   sync.Mutex
	work chan struct{}
	// unmergeable has the first of versions that could not be merged. Only Run uses it.
	unmergeable map[string]bool
}

// NewStore returns the caches in a data root.
func NewStore(config Config) *Store {
	return &Store{config: config, records: config.Records.Caches(), work: make(chan struct{}, 1), unmergeable: map[string]bool{}}
}

// Newest returns the newest version of a cache, the topmost frozen upper first, or nothing where there is no cache that can be used. Until
// a record lists them, the caller keeps the frozen uppers from being swept.
func (s *Store) Newest(ctx context.Context, key record.CacheKey) ([]record.CacheVersion, error) {
	if err := key.Check(); err != nil {
		return nil, err
	}
	found, err := s.load(key)
	if err == nil {
		err = s.check(found)
	}
	if errdefs.IsNotFound(err) && len(found.Versions) == 0 {
		return nil, nil
	}
	if err != nil {
		klog.FromContext(ctx).Error(err, "A cache cannot be used", keyCache, key)
		return nil, nil
	}
	if err := s.records.Use(key, time.Now()); err != nil {
		klog.FromContext(ctx).Error(err, "Could not note that a cache is used", keyCache, key)
	}
	return found.Versions, nil
}

// load returns a cache as it is in this boot, or an empty one with the error of Load.
func (s *Store) load(key record.CacheKey) (*record.Cache, error) {
	found, err := s.records.Load(key)
	if err != nil {
		return &record.Cache{Namespace: key.Namespace, Name: key.Name}, err
	}
	return found.InBoot(s.config.BootID), nil
}

// check returns an error if a frozen upper of a cache is gone.
func (s *Store) check(found *record.Cache) error {
	for _, version := range found.Versions {
		if err := s.config.Uppers.CheckFrozen(version.Backend, version.ID); err != nil {
			return err
		}
	}
	return nil
}

// Next begins a commit: it returns the generation of a cache with a new version of that size, on those versions. The caller calls Put
// before it calls unlock. It returns ErrResourceExhausted for a version that is too large.
func (s *Store) Next(key record.CacheKey, bytes int64, below []record.CacheVersion) (generation int64, unlock func(), err error) {
	if err := key.Check(); err != nil {
		return 0, nil, err
	}
	for _, version := range below {
		bytes += version.Bytes
	}
	if bytes > s.config.MaxBytes {
		return 0, nil, fmt.Errorf("%w: it has %s with what it was written on, and all caches of the node may have %s; raise --cache-max-size",
			errdefs.ErrResourceExhausted, humanize.IBytes(uint64(bytes)), humanize.IBytes(uint64(s.config.MaxBytes)))
	}
	if len(below) >= MaxVersions {
		return 0, nil, fmt.Errorf("%w: the cache consists of %d frozen uppers, which could not be merged; delete it with overlayctl",
			errdefs.ErrResourceExhausted, len(below))
	}
	s.mu.Lock()
	found, err := s.load(key)
	if err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, record.ErrDamaged) {
		s.mu.Unlock()
		return 0, nil, err
	}
	return found.Generation + 1, s.mu.Unlock, nil
}

// Lock is Next for a commit that was begun before.
func (s *Store) Lock() (unlock func()) {
	s.mu.Lock()
	return s.mu.Unlock
}

// Put makes a frozen upper, on those versions, the newest version of a cache, unless that was done or another one was committed since. The
// caller has called Next or Lock.
func (s *Store) Put(ctx context.Context, key record.CacheKey, version record.Committing, below []record.CacheVersion) error {
	old, err := s.load(key)
	if err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, record.ErrDamaged) {
		return err
	}
	if old.Generation >= version.Generation {
		return nil
	}
	before := old.Versions
	if old.BootID != "" {
		before = old.Before
	}
	err = s.records.Save(&record.Cache{
		Namespace: key.Namespace, Name: key.Name, Generation: version.Generation, BootID: s.config.BootID, Before: before,
		Versions: append([]record.CacheVersion{version.CacheVersion}, below...),
	})
	if err != nil {
		return err
	}
	klog.FromContext(ctx).Info("Cache committed", keyCache, key, keyBytes, version.Bytes, keyVersions, len(below)+1)
	s.wake()
	return nil
}

// wake has Run do what a commit leaves to it.
func (s *Store) wake() {
	select {
	case s.work <- struct{}{}:
	default:
	}
}

// Delete deletes a cache. Views that are mounted keep it. It returns ErrNotFound if there is none.
func (s *Store) Delete(ctx context.Context, key record.CacheKey) error {
	if _, err := s.records.Load(key); err != nil && !errors.Is(err, record.ErrDamaged) {
		return err
	}
	if err := s.remove(key); err != nil {
		return err
	}
	klog.FromContext(ctx).Info("Cache deleted", keyCache, key)
	return s.config.Uppers.Sweep(ctx)
}

func (s *Store) remove(key record.CacheKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.records.Remove(key, s.config.Discard)
}
