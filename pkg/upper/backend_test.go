package upper_test

import (
	"context"
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
	return upper.NewBackends(upper.Config{Root: root, MountDir: t.TempDir(), Discard: os.RemoveAll, Commands: utilexec.New()})
}

// kinds are the kinds with a limit, and where each is tried.
var kinds = []struct {
	root    string
	backend upper.Backend
	inodes  bool
}{
	{"ext4 with project quota", upper.ProjectQuota, true},
	{"xfs with project quota", upper.ProjectQuota, true},
	{"btrfs with quota", upper.BtrfsQgroup, false},
	{"ext4", upper.DiskImage, true},
	{"tmpfs", upper.DiskImage, true},
	{"tmpfs", upper.Tmpfs, true},
}

func TestKinds(t *testing.T) {
	for _, c := range kinds {
		t.Run(string(c.backend)+" on "+c.root, func(t *testing.T) {
			root := newDataRoot(t, c.root)
			backends := newBackends(t, root)
			if kind, err := backends.Choose(upper.Requirements{Bytes: uppertest.Size, Backend: c.backend}); err != nil {
				t.Fatal(kind, err)
			}
			n := 0
			place := func(t *testing.T) upper.Upper {
				n++
				base := fmt.Sprint("base-", n)
				// As the volume's directory is, which has its state.
				if err := os.Mkdir(filepath.Join(root.Name(), base), 0o700); err != nil {
					t.Fatal(err)
				}
				place := backends.Open(upper.Location{Backend: c.backend, Base: base, Limit: upper.LimitOf(uppertest.Size), Ephemeral: n%2 == 0})
				t.Cleanup(func() {
					if err := place.Release(context.WithoutCancel(t.Context())); err != nil {
						t.Error(err)
					}
				})
				return place
			}
			uppertest.RunLimited(t, c.inodes, place)
			if c.backend == upper.Tmpfs {
				return
			}
			uppertest.Run(t, func(t *testing.T) (uppertest.Prepare, func() error) {
				p := place(t)
				return p.Prepare, func() error { return p.Release(t.Context()) }
			})
		})
	}
}

func TestChoice(t *testing.T) {
	plain := newBackends(t, newDataRoot(t, "tmpfs"))
	for name, c := range map[string]struct {
		want    upper.Requirements
		backend upper.Backend
	}{
		"no size":   {upper.Requirements{}, upper.Directory},
		"size":      {upper.Requirements{Bytes: 1 << 30}, upper.DiskImage},
		"unlimited": {upper.Requirements{Bytes: 1 << 30, Unenforced: true}, upper.Directory},
		"memory":    {upper.Requirements{Bytes: 1 << 30, Backend: upper.Tmpfs}, upper.Tmpfs},
	} {
		if kind, err := plain.Choose(c.want); err != nil || kind != c.backend {
			t.Errorf("%s: %q, %v; want %q", name, kind, err, c.backend)
		}
	}
	_, err := plain.Choose(upper.Requirements{Bytes: 1 << 30, Backend: upper.ProjectQuota})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "prjquota") {
		t.Errorf("a quota where there is none: %v", err)
	}
}
