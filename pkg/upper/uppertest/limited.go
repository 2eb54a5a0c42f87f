package uppertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Size is the limit in bytes of the uppers that RunLimited is given.
const Size = 32 << 20

// RunLimited runs what every kind with a limit passes. make returns a new place with a limit of Size; withInodes says that
// the kind limits inodes too. Everything is written from inside a view, as pods write.
func RunLimited(t *testing.T, withInodes bool, make func(t *testing.T) upper.Upper) {
	t.Run("bytes", func(t *testing.T) {
		place := make(t)
		view := mountView(t, place)
		written := fill(t, filepath.Join(view, "f"))
		if written > Size || written < Size*6/10 {
			t.Errorf("%d bytes went into %d", written, Size)
		}
		usage, err := place.Usage(t.Context())
		if err != nil || usage.Bytes.Used < written || usage.Bytes.Available > 1<<20 || usage.Bytes.Total > Size {
			t.Errorf("usage %+v, %v", usage.Bytes, err)
		}
		taken, err := place.DiskUsage(t.Context())
		if err != nil || taken > 2*Size {
			t.Errorf("%d bytes taken of the disk, %v", taken, err)
		}
		if err := os.Remove(filepath.Join(view, "f")); err != nil {
			t.Error(err)
		}
		if again := fill(t, filepath.Join(view, "f")); again < written*9/10 {
			t.Errorf("after a removal only %d bytes of %d", again, written)
		}
	})
	t.Run("many small files", func(t *testing.T) {
		view := mountView(t, make(t))
		small := bytesOf(16 << 10)
		for n := range 2 * Size / len(small) {
			err := os.WriteFile(filepath.Join(view, fmt.Sprint(n)), small, 0o600)
			if isFull(err) {
				if n < 1000 {
					t.Errorf("only %d files", n)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		t.Error("there is no end")
	})
	t.Run("inodes", func(t *testing.T) {
		if !withInodes {
			t.Skip("this kind has no limit of inodes (btrfs-qgroup(8))")
		}
		place := make(t)
		view := mountView(t, place)
		for n := range 4 * Size >> 12 {
			err := unix.Mknod(filepath.Join(view, fmt.Sprint(n)), unix.S_IFREG|0o600, 0)
			if isFull(err) {
				usage, err := place.Usage(t.Context())
				if err != nil || usage.Inodes.Available > 10 || usage.Inodes.Used < int64(n) {
					t.Errorf("usage %+v after %d files, %v", usage.Inodes, n, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		t.Error("there is no end")
	})
	t.Run("copy-up of a large file", func(t *testing.T) {
		lower := t.TempDir()
		large := filepath.Join(lower, "large")
		if err := os.WriteFile(large, bytesOf(2*Size), 0o644); err != nil {
			t.Fatal(err)
		}
		view := mountOn(t, make(t), lower)
		file, err := os.OpenFile(filepath.Join(view, "large"), os.O_WRONLY|os.O_APPEND, 0)
		if !isFull(err) {
			t.Errorf("a file of twice the limit was copied up: %v", err)
			file.Close()
		}
		if err := os.WriteFile(filepath.Join(view, "small"), []byte("x"), 0o644); err != nil {
			t.Errorf("what was copied in vain is still there: %v", err)
		}
	})
	t.Run("grows while it is written to", func(t *testing.T) {
		place := make(t)
		view := mountView(t, place)
		file, err := os.Create(filepath.Join(view, "f"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		before := writeUntilFull(t, file)
		if err := place.Grow(t.Context(), upper.LimitOf(3*Size)); err != nil {
			if needsResource(t, err) {
				t.Skipf("this machine's root lacks CAP_SYS_RESOURCE, which ext4 wants of whoever makes it larger: %v", err)
			}
			t.Fatal(err)
		}
		if more := writeUntilFull(t, file); more < Size {
			t.Errorf("%d bytes went in, then %d more", before, more)
		}
		if err := file.Sync(); err != nil {
			t.Error(err)
		}
		usage, err := place.Usage(t.Context())
		if err != nil || usage.Bytes.Total < 2*Size {
			t.Errorf("usage %+v, %v", usage.Bytes, err)
		}
	})
}

// mountView mounts an overlay on a place, over an empty layer.
func mountView(t *testing.T, place upper.Upper) string {
	t.Helper()
	return mountOn(t, place, t.TempDir())
}

func mountOn(t *testing.T, place upper.Upper, lower string) string {
	t.Helper()
	dirs := mustPrepare(t, place.Prepare, plain)
	view := t.TempDir()
	options := "lowerdir=" + lower + ",upperdir=" + proc(dirs.Upper) + ",workdir=" + proc(dirs.Work)
	if err := unix.Mount("overlay", view, "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	dirs.Close()
	t.Cleanup(func() {
		if err := unix.Unmount(view, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		if err := place.Release(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return view
}

// fill writes a file until there is no room, and returns how much it took.
func fill(t *testing.T, path string) int64 {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	return writeUntilFull(t, file)
}

func writeUntilFull(t *testing.T, file *os.File) int64 {
	t.Helper()
	block := bytesOf(1 << 20)
	var written int64
	for written < 8*Size {
		n, err := file.Write(block)
		written += int64(n)
		if err == nil && written%(4<<20) == 0 {
			// btrfs counts what is on the disk.
			err = file.Sync()
		}
		if isFull(err) {
			return written
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatalf("%d bytes are in, and it is not full", written)
	return 0
}

// needsResource reports whether an error comes of a capability that root is without, as in some sandboxes.
func needsResource(t *testing.T, err error) bool {
	t.Helper()
	bounding, errno := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0)
	return errno == nil && bounding == 0 && strings.Contains(err.Error(), "Permission denied to resize")
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// bytesOf is content that no file system makes smaller.
func bytesOf(size int) []byte {
	data := make([]byte, size)
	state := uint32(1)
	for i := range data {
		state = state*1664525 + 1013904223
		data[i] = byte(state >> 24)
	}
	return data
}
