package record

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

func newStores(t *testing.T) (*Store, *Snapshots) {
	t.Helper()
	root := t.TempDir()
	for _, name := range []string{dataroot.Volumes, dataroot.Snapshots} {
		if err := os.Mkdir(filepath.Join(root, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	volumes := NewStore(filepath.Join(root, dataroot.Volumes), root, nil)
	return volumes, volumes.Snapshots()
}

func TestSnapshots(t *testing.T) {
	_, snapshots := newStores(t)
	want := &Snapshot{ID: "s", Name: "s", Volume: "v", Size: 1 << 20, Frozen: []Frozen{{ID: "f", Backend: upper.Directory}}}
	if err := snapshots.Save(want); err != nil {
		t.Fatal(err)
	}
	got, err := snapshots.Load("s")
	if err != nil || got.Volume != "v" || got.Size != want.Size || !slices.Equal(got.Frozen, want.Frozen) {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := snapshots.Load("other"); !errdefs.IsNotFound(err) {
		t.Errorf("one that does not exist: %v", err)
	}
	if ids, err := snapshots.List(); err != nil || !slices.Equal(ids, []string{"s"}) {
		t.Errorf("listed %v, %v", ids, err)
	}
	for range 2 {
		if err := snapshots.Remove("s", os.RemoveAll); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := snapshots.Load("s"); !errdefs.IsNotFound(err) {
		t.Errorf("one that was removed: %v", err)
	}
}

func TestDamagedSnapshot(t *testing.T) {
	for name, c := range map[string]struct {
		content string
		want    error
	}{
		"empty":         {"", ErrDamaged},
		"zeroes":        {strings.Repeat("\x00", 100), ErrDamaged},
		"another ID":    {`{"version":1,"id":"other"}`, errdefs.ErrFailedPrecondition},
		"later version": {`{"version":9,"id":"s"}`, errdefs.ErrFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			volumes, snapshots := newStores(t)
			if err := snapshots.Save(&Snapshot{ID: "s"}); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(snapshots.Dir("s"), dataroot.SnapshotRecord), []byte(c.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := snapshots.Load("s"); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			// Nothing is known of what it lists.
			if _, err := volumes.FrozenInUse(); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("the frozen uppers in use: %v", err)
			}
		})
	}
}

func TestFrozenInUse(t *testing.T) {
	volumes, snapshots := newStores(t)
	claim := spec.Spec{Upper: spec.UpperClaim}
	for _, err := range []error{
		volumes.Save(&Record{ID: "a", Spec: claim, Frozen: []Frozen{{ID: "1"}, {ID: "2"}}}),
		volumes.Save(&Record{ID: "b", Spec: claim, Frozen: []Frozen{{ID: "2"}}}),
		snapshots.Save(&Snapshot{ID: "a", Frozen: []Frozen{{ID: "3"}, {ID: "2"}}}),
		os.Mkdir(volumes.Dir("no-record"), 0o700),
		// What a power cut may leave of an ephemeral volume.
		os.MkdirAll(filepath.Join(volumes.Dir("upper-alone"), "upper"), 0o700),
		os.Mkdir(snapshots.Dir("no-record"), 0o700),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	got, err := volumes.FrozenInUse()
	if err != nil || len(got) != 3 || !slices.Equal(got["1"], []string{"a"}) || !slices.Equal(got["2"], []string{"a", "b", "snapshots/a"}) ||
		!slices.Equal(got["3"], []string{"snapshots/a"}) {
		t.Errorf("got %v, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(volumes.Dir("b"), dataroot.Record), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := volumes.FrozenInUse(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("with a record that cannot be read: %v", err)
	}
	for _, err := range []error{
		os.Remove(filepath.Join(volumes.Dir("b"), dataroot.Record)),
		os.Mkdir(filepath.Join(volumes.Dir("b"), "upper"), 0o700),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := volumes.FrozenInUse(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("with a persistent upper without a record: %v", err)
	}
}

// TestLayersOfSnapshots: layers that a snapshot needs are in use.
func TestLayersOfSnapshots(t *testing.T) {
	volumes, snapshots := newStores(t)
	readable, damaged := digest.FromString("readable"), digest.FromString("damaged")
	for id, layer := range map[string]digest.Digest{"readable": readable, "damaged": damaged} {
		if err := snapshots.Save(&Snapshot{ID: id, Layers: []digest.Digest{layer}}); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(snapshots.Dir("damaged"), dataroot.SnapshotRecord)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data[:len(data)-2], 0o600); err != nil {
		t.Fatal(err)
	}
	inUse, err := volumes.LayersInUse()
	if err != nil || !slices.Equal(inUse[readable], []string{"snapshots/readable"}) ||
		!slices.Equal(inUse[damaged], []string{"snapshots/damaged"}) {
		t.Errorf("got %v, %v", inUse, err)
	}
	if unreadable, err := volumes.Unreadable(); err != nil || !slices.Equal(unreadable, []string{"snapshots/damaged"}) {
		t.Errorf("unreadable: %v, %v", unreadable, err)
	}
}

// TestRecordVersions: a driver that knows no frozen uppers refuses a volume that has some, and takes any other.
func TestRecordVersions(t *testing.T) {
	volumes, _ := newStores(t)
	for want, frozen := range map[int][]Frozen{version: nil, frozenVersion: {{ID: "f"}}} {
		if err := volumes.Save(&Record{ID: "v", Spec: spec.Spec{Upper: spec.UpperClaim}, Frozen: frozen}); err != nil {
			t.Fatal(err)
		}
		if r, err := volumes.Load("v"); err != nil || r.Version != want {
			t.Errorf("%d frozen uppers: got %+v, %v; want version %d", len(frozen), r, err, want)
		}
	}
}

func TestFrozenSwaps(t *testing.T) {
	group := func(id uint32) *uint32 { return &id }
	for name, c := range map[string]struct {
		frozen *Group
		group  *uint32
		root   uint32
		// stored is a group in the frozen upper, and want the one that the view shows.
		stored, want uint32
	}{
		"no group at all":               {nil, nil, 0, 0, 0},
		"frozen with the pod's group":   {&Group{1000, 1000, 1000}, group(1000), 1000, 1000, 1000},
		"frozen with another group":     {&Group{1000, 1000, 1000}, group(2000), 1000, 1000, 2000},
		"files of the pod's group":      {&Group{1000, 1000, 1000}, group(2000), 1000, 2000, 1000},
		"other files":                   {&Group{1000, 1000, 1000}, group(2000), 1000, 33, 33},
		"frozen before it had a group":  {nil, group(2000), 5, 5, 2000},
		"frozen when it was shown so":   {&Group{3000, 1000, 1000}, nil, 1000, 1000, 3000},
		"older than its first group":    {&Group{1000, 1000, 5}, group(2000), 5, 5, 2000},
		"with the group that was shown": {&Group{3000, 1000, 1000}, group(3000), 1000, 1000, 3000},
	} {
		t.Run(name, func(t *testing.T) {
			got := c.stored
			for _, swap := range (Frozen{Group: c.frozen}).Swaps(c.group, c.root) {
				got = swap.Of(got)
			}
			if got != c.want {
				t.Errorf("group %d is shown as %d instead of %d", c.stored, got, c.want)
			}
		})
	}
	if swaps := (Frozen{Group: &Group{1000, 1000, 1000}}).Swaps(group(1000), 1000); swaps != nil {
		t.Errorf("swaps that change nothing: %v", swaps)
	}
}
