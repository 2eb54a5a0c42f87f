package overlay

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

func TestOpener(t *testing.T) {
	needs.Root(t)
	features, err := Probe(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if !features.DetachedLayer {
		t.Skip("this kernel takes no layers from detached mounts (before Linux 6.15)")
	}
	opener, err := NewOpener(features)
	if err != nil {
		t.Fatal(err)
	}
	defer opener.Close()
	onRoot, err := os.MkdirTemp("/", "overlay-csi-opener-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(onRoot) })
	dir := open(t, filepath.Join(onRoot, "dir"))
	quiet := opener.Quiet(dir)
	if quiet == nil {
		t.Fatal("no copy of a directory on the root mount")
	}
	defer quiet.Close()
	var a, b unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &a); err != nil || unix.Fstat(int(quiet.Fd()), &b) != nil || a.Ino != b.Ino || a.Dev != b.Dev {
		t.Errorf("another directory: %v, %v", a, b)
	}
	// What is mounted in the tree is not there on the copy, and does not come there.
	if err := unix.Mount("tmpfs", dir.Name(), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir.Name(), unix.MNT_DETACH) })
	if quiet := opener.Quiet(open(t, dir.Name())); quiet != nil {
		t.Error("a copy of a directory on another mount")
	}
	if mounted, err := isMountRoot(int(quiet.Fd()), ".", 0); err != nil || mounted {
		t.Errorf("a mount came to the copy: %v, %v", mounted, err)
	}
	if (&Opener{}).Quiet(dir) != nil {
		t.Error("the zero Opener has a copy")
	}
}
