package upper_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// makeFrozen makes a frozen upper with a file of its own, and one that each of them has.
func makeFrozen(t *testing.T, root string, backend upper.Backend, name string, group int) (id string) {
	t.Helper()
	id = upper.NewFrozenID()
	dir := filepath.Join(root, upper.FrozenPath(backend, id))
	for _, err := range []error{
		os.MkdirAll(dir, 0o755), os.Chown(dir, 0, group),
		os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600), os.WriteFile(filepath.Join(dir, "same"), []byte(name), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return id
}

func TestMergeFrozen(t *testing.T) {
	needs.Root(t)
	for _, test := range []struct {
		backend  upper.Backend
		isApart  bool
		isLinked bool
	}{{upper.Directory, false, true}, {upper.Directory, true, false}, {upper.ProjectQuota, false, false}, {upper.BtrfsQgroup, false, true}} {
		path := t.TempDir()
		root := open(t, path)
		backends := newBackends(t, root)
		one, two := makeFrozen(t, path, test.backend, "one", 7), makeFrozen(t, path, test.backend, "two", 7)
		other := makeFrozen(t, path, test.backend, "three", 8)
		ids, merged := []string{two, one}, upper.NewFrozenID()
		if err := backends.MergeFrozen(t.Context(), test.backend, ids, merged, test.isApart); err != nil {
			t.Fatal(err)
		}
		dir, err := backends.OpenFrozen(t.Context(), test.backend, merged)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		for name, want := range map[string]string{"one": "one", "two": "two", "same": "two"} {
			if data, err := os.ReadFile(filepath.Join(linux.ProcPath(dir), name)); string(data) != want {
				t.Errorf("%s: %s is %q: %v", test.backend, name, data, err)
			}
		}
		stat, err := linux.Fstatat(dir, "one")
		if err != nil || stat.Nlink > 1 != test.isLinked {
			t.Errorf("%s, apart %t: %d links: %v", test.backend, test.isApart, stat.Nlink, err)
		}
		_, inodes, err := backends.MeasureFrozen(t.Context(), test.backend, ids)
		if err != nil || inodes != 6 {
			t.Errorf("measured %d inodes: %v", inodes, err)
		}
		// Views may show the groups of their roots exchanged.
		err = backends.MergeFrozen(t.Context(), test.backend, []string{two, other}, upper.NewFrozenID(), false)
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("other groups: %v", err)
		}
		if err := backends.DiscardFrozen(merged); err != nil {
			t.Error(err)
		}
	}
	err := newBackends(t, open(t, t.TempDir())).MergeFrozen(t.Context(), upper.DiskImage, nil, upper.NewFrozenID(), false)
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("disk images: %v", err)
	}
}
