package record

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

const (
	// cacheVersion is raised when an earlier driver could misread what this one writes.
	cacheVersion = 1
	// maxCacheRecord is the maximum size of a record in bytes. Those of the most frozen uppers are far below it.
	maxCacheRecord = 1 << 20
)

// CacheKey names a cache: a namespace of the cluster, and a name in it.
type CacheKey struct{ Namespace, Name string }

func (k CacheKey) String() string { return k.Namespace + "/" + k.Name }

// Check returns ErrInvalidArgument if the key cannot name a cache: both parts become names of directories.
func (k CacheKey) Check() error {
	if !reference.IsName(k.Namespace) || !reference.IsName(k.Name) {
		return fmt.Errorf("%w: %q is not NAMESPACE/NAME of a cache; both have lower-case letters, digits, '-' and '.'",
			errdefs.ErrInvalidArgument, k.String())
	}
	return nil
}

// Cache is what a cache of a node consists of.
type Cache struct {
	Version   int    `json:"version"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// Generation counts the commits.
	Generation int64 `json:"generation"`
	// Versions are the frozen uppers that the newest version consists of, the topmost first.
	Versions []CacheVersion `json:"versions"`
	// BootID is set until Versions have been written to the disk. In another boot of the node than that, the cache is what Before says:
	// the versions that had been written.
	BootID string         `json:"bootID,omitempty"`
	Before []CacheVersion `json:"before,omitempty"`
	// LastUsed is when a volume used the cache last, or became a version of it. It is the time of the file, and not in it.
	LastUsed time.Time `json:"-"`
}

// CacheVersion is one frozen upper of a cache.
type CacheVersion struct {
	Frozen
	// Bytes is what it takes of the disk.
	Bytes int64 `json:"bytes"`
}

// Key returns the name of the cache.
func (c *Cache) Key() CacheKey { return CacheKey{c.Namespace, c.Name} }

// Bytes returns what the newest version takes of the disk.
func (c *Cache) Bytes() (sum int64) {
	for _, version := range c.Versions {
		sum += version.Bytes
	}
	return sum
}

// Frozen returns the frozen uppers that the newest version consists of, the topmost first.
func (c *Cache) Frozen() []Frozen { return frozenOf(c.Versions) }

func frozenOf(versions []CacheVersion) []Frozen {
	frozen := make([]Frozen, len(versions))
	for i, version := range versions {
		frozen[i] = version.Frozen
	}
	return frozen
}

// InBoot returns the cache as it is in a boot of the node: what had not been written to the disk before another boot is lost.
func (c *Cache) InBoot(id string) *Cache {
	if c.BootID == "" || c.BootID == id {
		return c
	}
	written := *c
	written.Versions, written.Before, written.BootID = c.Before, nil, ""
	return &written
}

// Caches has the records of the caches of a data root. Its methods may be called concurrently, except for Save and Remove of one cache.
type Caches struct{ dir string }

// Caches returns the records of the caches in the same data root.
func (s *Store) Caches() *Caches { return &Caches{filepath.Join(filepath.Dir(s.dir), dataroot.Caches)} }

// Dir returns the directory of a cache.
func (c *Caches) Dir(key CacheKey) string { return filepath.Join(c.dir, key.Namespace, key.Name) }

func (c *Caches) path(key CacheKey) string { return filepath.Join(c.Dir(key), dataroot.CacheRecord) }

// Load reads the record of a cache. It returns ErrNotFound if there is none, and ErrDamaged if it cannot be used: no pod loses what it
// wrote with a cache.
func (c *Caches) Load(key CacheKey) (*Cache, error) {
	if err := key.Check(); err != nil {
		return nil, err
	}
	file, err := linux.Open(nil, c.path(key), os.O_RDONLY|linux.O_NOFOLLOW|linux.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, fmt.Errorf("%w: cache %s does not exist on this node", errdefs.ErrNotFound, key)
	}
	if errors.Is(err, syscall.ELOOP) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read the record of cache %s: %w", key, err)
	}
	defer file.Close()
	cache, err := decodeCache(file)
	if err != nil {
		return nil, fmt.Errorf("read the record of cache %s: %w", key, err)
	}
	if cache.Version != cacheVersion || cache.Key() != key {
		return nil, fmt.Errorf("read the record of cache %s: %w: %s has version %d and cache %s; this driver reads version %d",
			key, ErrDamaged, file.Name(), cache.Version, cache.Key(), cacheVersion)
	}
	return cache, nil
}

func decodeCache(file *os.File) (*Cache, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxCacheRecord {
		return nil, fmt.Errorf("%w: %s is no file of at most %d bytes", ErrDamaged, file.Name(), maxCacheRecord)
	}
	data, err := io.ReadAll(file)
	if err != nil {
		return nil, err
	}
	cache := &Cache{LastUsed: info.ModTime()}
	if err := json.Unmarshal(data, cache); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrDamaged, file.Name(), err)
	}
	return cache, nil
}

// Save writes the record of a cache. It is on the disk when Save returns.
func (c *Caches) Save(cache *Cache) error {
	if err := c.write(cache); err != nil {
		return fmt.Errorf("write the record of cache %s: %w", cache.Key(), err)
	}
	return nil
}

func (c *Caches) write(cache *Cache) error {
	if err := cache.Key().Check(); err != nil {
		return err
	}
	cache.Version = cacheVersion
	data, err := json.Marshal(cache)
	if err != nil {
		return err
	}
	path := c.Dir(cache.Key())
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	dir, err := linux.OpenDir(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := linux.WriteFileAtomic(dir, dataroot.CacheRecord, data, true); err != nil {
		return err
	}
	return errors.Join(linux.SyncDir(dir), linux.SyncPath(filepath.Dir(path)), linux.SyncPath(c.dir))
}

// Use notes that a volume uses a cache. What is noted may be lost in a power cut.
func (c *Caches) Use(key CacheKey, now time.Time) error { return os.Chtimes(c.path(key), now, now) }

// Remove removes a cache, by discard, which moves a directory to the trash. It returns nil if there is none. The frozen uppers stay.
func (c *Caches) Remove(key CacheKey, discard func(path string) error) error {
	if err := key.Check(); err != nil {
		return err
	}
	namespace := filepath.Dir(c.Dir(key))
	err := discard(c.Dir(key))
	if err == nil {
		err = linux.SyncPath(namespace)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove cache %s: %w", key, err)
	}
	// It fails if there are others.
	_ = os.Remove(namespace)
	return nil
}

// List returns the names of all caches that have a directory, in order.
func (c *Caches) List() ([]CacheKey, error) {
	namespaces, err := readNames(c.dir)
	if err != nil {
		return nil, err
	}
	var keys []CacheKey
	for _, namespace := range namespaces {
		names, err := readNames(filepath.Join(c.dir, namespace))
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			keys = append(keys, CacheKey{namespace, name})
		}
	}
	return slices.DeleteFunc(keys, func(key CacheKey) bool { return key.Check() != nil }), nil
}

func readNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	// A file that is no directory of caches has none: it must not keep the others from being collected.
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		return nil, fmt.Errorf("list caches: %w", err)
	}
	names := make([]string, len(entries))
	for i, entry := range entries {
		names[i] = entry.Name()
	}
	return names, nil
}

// CacheUser is how a cache is named among volumes. No volume has that ID.
func CacheUser(key CacheKey) string { return dataroot.Caches + "/" + key.String() }

// addFrozen adds the frozen uppers that the caches list. A record that is damaged lists none.
func (c *Caches) addFrozen(listed map[string][]string) error {
	keys, err := c.List()
	if err != nil {
		return err
	}
	for _, key := range keys {
		cache, err := c.Load(key)
		if errdefs.IsNotFound(err) || errors.Is(err, ErrDamaged) {
			continue
		}
		if err != nil {
			return fmt.Errorf("find the frozen uppers of caches: %w", err)
		}
		for _, frozen := range frozenOf(slices.Concat(cache.Versions, cache.Before)) {
			listed[frozen.ID] = append(listed[frozen.ID], CacheUser(key))
		}
	}
	return nil
}
