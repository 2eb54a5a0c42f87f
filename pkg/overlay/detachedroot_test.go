package overlay

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

func TestDetachedRoot(t *testing.T) {
	requireFeature(t, "detached-layer")
	features, err := Probe(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	detached, err := NewDetachedRoot(features)
	if err != nil {
		t.Fatal(err)
	}
	defer detached.Close()
	onRoot, err := os.MkdirTemp("/", "overlay-csi-detached-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(onRoot) })
	dir := open(t, filepath.Join(onRoot, "dir"))
	reopened := detached.Reopen(dir)
	if reopened == nil {
		t.Fatal("no copy of a directory on the root mount")
	}
	defer reopened.Close()
	if same, err := linux.SameFile(dir, reopened); err != nil || !same {
		t.Errorf("another directory: %v", err)
	}
	// What is mounted in the tree is not there on the copy, and does not come there.
	if err := unix.Mount("tmpfs", dir.Name(), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir.Name(), unix.MNT_DETACH) })
	if reopened := detached.Reopen(open(t, dir.Name())); reopened != nil {
		t.Error("a copy of a directory on another mount")
	}
	if mounted, err := linux.IsMountRoot(reopened, ""); err != nil || mounted {
		t.Errorf("a mount came to the copy: %v, %v", mounted, err)
	}
	if (&DetachedRoot{}).Reopen(dir) != nil {
		t.Error("the zero DetachedRoot has a copy")
	}
}
