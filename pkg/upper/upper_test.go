package upper_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	utilexec "k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// mountAt mounts a file system of that type on a new directory.
func mountAt(t *testing.T, fsType string) string {
	t.Helper()
	needs.Root(t)
	dir := t.TempDir()
	if err := unix.Mount(fsType, dir, fsType, 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return dir
}

// bindMounter mounts busy mounts as the mounter does, with mount(2).
type bindMounter struct{}

func (bindMounter) AddBusyMount(dir *os.File) error {
	return unix.Mount(dir.Name(), dir.Name(), "", unix.MS_BIND, "")
}

// UpperInUse: nothing here mounts an overlay.
func (bindMounter) UpperInUse(*os.File) (bool, error) { return false, nil }

func (bindMounter) Detach(root *os.File) error {
	return unix.Unmount(linux.ProcPath(root), unix.MNT_DETACH)
}

// podVolume returns an upper in another volume. inUse says whether other holders still have their publications.
func podVolume(t *testing.T, at upper.PodVolumePath, holder upper.LockHolder, inUse bool) upper.Upper {
	t.Helper()
	backends := upper.NewBackends(upper.Config{
		Root: open(t, t.TempDir()), MountDir: t.TempDir(), Commands: utilexec.New(),
		Mounter: bindMounter{}, InUse: func(upper.LockHolder) (upper.PodVolumePath, bool) { return at, inUse },
	})
	return backends.Open(upper.Location{Backend: upper.PodVolume, PodVolume: at, Holder: holder, Layers: []string{"dir://m/a"}})
}

// TestLockOfAnother is whose lock gives way. A tmpfs is of one node by its nature, a ramfs is not known to be.
func TestLockOfAnother(t *testing.T) {
	me := upper.LockHolder{Node: "n", BootID: "now", VolumeID: "mine", Target: "/mine"}
	for name, c := range map[string]struct {
		other upper.LockHolder
		alive bool
		taken bool
	}{
		"alive":           {other: upper.LockHolder{Node: "n", BootID: "now", VolumeID: "other", Target: "/other"}, alive: true},
		"gone":            {other: upper.LockHolder{Node: "n", BootID: "now", VolumeID: "other", Target: "/other"}, taken: true},
		"before reboot":   {other: upper.LockHolder{Node: "n", BootID: "then", VolumeID: "other", Target: "/other"}, alive: true, taken: true},
		"of another node": {other: upper.LockHolder{Node: "m", BootID: "x", VolumeID: "other", Target: "/other"}, alive: true, taken: true},
	} {
		t.Run(name, func(t *testing.T) {
			at := upper.PodVolumePath{Volume: mountAt(t, "tmpfs"), Path: "up"}
			dirs, err := podVolume(t, at, c.other, c.alive).Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
			if err != nil {
				t.Fatal(err)
			}
			dirs.Close()
			if c.other.BootID != me.BootID {
				// Neither outlives a reboot, nor is it on this node.
				if err := unix.Unmount(at.Volume+"/up", unix.MNT_DETACH); err != nil {
					t.Fatal(err)
				}
			}
			dirs, err = podVolume(t, at, me, c.alive).Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
			if c.taken && err != nil {
				t.Errorf("not taken over: %v", err)
			}
			if !c.taken && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("taken over, or refused for another reason: %v", err)
			}
			if err == nil {
				dirs.Close()
			}
		})
	}
}

func TestProbe(t *testing.T) {
	good := mountAt(t, "tmpfs")
	if err := upper.Probe(open(t, good)); err != nil {
		t.Errorf("tmpfs: %v", err)
	}
	entries, err := os.ReadDir(good)
	if err != nil || len(entries) != 0 {
		t.Errorf("the probe left %v, %v", entries, err)
	}
	err = upper.Probe(open(t, mountAt(t, "ramfs")))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "ramfs") || !strings.Contains(err.Error(), "trusted.overlay") {
		t.Errorf("ramfs: %v", err)
	}
}

// TestClearWorkFollowsNoLink has a pod put a link in the place of the work directory, and something else than a directory.
func TestClearWorkFollowsNoLink(t *testing.T) {
	precious := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(precious, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func(path string) error{
		"link": func(path string) error { return os.Symlink(filepath.Dir(precious), path) },
		"FIFO": func(path string) error { return unix.Mkfifo(path, 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			at := upper.PodVolumePath{Volume: mountAt(t, "tmpfs"), Path: "up"}
			work := filepath.Join(at.Volume, at.Path, "work")
			if err := errors.Join(os.Mkdir(filepath.Dir(work), 0o755), plant(work)); err != nil {
				t.Fatal(err)
			}
			me := upper.LockHolder{Node: "n", BootID: "b", VolumeID: "v", Target: "/t"}
			if err := podVolume(t, at, me, true).ClearWork(); err == nil {
				t.Error("it was cleared")
			}
			if content, err := os.ReadFile(precious); err != nil || string(content) != "precious" {
				t.Errorf("what the link leads to: %q, %v", content, err)
			}
		})
	}
}
