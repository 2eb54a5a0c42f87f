package store

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// TestSlowPullsReserveLittle: a pull from a registry that sends next to nothing does not keep the disk from others.
func TestSlowPullsReserveLittle(t *testing.T) {
	needs.Root(t)
	const size = 20 << 20
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	for name, c := range map[string]struct {
		// after is the time after which the other pull comes, and rate what was received in each second until then.
		after time.Duration
		rate  int64
		// waits is set if the first pull waits for a slot, and lost if it then loses the one that it had after a minute.
		waits, lost bool
		fits        bool
	}{
		"just begun":             {time.Minute, 0, false, false, false},
		"slow":                   {10 * time.Minute, 100, false, false, true},
		"nothing received":       {10 * time.Minute, 0, false, false, true},
		"fast enough":            {10 * time.Minute, 16 << 10, false, false, false},
		"waits for a slot":       {10 * time.Minute, 0, true, false, false},
		"waits for another slot": {10 * time.Minute, 0, true, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			root, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			synctest.Test(t, func(t *testing.T) {
				catalogue := &catalogue{layout: layout{root: root, path: dir}}
				p := &puller{
					catalogue: catalogue, parallel: 4, pulls: map[pullKey]*pull{},
					fetcher: &fetcher{catalogue: catalogue, observer: unobserved{}, fetches: map[fetchKey]*fetch{}},
				}
				begin := func(host string) *pull {
					blob := image.LayerBlob{Descriptor: ocispec.Descriptor{Digest: digest.FromString(host), Size: size}}
					begun := &pull{blobs: []image.LayerBlob{blob}, from: source{host: host}, mayUse: anyLayer}
					p.pulls[pullKey{repository: host}] = begun
					p.fetcher.fetches[fetchKeyOf(blob, begun.from)] = &fetch{clocks: []*slotClock{&begun.inSlot}}
					return begun
				}
				slow := begin("slow")
				if missing, err := p.tryReserve(slow); err != nil || missing > 0 {
					t.Fatalf("%d bytes are missing for the first pull: %v", missing, err)
				}
				if c.lost || !c.waits {
					stop := p.fetcher.runClocks(p.fetcher.fetches[fetchKeyOf(slow.blobs[0], slow.from)])
					time.Sleep(time.Minute)
					if c.lost {
						stop()
					}
				}
				time.Sleep(c.after - time.Minute)
				for _, current := range p.fetcher.fetches {
					current.received.Received.Store(c.rate * int64(c.after.Seconds()))
				}
				missing, err := p.tryReserve(begin("other"))
				if err != nil || (missing <= 0) != c.fits {
					t.Errorf("%d bytes are missing for the second pull: %v", missing, err)
				}
			})
		})
	}
}

// TestLayersSharedWithASlowPull: what a slow pull has left counts once where the next pull wants the same layers.
func TestLayersSharedWithASlowPull(t *testing.T) {
	needs.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	layer := func(name string, size int64) image.LayerBlob {
		return image.LayerBlob{Descriptor: ocispec.Descriptor{Digest: digest.FromString(name), Size: size}}
	}
	for name, c := range map[string]struct {
		host string
		fits bool
	}{"the same registry": {"registry", true}, "another registry": {"other", false}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				catalogue := &catalogue{layout: layout{root: root, path: dir}}
				p := &puller{
					catalogue: catalogue, parallel: 4, pulls: map[pullKey]*pull{},
					fetcher: &fetcher{catalogue: catalogue, observer: unobserved{}, fetches: map[fetchKey]*fetch{}},
				}
				shared := layer("shared", 20<<20)
				slow := &pull{blobs: []image.LayerBlob{shared}, from: source{host: "registry"}, mayUse: anyLayer}
				p.pulls[pullKey{repository: "slow"}] = slow
				fetching := &fetch{clocks: []*slotClock{&slow.inSlot}}
				p.fetcher.fetches[fetchKeyOf(shared, slow.from)] = fetching
				if missing, err := p.tryReserve(slow); err != nil || missing > 0 {
					t.Fatalf("%d bytes are missing for the first pull: %v", missing, err)
				}
				p.fetcher.runClocks(fetching)
				time.Sleep(10 * time.Minute)
				fetching.received.Received.Store(2 << 20)
				next := &pull{blobs: []image.LayerBlob{shared, layer("own", 10<<20)}, from: source{host: c.host}, mayUse: anyLayer}
				p.pulls[pullKey{repository: "next"}] = next
				missing, err := p.tryReserve(next)
				if err != nil || (missing <= 0) != c.fits {
					t.Errorf("%d bytes are missing for the second pull: %v", missing, err)
				}
			})
		})
	}
}

// TestRequestForInodes: a large layer on a disk that is short of inodes asks for as many as it may have, not for those of all layers.
func TestRequestForInodes(t *testing.T) {
	needs.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m,nr_inodes=10"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	for i := range 8 {
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	c := &collector{catalogue: &catalogue{layout: layout{root: root, path: dir}}}
	for size, want := range map[int64]int64{1: 1, 4 << 30: 262_145} {
		if request, err := c.requestFor(size); err != nil || request != (GCRequest{Inodes: want}) {
			t.Errorf("the request for %d bytes is %+v, want %d inodes: %v", size, request, want, err)
		}
	}
}
