package uppertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// What a limited backend must do. Everything is written through an overlay, as pods write.

// testBytes fills an upper, and fills it again after a removal.
func (b Backend) testBytes(t *testing.T) {
	u := b.New(t)
	view := mountView(t, u)
	written := fill(t, filepath.Join(view, "f"))
	if written > Size || written < Size*6/10 {
		t.Errorf("%d bytes went into %d", written, Size)
	}
	usage, err := u.Usage(t.Context())
	if err != nil || usage.Bytes.Used < written || usage.Bytes.Available > 1<<20 || usage.Bytes.Total > Size {
		t.Errorf("usage %+v, %v", usage.Bytes, err)
	}
	onDisk, err := u.DiskUsage(t.Context())
	if err != nil || onDisk > 2*Size {
		t.Errorf("%d bytes of the disk are used, %v", onDisk, err)
	}
	if err := os.Remove(filepath.Join(view, "f")); err != nil {
		t.Error(err)
	}
	if again := fill(t, filepath.Join(view, "f")); again < written*9/10 {
		t.Errorf("after a removal only %d bytes of %d", again, written)
	}
}

// testSmallFiles fills an upper with files of 16 KiB.
func (b Backend) testSmallFiles(t *testing.T) {
	view := mountView(t, b.New(t))
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
}

// testInodes fills an upper with empty files.
func (b Backend) testInodes(t *testing.T) {
	u := b.New(t)
	view := mountView(t, u)
	for n := range 4 * Size >> 12 {
		err := linux.Mknodat(nil, filepath.Join(view, fmt.Sprint(n)), syscall.S_IFREG|0o600, 0)
		if isFull(err) {
			usage, err := u.Usage(t.Context())
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
}

// testCopyUp writes to a file of a layer that does not fit.
func (b Backend) testCopyUp(t *testing.T) {
	lower := t.TempDir()
	large := filepath.Join(lower, "large")
	if err := os.WriteFile(large, bytesOf(2*Size), 0o644); err != nil {
		t.Fatal(err)
	}
	view := mountOn(t, b.New(t), lower)
	file, err := os.OpenFile(filepath.Join(view, "large"), os.O_WRONLY|os.O_APPEND, 0)
	if !isFull(err) {
		t.Errorf("a file of twice the limit was copied up: %v", err)
		file.Close()
	}
	if err := os.WriteFile(filepath.Join(view, "small"), []byte("x"), 0o644); err != nil {
		t.Errorf("what was copied in vain is still there: %v", err)
	}
}

// testGrow grows a full upper while a file in it is open.
func (b Backend) testGrow(t *testing.T) {
	u := b.New(t)
	view := mountView(t, u)
	file, err := os.Create(filepath.Join(view, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	before := writeUntilFull(t, file)
	if err := u.Grow(t.Context(), upper.LimitOf(3*Size)); err != nil {
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
	usage, err := u.Usage(t.Context())
	if err != nil || usage.Bytes.Total < 2*Size {
		t.Errorf("usage %+v, %v", usage.Bytes, err)
	}
}

// mountView mounts an overlay on an upper, over an empty layer.
func mountView(t *testing.T, u upper.Upper) string {
	t.Helper()
	return mountOn(t, u, t.TempDir())
}

// mountOn mounts an overlay on an upper. Both are gone when the test ends.
func mountOn(t *testing.T, u upper.Upper, lower string) string {
	t.Helper()
	dirs := mustPrepare(t, u, plain)
	view := t.TempDir()
	options := "lowerdir=" + lower + ",upperdir=" + linux.ProcPath(dirs.Upper) + ",workdir=" + linux.ProcPath(dirs.Work)
	if err := linux.Mount("overlay", view, "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	dirs.Close()
	t.Cleanup(func() {
		if err := linux.UnmountLazily(view); err != nil {
			t.Error(err)
		}
		if err := u.Release(context.WithoutCancel(t.Context())); err != nil {
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
	const capSysResource = 24
	status, readErr := os.ReadFile("/proc/self/status")
	if readErr != nil {
		t.Fatal(readErr)
	}
	_, after, _ := strings.Cut(string(status), "CapBnd:")
	bounding, parseErr := strconv.ParseUint(strings.Fields(after)[0], 16, 64)
	if parseErr != nil {
		t.Fatal(parseErr)
	}
	return bounding>>capSysResource&1 == 0 && strings.Contains(err.Error(), "Permission denied to resize")
}

func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

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
