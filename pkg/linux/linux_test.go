package linux

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestWriteFileAtomic(t *testing.T) {
	for name, prepare := range map[string]func(dir string) error{
		"nothing is there":  func(string) error { return nil },
		"there is an older": func(dir string) error { return os.WriteFile(filepath.Join(dir, "file"), []byte("old"), 0o600) },
		"a crash left one": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "file.new"), bytes.Repeat([]byte("torn"), 100), 0o600)
		},
		"a link stands in the way": func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "file.new")) },
	} {
		t.Run(name, func(t *testing.T) {
			path := t.TempDir()
			must(t, prepare(path))
			for _, sync := range []bool{false, true} {
				must(t, WriteFileAtomic(openDir(t, path), "file", []byte("content"), sync))
				data, err := os.ReadFile(filepath.Join(path, "file"))
				if err != nil || string(data) != "content" {
					t.Errorf("it reads %q: %v", data, err)
				}
			}
			if info, err := os.Lstat(filepath.Join(path, "file")); err != nil || info.Mode() != 0o600 {
				t.Errorf("its mode is %v: %v", info.Mode(), err)
			}
			if _, err := os.Lstat(filepath.Join(path, "file.new")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("file.new is left: %v", err)
			}
		})
	}
}

// TestWriteFileAtomicOnAFullDisk: what was there stays as it was, and nothing is left of what did not fit.
func TestWriteFileAtomicOnAFullDisk(t *testing.T) {
	needs.Root(t)
	path := t.TempDir()
	must(t, Mount("tmpfs", path, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { _ = UnmountLazily(path) })
	dir := openDir(t, path)
	must(t, WriteFileAtomic(dir, "file", []byte("old"), true))
	if err := WriteFileAtomic(dir, "file", make([]byte, 1<<20), true); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a file larger than the disk: %v", err)
	}
	entries, err := os.ReadDir(path)
	if err != nil || len(entries) != 1 {
		t.Errorf("the directory has %v: %v", entries, err)
	}
	if data, err := os.ReadFile(filepath.Join(path, "file")); err != nil || string(data) != "old" {
		t.Errorf("it reads %q: %v", data, err)
	}
}

// TestHandlesOfOPath: attributes and the mode can be changed through a handle of O_PATH.
func TestHandlesOfOPath(t *testing.T) {
	needs.Root(t)
	path := filepath.Join(t.TempDir(), "dir")
	must(t, os.Mkdir(path, 0o755))
	dir := openDir(t, path)
	must(t, SetXattr(dir, "trusted.test", bytes.Repeat([]byte("x"), 300)))
	if value, err := GetXattr(dir, "trusted.test"); err != nil || len(value) != 300 {
		t.Errorf("%d bytes: %v", len(value), err)
	}
	if _, err := GetXattr(dir, "trusted.other"); !errors.Is(err, syscall.ENODATA) {
		t.Errorf("an attribute that is not there: %v", err)
	}
	must(t, Fchmodat(dir, "", 0o2770))
	must(t, Fchownat(dir, "", 1000, 2000))
	stat, err := StatFile(dir)
	if err != nil || stat.Perm() != 0o2770 || stat.Uid != 1000 || stat.Gid != 2000 || !stat.IsDir() {
		t.Errorf("mode %o, owner %d:%d: %v", stat.Perm(), stat.Uid, stat.Gid, err)
	}
	must(t, SyncDir(dir))
	must(t, SyncFS(dir))
}

// TestTimes: times that are no 64-bit number of nanoseconds are set as they are.
func TestTimes(t *testing.T) {
	path := t.TempDir()
	for name, at := range map[string]time.Time{
		"nanoseconds": time.Unix(1_600_000_000, 123_456_789),
		"before 1970": time.Unix(-1, 500_000_000),
		"after 2262":  time.Unix(10_000_000_000, 0),
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(path, name)
			must(t, os.WriteFile(file, nil, 0o600))
			must(t, Utimensat(nil, file, at, at))
			want, err := StatPath(file)
			must(t, err)
			handle, err := Open(nil, file, os.O_RDONLY, 0)
			must(t, err)
			defer handle.Close()
			must(t, Futimens(handle, at, at))
			got, err := StatFile(handle)
			if err != nil || got.Mtim != want.Mtim || got.Mtim.Sec != at.Unix() && at.Unix() < 1<<33 {
				t.Errorf("%+v instead of %+v: %v", got.Mtim, at, err)
			}
		})
	}
}

func TestMountStat(t *testing.T) {
	needs.Root(t)
	path := t.TempDir()
	if mounted, err := IsMountPoint(path); err != nil || mounted {
		t.Errorf("a plain directory is a mount point: %v", err)
	}
	if mounted, err := IsMountPoint(filepath.Join(path, "missing")); err != nil || mounted {
		t.Errorf("a missing directory is a mount point: %v", err)
	}
	must(t, Mount("tmpfs", path, "tmpfs", 0, "size=64k,nr_inodes=16"))
	t.Cleanup(func() { _ = UnmountLazily(path) })
	root := openDir(t, path)
	stat, err := StatMount(root, "")
	must(t, err)
	plain, err := StatFile(root)
	must(t, err)
	if !stat.IsRoot || stat.ID != plain.ID() {
		t.Errorf("%+v of a mount's root whose ID is %+v", stat, plain.ID())
	}
	if stat.Unique {
		status, err := Statmount(stat.MountID)
		magic, errAsked := FileSystemMagic(root)
		if err != nil || errAsked != nil || status.Magic != magic {
			t.Errorf("statmount: %#x, %v; fstatfs: %#x, %v", status.Magic, err, magic, errAsked)
		}
	}
	usage, err := FileSystemUsage(root)
	if err != nil || usage.Bytes.Total != 64<<10 || usage.Inodes.Total != 16 || usage.Bytes.Usable() != 64<<10 {
		t.Errorf("%+v: %v", usage, err)
	}
	must(t, DetachFile(root))
	if mounted, err := IsMountPoint(path); err != nil || mounted {
		t.Errorf("it is still mounted: %v", err)
	}
}

// TestFSContextError: the kernel's own message is in the error.
func TestFSContextError(t *testing.T) {
	needs.Root(t)
	context, err := Fsopen("tmpfs")
	must(t, err)
	defer context.Close()
	err = context.SetString("size", "large")
	refused, ok := errors.AsType[*FSContextError](err)
	if !ok || refused.Key != "size" || refused.Value != "large" || len(refused.Messages) == 0 || !errors.Is(err, unix.EINVAL) {
		t.Errorf("%#v", err)
	}
	if _, err := Fsopen("no-such-type"); !errors.Is(err, syscall.ENODEV) {
		t.Errorf("an unknown file system: %v", err)
	}
}

// TestFlockHolderAmongManyLocks: a pod can have any number of locks, and the table of them is not kept in memory.
func TestFlockHolderAmongManyLocks(t *testing.T) {
	dir := t.TempDir()
	file, err := os.Create(filepath.Join(dir, "locked"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	const locks = 8000
	for i := range int64(locks) {
		// Locks of neighbouring bytes would be one.
		lock := unix.Flock_t{Type: unix.F_WRLCK, Start: 2 * i, Len: 1}
		if err := unix.FcntlFlock(file.Fd(), unix.F_SETLK, &lock); err != nil {
			t.Fatal(err)
		}
	}
	held, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := Flock(held); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	pid, err := FlockHolder(held)
	runtime.ReadMemStats(&after)
	if err != nil || pid != os.Getpid() {
		t.Errorf("process %d, %v; want %d", pid, err, os.Getpid())
	}
	if took := after.TotalAlloc - before.TotalAlloc; took > 128<<10 {
		t.Errorf("%d bytes of memory for %d locks", took, locks)
	}
}

// TestRevalidate: what the file system answers is what stat(2) returns.
func TestRevalidate(t *testing.T) {
	for _, path := range []string{t.TempDir(), "/", "/dev", "/proc/self"} {
		dir, err := OpenDir(path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		stat, err := StatFile(dir)
		if err != nil {
			t.Fatal(err)
		}
		id, fingerprint, err := Revalidate(dir)
		if err != nil || id != stat.ID() || fingerprint != stat.Fingerprint() {
			t.Errorf("%s: %v, %s, %v, and fstat says %v, %s", path, id, fingerprint, err, stat.ID(), stat.Fingerprint())
		}
	}
}
