package upper_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// TestBusyMountMovedFarDown has a pod move the directory that the busy mount is in below so many others that the path of the busy mount is
// longer than a system call takes, and its line in the mount table longer than bufio.Scanner takes. Neither the pod nor another one must
// suffer from that.
func TestBusyMountMovedFarDown(t *testing.T) {
	for _, levels := range []int{20, 300} {
		t.Run(fmt.Sprint(levels, " levels"), func(t *testing.T) {
			at := upper.PodVolumePath{Volume: mountAt(t, "tmpfs"), Path: "a/up"}
			u := podVolume(t, at, upper.LockHolder{Node: "n", BootID: "b", VolumeID: "v", Target: "/t"}, true)
			prepareAndClose(t, u)
			moveFarDown(t, at.Volume, "a", levels)

			other := upper.PodVolumePath{Volume: mountAt(t, "tmpfs"), Path: "up"}
			w := podVolume(t, other, upper.LockHolder{Node: "n", BootID: "b", VolumeID: "w", Target: "/u"}, true)
			prepareAndClose(t, w)
			if err := w.Release(t.Context()); err != nil {
				t.Errorf("release the upper of another pod: %v", err)
			}
			if err := u.Release(t.Context()); err != nil {
				t.Errorf("release the upper: %.200v", err)
			}
			for _, volume := range []string{other.Volume, at.Volume} {
				if err := unix.Unmount(volume, 0); err != nil {
					t.Errorf("kubelet cannot unmount the volume: %v", err)
				}
			}
		})
	}
}

// moveFarDown moves a directory of a volume below new ones, on a mount of the volume without what is mounted in it.
func moveFarDown(t *testing.T, volume, name string, levels int) {
	t.Helper()
	bare := t.TempDir()
	if err := unix.Mount(volume, bare, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(bare, unix.MNT_DETACH) }()
	top := open(t, bare)
	defer top.Close()
	at := top
	down := strings.Repeat("x", unix.NAME_MAX)
	for range levels {
		err := linux.Mkdirat(at, down, 0o755)
		next, openErr := linux.OpenNamed(at, down, "down")
		if err := errors.Join(err, openErr); err != nil {
			t.Fatal(err)
		}
		defer next.Close()
		at = next
	}
	if err := linux.Renameat(top, name, at, name, 0); err != nil {
		t.Fatal(err)
	}
}
