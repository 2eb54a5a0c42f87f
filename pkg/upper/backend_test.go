package upper_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	utilexec "k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/upper/uppertest"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// newDataRoot mounts a file system of that name. It skips where this kernel has no quotas, which is proved by the mount
// that it refuses.
func newDataRoot(t *testing.T, name string) *os.File {
	t.Helper()
	if name == "tmpfs" {
		return open(t, mountAt(t, "tmpfs"))
	}
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	if err := drivertest.MakeImage(name, image, 2<<30, ""); err != nil {
		t.Skipf("no %s can be made here: %v", name, err)
	}
	if err := drivertest.MountImage(name, image, dir); err != nil {
		t.Skipf("this kernel does not mount %s: %v", name, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return open(t, dir)
}

func newBackends(t *testing.T, root *os.File) *upper.Backends {
	t.Helper()
	return newBackendsAt(t, root, t.TempDir())
}

func newBackendsAt(t *testing.T, root *os.File, mountDir string) *upper.Backends {
	t.Helper()
	return upper.NewBackends(upper.Config{
		Root: root, MountDir: mountDir, Discard: os.RemoveAll, Commands: utilexec.New(),
		Mounter: bindMounter{}, InUse: func(upper.LockHolder) (upper.PodVolumePath, bool) { return upper.PodVolumePath{}, true },
	})
}

// backends are all backends, and where each is tried.
var backends = []struct {
	root    string
	backend upper.Backend
	traits  uppertest.Backend
}{
	{"tmpfs", upper.Directory, uppertest.Backend{}},
	{"ext4", upper.Directory, uppertest.Backend{}},
	{"ext4 with project quota", upper.ProjectQuota, uppertest.Backend{Limited: true, LimitsInodes: true}},
	{"xfs with project quota", upper.ProjectQuota, uppertest.Backend{Limited: true, LimitsInodes: true}},
	{"btrfs with quota", upper.BtrfsQgroup, uppertest.Backend{Limited: true}},
	{"ext4", upper.DiskImage, uppertest.Backend{Limited: true, LimitsInodes: true}},
	{"tmpfs", upper.DiskImage, uppertest.Backend{Limited: true, LimitsInodes: true}},
	{"tmpfs", upper.Tmpfs, uppertest.Backend{Limited: true, LimitsInodes: true, InMemory: true}},
	{"tmpfs", upper.PodVolume, uppertest.Backend{PodOwned: true}},
	{"ext4", upper.PodVolume, uppertest.Backend{PodOwned: true}},
}

func TestBackends(t *testing.T) {
	for _, c := range backends {
		t.Run(string(c.backend)+" on "+c.root, func(t *testing.T) {
			root := newDataRoot(t, c.root)
			open := newBackends(t, root)
			need := upper.Requirements{Accepted: []upper.Backend{c.backend}}
			if c.traits.Limited {
				need.Bytes = uppertest.Size
			}
			if _, err := open.Choose(need); err != nil {
				t.Fatal(err)
			}
			n := 0
			suite := c.traits
			suite.New = func(t *testing.T) upper.Upper {
				n++
				return newUpper(t, open, root, upper.Location{
					Backend: c.backend, Base: fmt.Sprint("base-", n), Limit: upper.LimitOf(need.Bytes), Ephemeral: n%2 == 0,
				})
			}
			uppertest.Run(t, suite)
		})
	}
}

// TestDiscardIsCutOff: what a Discard that ended half-way leaves of an upper is either there to be discarded again, or not in the way
// of a new one. The kernel refuses a new view whose work directory has the mark of a volatile one.
func TestDiscardIsCutOff(t *testing.T) {
	root := newDataRoot(t, "tmpfs")
	var discarded int
	errCutOff := errors.New("the process was killed")
	backends := upper.NewBackends(upper.Config{Root: root, MountDir: t.TempDir(), Commands: utilexec.New(), Discard: func(path string) error {
		if discarded++; discarded > 1 {
			return errCutOff
		}
		return os.RemoveAll(path)
	}})
	u := newUpper(t, backends, root, upper.Location{Backend: upper.Directory, Base: "base", Ephemeral: true})
	prepare := func() upper.Dirs {
		dirs, err := u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
		if err != nil {
			t.Fatal(err)
		}
		dirs.Close()
		return dirs
	}
	prepare()
	_, work := u.Paths()
	mark := filepath.Join(work, "work", "incompat", "volatile")
	if err := os.MkdirAll(mark, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := u.Discard(t.Context()); !errors.Is(err, errCutOff) {
		t.Fatalf("Discard = %v, want that it is cut off", err)
	}
	if _, err := os.Stat(mark); !prepare().Existed && err == nil {
		t.Error("the upper is new, and its work directory has the mark of the view before")
	}
}

// newUpper opens an absent upper. Its base directory is there, as that of a volume is, which has the record. It stands for the other
// volume of a pod-volume.
func newUpper(t *testing.T, open *upper.Backends, root *os.File, at upper.Location) upper.Upper {
	t.Helper()
	base := filepath.Join(root.Name(), at.Base)
	if err := os.Mkdir(base, 0o700); err != nil {
		t.Fatal(err)
	}
	if at.Backend == upper.PodVolume {
		at.PodVolume = upper.PodVolumePath{Volume: base, Path: "a/b"}
		at.Holder = upper.LockHolder{Node: "n", BootID: "b", VolumeID: "v", Target: "/t"}
		at.Layers = []string{"dir://m/a"}
	}
	u := open.Open(at)
	t.Cleanup(func() {
		if err := u.Release(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return u
}

func TestChoose(t *testing.T) {
	plain := newBackends(t, newDataRoot(t, "tmpfs"))
	for name, c := range map[string]struct {
		need upper.Requirements
		want upper.Backend
	}{
		"no size":    {upper.Requirements{}, upper.Directory},
		"size":       {upper.Requirements{Bytes: 1 << 30}, upper.DiskImage},
		"unenforced": {upper.Requirements{Bytes: 1 << 30, Unenforced: true}, upper.Directory},
		"memory":     {upper.Requirements{Bytes: 1 << 30, Accepted: []upper.Backend{upper.Tmpfs}}, upper.Tmpfs},
		"pod volume": {upper.Requirements{Accepted: []upper.Backend{upper.PodVolume}}, upper.PodVolume},
	} {
		t.Run(name, func(t *testing.T) {
			if backend, err := plain.Choose(c.need); err != nil || backend != c.want {
				t.Errorf("%q, %v; want %q", backend, err, c.want)
			}
		})
	}
	quotas := upper.Requirements{Bytes: 1 << 30, Accepted: []upper.Backend{upper.ProjectQuota, upper.BtrfsQgroup}}
	_, err := plain.Choose(quotas)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "prjquota") || !strings.Contains(err.Error(), "btrfs") {
		t.Errorf("a quota where there is none: %v, want the reason for each", err)
	}
	needs.Root(t)
	btrfs := newBackends(t, newDataRoot(t, "btrfs with quota"))
	if backend, err := btrfs.Choose(quotas); err != nil || backend != upper.BtrfsQgroup {
		t.Errorf("%q, %v; want %q", backend, err, upper.BtrfsQgroup)
	}
}
