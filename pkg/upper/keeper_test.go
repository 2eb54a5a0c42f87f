package upper_test

import (
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

func newKeeper(t *testing.T, root *os.File) *upper.Keeper {
	t.Helper()
	return upper.NewKeeper(upper.Config{Root: root, Mounts: t.TempDir(), Commands: utilexec.New()})
}

// kinds are the kinds with a limit, and where each is tried.
var kinds = []struct {
	root   string
	kind   upper.Kind
	inodes bool
}{
	{"ext4 with project quota", upper.ProjectQuota, true},
	{"xfs with project quota", upper.ProjectQuota, true},
	{"btrfs with quota", upper.BtrfsQgroup, false},
	{"ext4", upper.DiskImage, true},
	{"tmpfs", upper.DiskImage, true},
	{"tmpfs", upper.Memory, true},
}

func TestKinds(t *testing.T) {
	for _, c := range kinds {
		t.Run(string(c.kind)+" on "+c.root, func(t *testing.T) {
			root := newDataRoot(t, c.root)
			keeper := newKeeper(t, root)
			if kind, err := keeper.Choose(upper.Want{Bytes: uppertest.Size, Kind: c.kind}); err != nil {
				t.Fatal(kind, err)
			}
			n := 0
			place := func(t *testing.T) upper.Place {
				n++
				base := fmt.Sprint("base-", n)
				// As the volume's directory is, which has its state.
				if err := os.Mkdir(filepath.Join(root.Name(), base), 0o700); err != nil {
					t.Fatal(err)
				}
				place := keeper.At(c.kind, base, upper.LimitOf(uppertest.Size), n%2 == 0)
				t.Cleanup(func() {
					if err := place.Release(); err != nil {
						t.Error(err)
					}
				})
				return place
			}
			uppertest.RunLimited(t, c.inodes, place)
			if c.kind == upper.Memory {
				return
			}
			uppertest.Run(t, func(t *testing.T) (uppertest.Prepare, func() error) {
				p := place(t)
				return p.Prepare, p.Release
			})
		})
	}
}

func TestChoice(t *testing.T) {
	plain := newKeeper(t, newDataRoot(t, "tmpfs"))
	for name, c := range map[string]struct {
		want upper.Want
		kind upper.Kind
	}{
		"no size":   {upper.Want{}, upper.Directory},
		"size":      {upper.Want{Bytes: 1 << 30}, upper.DiskImage},
		"unlimited": {upper.Want{Bytes: 1 << 30, Unlimited: true}, upper.Directory},
		"memory":    {upper.Want{Bytes: 1 << 30, Kind: upper.Memory}, upper.Memory},
	} {
		if kind, err := plain.Choose(c.want); err != nil || kind != c.kind {
			t.Errorf("%s: %q, %v; want %q", name, kind, err, c.kind)
		}
	}
	_, err := plain.Choose(upper.Want{Bytes: 1 << 30, Kind: upper.ProjectQuota})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "prjquota") {
		t.Errorf("a quota where there is none: %v", err)
	}
}
