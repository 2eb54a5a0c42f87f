package overlay

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

func TestFeaturesWithout(t *testing.T) {
	all := Features{MountAPI: true, LayerFD: true, StatMount: true, DetachedLayer: true, IDMappedUpper: true}
	for name, test := range map[string]struct {
		without []string
		want    Features
	}{
		"nothing": {nil, all},
		"what nothing needs": {[]string{"statmount"}, Features{MountAPI: true, LayerFD: true, DetachedLayer: true,
			IDMappedUpper: true}},
		"what another needs":             {[]string{"layer-fd"}, Features{MountAPI: true, StatMount: true, IDMappedUpper: true}},
		"what another needs by a second": {[]string{"mount-api"}, Features{StatMount: true, IDMappedUpper: true}},
		"several":                        {[]string{"statmount", "detached-layer"}, Features{MountAPI: true, LayerFD: true, IDMappedUpper: true}},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := all.Without(test.without...); err != nil || got != test.want {
				t.Errorf("got %+v, %v; want %+v", got, err, test.want)
			}
		})
	}
	const known = "detached-layer, id-mapped-upper, layer-fd, mount-api, statmount"
	if _, err := all.Without("warp"); err == nil || !strings.Contains(err.Error(), known) {
		t.Errorf("an unknown feature: %v", err)
	}
}

func TestFallbacks(t *testing.T) {
	fallbacks := Features{}.Fallbacks()
	if len(fallbacks) != len(kernelFeatures) {
		t.Errorf("%d features, %d fallbacks", len(kernelFeatures), len(fallbacks))
	}
	all := Features{MountAPI: true, LayerFD: true, StatMount: true, DetachedLayer: true, IDMappedUpper: true}
	if fallbacks := all.Fallbacks(); len(fallbacks) > 0 {
		t.Errorf("fallbacks where nothing is missing: %q", fallbacks)
	}
	if got := all.String(); got != strings.Join(FeatureNames(), ",") {
		t.Errorf("all features are %s", got)
	}
}

// TestFeatureTable: every feature says what it is, and older features, which others need, come after newer ones.
func TestFeatureTable(t *testing.T) {
	newer := [2]int{99, 0}
	for i, feature := range kernelFeatures {
		t.Run(feature.Name, func(t *testing.T) {
			if feature.What == "" || feature.Fallback == "" {
				t.Error("it has no description")
			}
			since := parseVersion(t, feature.Since)
			if olderThan(newer, since) {
				t.Errorf("Linux %s stands after an older one", feature.Since)
			}
			newer = since
			for _, needed := range feature.Needs {
				found := false
				for _, later := range kernelFeatures[i+1:] {
					found = found || later.Name == needed
				}
				if !found {
					t.Errorf("%s, which it needs, does not stand after it", needed)
				}
			}
		})
	}
}

// TestKernelHasItsFeatures: a kernel that is new enough for a feature has it.
func TestKernelHasItsFeatures(t *testing.T) {
	needs.Root(t)
	for _, feature := range kernelFeatures {
		t.Run(feature.Name, func(t *testing.T) { requireFeature(t, feature.Name) })
	}
}

// requireFeature skips a test on a kernel that lacks a feature, with the proof: what the kernel answered. On one that is new enough
// the test fails.
func requireFeature(t *testing.T, name string) {
	t.Helper()
	needs.Root(t)
	p, err := newProber(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	major, minor, err := linux.KernelVersion()
	if err != nil {
		t.Fatal(err)
	}
	for _, feature := range kernelFeatures {
		if feature.Name != name {
			continue
		}
		err := feature.probe(p)
		switch {
		case err == nil:
			return
		case olderThan([2]int{major, minor}, parseVersion(t, feature.Since)):
			t.Skipf("Linux %d.%d lacks %s (Linux %s): %v", major, minor, name, feature.Since, err)
		}
		t.Fatalf("Linux %d.%d should have %s (Linux %s): %v", major, minor, name, feature.Since, err)
	}
	t.Fatalf("unknown feature %s", name)
}

func parseVersion(t *testing.T, text string) (version [2]int) {
	t.Helper()
	major, minor, err := linux.ParseKernelVersion(text)
	if err != nil {
		t.Fatal(err)
	}
	return [2]int{major, minor}
}

func olderThan(a, b [2]int) bool { return a[0] < b[0] || a[0] == b[0] && a[1] < b[1] }

// TestProbeOnAFullDisk: what the kernel can do does not depend on the disk, and what a crash of a probe left mounted is no obstacle. A
// kernel that takes a detached mount takes an attached one too, as the older ones want it.
func TestProbeOnAFullDisk(t *testing.T) {
	needs.Root(t)
	dir := tmpfs(t)
	want, err := Probe(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "nr_inodes=3"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir+"/more", 0o755); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	p, err := newProber(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	detached := func() *os.File {
		t.Helper()
		clone, err := linux.OpenTree(p.dir, "")
		if err == nil {
			err = linux.MountSetattr(clone, linux.MountChange{Private: true})
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { clone.Close() })
		return clone
	}
	if err := p.attachedLayer(detached()); err != nil {
		t.Errorf("an overlay of layers on an attached mount: %v", err)
	}
	for _, name := range probeNames {
		if err := attach(detached(), open(t, filepath.Join(dir, name))); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := Probe(dir); err != nil || got != want {
		t.Errorf("on a full disk, after a crash: %+v, %v; want %+v", got, err, want)
	}
	for _, name := range probeNames {
		if mounted, err := linux.IsMountPoint(filepath.Join(dir, name)); err != nil || mounted {
			t.Errorf("%s is left mounted (%v)", name, err)
		}
	}
}
