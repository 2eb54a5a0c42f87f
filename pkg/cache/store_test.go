package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// fakeUppers has no frozen uppers but in records.
type fakeUppers struct {
	gone  map[string]bool
	swept int
	// merged and into are of the last merge. mergeError is what one returns.
	merged     []string
	into       string
	mergeError error
}

func (f *fakeUppers) CheckFrozen(_ upper.Backend, id string) error {
	if f.gone[id] {
		return errdefs.ErrNotFound
	}
	return nil
}

func (f *fakeUppers) MergeFrozen(_ context.Context, _ upper.Backend, ids []string, into string, _ bool) error {
	if f.mergeError != nil {
		return f.mergeError
	}
	f.merged, f.into = ids, into
	return nil
}

func (f *fakeUppers) MeasureFrozen(context.Context, upper.Backend, []string) (bytes, inodes int64, err error) {
	return 2, 1, nil
}
func (f *fakeUppers) DiscardFrozen(string) error { return nil }
func (f *fakeUppers) Hold() (release func())     { return func() {} }

func (f *fakeUppers) Pin(...string) (unpin func()) { return func() {} }

func (f *fakeUppers) Sweep(context.Context) error {
	f.swept++
	return nil
}

type fakeNode struct {
	t       *testing.T
	dir     string
	records *record.Store
	uppers  fakeUppers
	store   *Store
	// syncError is what a sync returns.
	syncError error
}

func newFakeNode(t *testing.T) *fakeNode {
	t.Helper()
	n := &fakeNode{t: t, dir: t.TempDir(), uppers: fakeUppers{gone: map[string]bool{}}}
	for _, name := range []string{dataroot.Volumes, dataroot.Snapshots, dataroot.Caches} {
		check(t, os.Mkdir(filepath.Join(n.dir, name), 0o700))
	}
	n.records = record.NewStore(filepath.Join(n.dir, dataroot.Volumes), n.dir, nil)
	n.boot("boot-1")
	return n
}

func (n *fakeNode) boot(id string) {
	n.store = NewStore(Config{
		BootID: id, MaxBytes: 100, Records: n.records, Uppers: &n.uppers, Discard: os.RemoveAll, Sync: func() error { return n.syncError },
	})
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func keyOf(name string) record.CacheKey { return record.CacheKey{Namespace: "ci", Name: name} }

// commit commits a version to a cache, on the versions that the cache has.
func (n *fakeNode) commit(key record.CacheKey, id string, bytes int64) error {
	n.t.Helper()
	below, err := n.store.Newest(n.t.Context(), key)
	check(n.t, err)
	version := record.CacheVersion{Frozen: record.Frozen{ID: id, Backend: upper.Directory}, Bytes: bytes}
	generation, unlock, err := n.store.Next(key, bytes, below)
	if err != nil {
		return err
	}
	defer unlock()
	return n.store.Put(n.t.Context(), key, record.Committing{CacheVersion: version, Generation: generation}, below)
}

func (n *fakeNode) wantVersions(key record.CacheKey, want ...string) {
	n.t.Helper()
	versions, err := n.store.Newest(n.t.Context(), key)
	check(n.t, err)
	var got []string
	for _, version := range versions {
		got = append(got, version.ID)
	}
	if !slices.Equal(got, want) {
		n.t.Errorf("cache %s has %v instead of %v", key, got, want)
	}
}

func TestNewest(t *testing.T) {
	n := newFakeNode(t)
	deps := keyOf("deps")
	n.wantVersions(deps)
	check(t, n.commit(deps, "a", 1))
	check(t, n.commit(deps, "b", 1))
	n.wantVersions(deps, "b", "a")
	n.wantVersions(record.CacheKey{Namespace: "other", Name: "deps"})
	n.uppers.gone["a"] = true
	n.wantVersions(deps)
	delete(n.uppers.gone, "a")
	check(t, os.WriteFile(filepath.Join(n.dir, "caches/ci/deps/cache.json"), []byte("{"), 0o600))
	n.wantVersions(deps)
	check(t, n.commit(deps, "c", 1))
	n.wantVersions(deps, "c")
	for _, key := range []record.CacheKey{{Name: "deps"}, {Namespace: "..", Name: "deps"}, {Namespace: "ci", Name: "a/b"}} {
		if _, err := n.store.Newest(t.Context(), key); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", key, err)
		}
	}
}

// TestPutAgain: a commit that was cut off is not done again over a later one.
func TestPutAgain(t *testing.T) {
	n := newFakeNode(t)
	deps := keyOf("deps")
	version := record.Committing{CacheVersion: record.CacheVersion{Frozen: record.Frozen{ID: "first"}}}
	var unlock func()
	var err error
	version.Generation, unlock, err = n.store.Next(deps, 1, nil)
	check(t, err)
	unlock()
	check(t, n.commit(deps, "second", 1))
	unlock = n.store.Lock()
	check(t, n.store.Put(t.Context(), deps, version, nil))
	unlock()
	n.wantVersions(deps, "second")
}

func TestSettle(t *testing.T) {
	n := newFakeNode(t)
	deps := keyOf("deps")
	check(t, n.commit(deps, "a", 1))
	n.boot("boot-2")
	n.wantVersions(deps)
	check(t, n.store.round(t.Context()))
	if _, err := n.records.Caches().Load(deps); !errdefs.IsNotFound(err) {
		t.Errorf("a cache of nothing: %v", err)
	}

	check(t, n.commit(deps, "b", 1))
	check(t, n.store.round(t.Context()))
	check(t, n.commit(deps, "c", 1))
	n.syncError = errors.New("disk")
	if err := n.store.round(t.Context()); err == nil {
		t.Error("the sync did not fail")
	}
	check(t, n.commit(deps, "d", 1))
	n.wantVersions(deps, "d", "c", "b")
	n.boot("boot-3")
	n.wantVersions(deps, "b")
	n.syncError = nil
	check(t, n.store.round(t.Context()))
	check(t, n.commit(deps, "e", 1))
	check(t, n.store.round(t.Context()))
	n.boot("boot-4")
	n.wantVersions(deps, "e", "b")
}

func TestCollect(t *testing.T) {
	n := newFakeNode(t)
	for i, name := range []string{"a", "b", "c"} {
		check(t, n.commit(keyOf(name), name, 40))
		used := time.Unix(int64(1000+i), 0)
		check(t, n.records.Caches().Use(keyOf(name), used))
	}
	check(t, n.records.Save(&record.Record{ID: "v", Caches: map[string][]record.CacheVersion{"a": {{Frozen: record.Frozen{ID: "a"}}}}}))
	if removed, err := n.store.collect(t.Context(), 0, true); err != nil || removed != 40 {
		t.Errorf("would remove %d, %v", removed, err)
	}
	check(t, n.store.round(t.Context()))
	n.wantCaches("a", "c")
	if removed, err := n.store.Reclaim(t.Context(), 1000, false); err != nil || removed != 40 {
		t.Errorf("reclaimed %d, %v", removed, err)
	}
	n.wantCaches("a")
	if err := n.commit(keyOf("huge"), "huge", 101); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a version that is too large: %v", err)
	}
	if err := n.commit(keyOf("a"), "a2", 61); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a version that is too large with what it lies on: %v", err)
	}
	check(t, n.store.Delete(t.Context(), keyOf("a")))
	n.wantCaches()
	if err := n.store.Delete(t.Context(), keyOf("a")); !errdefs.IsNotFound(err) {
		t.Errorf("deleted again: %v", err)
	}
}

func (n *fakeNode) wantCaches(want ...string) {
	n.t.Helper()
	list, err := n.store.List()
	check(n.t, err)
	var got []string
	for _, status := range list {
		got = append(got, status.Name)
	}
	if !slices.Equal(got, want) {
		n.t.Errorf("caches %v instead of %v", got, want)
	}
}

func TestTooManyVersions(t *testing.T) {
	n := newFakeNode(t)
	deps := keyOf("deps")
	for i := range MaxVersions {
		check(t, n.commit(deps, fmt.Sprint(i), 1))
	}
	if err := n.commit(deps, "more", 1); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one more version: %v", err)
	}
}

func TestMerge(t *testing.T) {
	n := newFakeNode(t)
	deps := keyOf("deps")
	for i := range mergeBeyond {
		check(t, n.commit(deps, fmt.Sprint(i), 1))
	}
	check(t, n.store.round(t.Context()))
	if n.uppers.merged != nil {
		t.Errorf("merged %v", n.uppers.merged)
	}
	check(t, n.commit(deps, "more", 1))
	n.uppers.mergeError = errors.New("disk")
	for range 2 {
		// The second time it is not tried.
		if err := n.store.round(t.Context()); err == nil && n.uppers.mergeError != nil {
			t.Error("the merge did not fail")
		}
		n.uppers.mergeError = nil
	}
	n.wantVersions(deps, "more", "7", "6", "5", "4", "3", "2", "1", "0")
	check(t, n.commit(deps, "last", 1))
	check(t, n.store.round(t.Context()))
	n.wantVersions(deps, n.uppers.into)
	if len(n.uppers.merged) != mergeBeyond+2 || n.uppers.merged[0] != "last" {
		t.Errorf("merged %v", n.uppers.merged)
	}
	if list, err := n.store.List(); err != nil || list[0].Bytes != 2 {
		t.Errorf("%+v, %v", list, err)
	}
}

// TestDamagedCacheStopsNoOther has things in place of a cache's record, and of its directory. The others are collected all the same.
func TestDamagedCacheStopsNoOther(t *testing.T) {
	for name, damage := range map[string]func(record string) error{
		"directory": func(record string) error { return os.Mkdir(record, 0o700) },
		"link":      func(record string) error { return os.Symlink("elsewhere", record) },
		"pipe":      func(record string) error { return syscall.Mkfifo(record, 0o600) },
		"too large": func(record string) error {
			return errors.Join(os.WriteFile(record, nil, 0o600), os.Truncate(record, 1<<33))
		},
		"file in place of the directory": func(record string) error {
			dir := filepath.Dir(record)
			return errors.Join(os.Remove(dir), os.WriteFile(dir, nil, 0o600))
		},
		"file in place of the namespace": func(record string) error {
			return os.WriteFile(filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(record))), "file"), nil, 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			check(t, n.commit(keyOf("good"), "id", 10))
			check(t, n.commit(keyOf("bad"), "other", 10))
			path := filepath.Join(n.records.Caches().Dir(keyOf("bad")), dataroot.CacheRecord)
			check(t, os.Remove(path))
			check(t, damage(path))
			if listed, err := n.records.FrozenInUse(); err != nil || len(listed["id"]) != 1 {
				t.Errorf("before a round: %v, %v", listed, err)
			}
			check(t, n.store.round(t.Context()))
			if n.uppers.swept == 0 {
				t.Error("nothing was swept")
			}
			n.wantVersions(keyOf("good"), "id")
			check(t, n.commit(keyOf("next"), "next", 10))
		})
	}
}
