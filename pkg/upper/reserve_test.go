package upper_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// TestReserveFindsHoles: an image that takes as much of the disk as it is long may have holes all the same, because it takes blocks for
// the list of its blocks too. On a full disk, what a pod writes to the holes would be lost.
func TestReserveFindsHoles(t *testing.T) {
	const size, block = 16 << 20, 4 << 10
	for _, name := range []string{"ext4", "xfs"} {
		t.Run(name, func(t *testing.T) {
			disk, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
			if err := errors.Join(drivertest.MakeImage(name, disk, 320<<20, ""), drivertest.MountImage(name, disk, dir)); err != nil {
				t.Skipf("no %s here: %v", name, err)
			}
			t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
			check := func(err error) {
				if err != nil {
					t.Helper()
					t.Fatal(err)
				}
			}
			root := open(t, dir)
			u := newUpper(t, newBackends(t, root), root, upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(size)})
			prepare := func() error {
				dirs, err := u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
				if err == nil {
					dirs.Close()
				}
				return err
			}
			check(errors.Join(prepare(), u.Release(t.Context())))
			path := filepath.Join(dir, "base/disk.img")
			image, err := os.OpenFile(path, os.O_RDWR, 0)
			check(err)
			// As pods write, here and there.
			data := make([]byte, block)
			for at := int64(0); at < size; at += 2 * block {
				_, err := image.ReadAt(data, at)
				check(err)
				_, err = image.WriteAt(data, at)
				check(err)
			}
			check(errors.Join(image.Sync(), image.Close()))
			// On a full disk it could not be made.
			check(os.WriteFile(filepath.Join(dir, "filler 2"), nil, 0o600))
			check(drivertest.FillUp(filepath.Join(dir, "filler")))
			if err := errors.Join(prepare(), u.Release(t.Context())); err != nil {
				t.Errorf("Prepare of an image with all of its blocks on a full disk: %v", err)
			}
			image, err = os.OpenFile(path, os.O_RDWR, 0)
			check(err)
			check(unix.Fallocate(int(image.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, size-2*block, block))
			check(drivertest.FillUp(filepath.Join(dir, "filler 2")))
			stat, err := linux.StatFile(image)
			check(errors.Join(err, image.Close()))
			if err := prepare(); !errors.Is(err, unix.ENOSPC) && !errdefs.IsResourceExhausted(err) {
				t.Errorf("Prepare of an image of %d bytes that takes %d, with a hole of %d, on a full disk: %v, want ENOSPC",
					size, stat.DiskBytes(), block, err)
			}
		})
	}
}

// sharedImage makes a disk image of so many bytes on an xfs, and a copy that shares its blocks (cp --reflink).
func sharedImage(t *testing.T, size int64) (u upper.Upper, dir, clone string) {
	t.Helper()
	disk, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := errors.Join(drivertest.MakeImage("xfs", disk, 320<<20, ""), drivertest.MountImage("xfs", disk, dir)); err != nil {
		t.Skipf("no xfs here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	root := open(t, dir)
	u = newUpper(t, newBackends(t, root), root, upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(size)})
	prepareAndClose(t, u)
	if err := u.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	clone = filepath.Join(dir, "clone")
	if output, err := exec.Command("cp", "--reflink=always", filepath.Join(dir, "base/disk.img"), clone).CombinedOutput(); err != nil {
		t.Skipf("this xfs shares no blocks: %v: %s", err, output)
	}
	return u, dir, clone
}

// TestSharedBlocksAreReserved: what is written to blocks that an image shares with a copy takes others. They are reserved while the disk
// has them.
func TestSharedBlocksAreReserved(t *testing.T) {
	const size = 16 << 20
	u, dir, _ := sharedImage(t, size)
	prepareAndClose(t, u)
	image, err := os.Open(filepath.Join(dir, "base/disk.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	if whole, err := linux.HasAllBlocks(image, size); err != nil || !whole {
		t.Errorf("the image has blocks for all that can be written to it: %t, %v", whole, err)
	}
	if err := u.Release(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestSharedBlocksAreNotReserved: a copy of an image that shares its blocks takes blocks with each write to the image, which on a full disk
// fails.
func TestSharedBlocksAreNotReserved(t *testing.T) {
	u, dir, clone := sharedImage(t, 16<<20)
	if err := drivertest.FillUp(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	dirs, err := u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
	if err == nil {
		dirs.Close()
		err = u.Release(t.Context())
	}
	if !errors.Is(err, unix.ENOSPC) && !errdefs.IsResourceExhausted(err) {
		t.Errorf("Prepare of an image that shares its blocks, on a full disk: %v, want ENOSPC", err)
	}
	// The other name of the blocks goes, and nothing else. xfs has larger sectors for the image from then on (Linux 6.18).
	if err := os.Remove(clone); err != nil {
		t.Fatal(err)
	}
	prepareAndClose(t, u)
	if err := u.Release(t.Context()); err != nil {
		t.Error(err)
	}
}
