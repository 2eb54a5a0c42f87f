package uppertest

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Size is the limit in bytes of the uppers of a limited backend.
const Size = 32 << 20

// Backend is a backend under test, and what it promises beyond upper.Upper.
type Backend struct {
	// New returns a new, absent upper each time, which is released when the test ends.
	New func(t *testing.T) upper.Upper
	// Limited is set if the uppers have a limit of Size bytes, LimitsInodes if inodes are limited as well.
	Limited, LimitsInodes bool
	// InMemory is set if nothing survives Release.
	InMemory bool
	// PodOwned is set if what is in the upper belongs to the pod, and survives Discard.
	PodOwned bool
}

// Run runs the suite over a backend.
func Run(t *testing.T, b Backend) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T)
		only bool
	}{
		{"absent", b.testAbsent, true},
		{"root attributes", b.testRootAttr, true},
		{"in use", b.testInUse, true},
		{"prepared again", b.testPreparedAgain, true},
		{"released and prepared again", b.testReleased, !b.InMemory},
		{"an overlay mounts on it", b.testOverlay, true},
		{"clear the work directory", b.testClearWork, true},
		{"yielded and prepared again", b.testYield, true},
		{"discarded", b.testDiscard, true},
		{"lost", b.testLost, true},
		{"bytes", b.testBytes, b.Limited},
		{"many small files", b.testSmallFiles, b.Limited},
		{"inodes", b.testInodes, b.LimitsInodes},
		{"copy-up of a large file", b.testCopyUp, b.Limited},
		{"grown while it is written to", b.testGrow, b.Limited},
	} {
		if test.only {
			t.Run(test.name, test.run)
		}
	}
}

// testAbsent calls everything on an upper that was never made.
func (b Backend) testAbsent(t *testing.T) {
	u := b.New(t)
	wantAbsent(t, u)
	for name, call := range map[string]func() error{
		"Release":   func() error { return u.Release(t.Context()) },
		"Discard":   func() error { return u.Discard(t.Context()) },
		"ClearWork": u.ClearWork,
		"Yield":     u.Yield,
	} {
		if err := call(); err != nil {
			t.Errorf("%s of an absent upper: %v", name, err)
		}
	}
	if err := u.Grow(t.Context(), upper.LimitOf(2*Size)); b.Limited && !errdefs.IsNotFound(err) {
		t.Errorf("Grow of an absent upper: %v, want NotFound", err)
	}
	wantAbsent(t, u)
}

// testRootAttr gives a new upper the attributes of its root.
func (b Backend) testRootAttr(t *testing.T) {
	want := upper.RootAttr{UID: 1000, GID: 2000, Mode: 0o2770}
	dirs := mustPrepare(t, b.New(t), want)
	if got, err := upper.RootAttrOf(dirs.Upper); err != nil || got != want {
		t.Errorf("root %+v, %v, want %+v", got, err, want)
	}
	if dirs.Existed {
		t.Error("a new upper existed")
	}
}

// testInUse calls everything that reads on an upper in use.
func (b Backend) testInUse(t *testing.T) {
	u := b.New(t)
	dirs := mustPrepare(t, u, plain)
	if exists, err := u.Exists(); err != nil || !exists {
		t.Errorf("Exists: %t, %v", exists, err)
	}
	if err := u.Check(); err != nil {
		t.Errorf("Check: %v", err)
	}
	upperPath, workPath := u.Paths()
	wantSame(t, upperPath, dirs.Upper)
	wantSame(t, workPath, dirs.Work)
	before, err := u.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, filepath.Join(upperPath, "f"), bytesOf(1<<20))
	after, err := u.Usage(t.Context())
	if err != nil || after.Bytes.Used < before.Bytes.Used+1<<20 {
		t.Errorf("%d bytes are used, then 1 MiB is written, and %d are: %v", before.Bytes.Used, after.Bytes.Used, err)
	}
	for name, usage := range map[string]func(context.Context) (upper.Usage, error){"Usage": u.Usage, "Free": u.Free} {
		got, err := usage(t.Context())
		if err != nil || got.Bytes.Available <= 0 || got.Bytes.Total < got.Bytes.Available {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		if b.Limited && got.Bytes.Total > Size {
			t.Errorf("%s: a total of %d bytes where the limit is %d", name, got.Bytes.Total, Size)
		}
	}
	if _, err := u.DiskUsage(t.Context()); err != nil {
		t.Errorf("DiskUsage: %v", err)
	}
}

// testPreparedAgain prepares an upper that is in use already.
func (b Backend) testPreparedAgain(t *testing.T) {
	u := b.New(t)
	first := mustPrepare(t, u, plain)
	again := mustPrepare(t, u, plain)
	if !again.Existed {
		t.Error("an upper in use did not exist")
	}
	if same, err := linux.SameFile(first.Upper, again.Upper); err != nil || !same {
		t.Errorf("another directory was opened: %v", err)
	}
}

// testReleased releases an upper twice, and looks for what was written.
func (b Backend) testReleased(t *testing.T) {
	u := b.New(t)
	dirs := mustPrepare(t, u, plain)
	path, _ := u.Paths()
	mustWrite(t, filepath.Join(path, "f"), []byte("written"))
	dirs.Close()
	for range 2 {
		if err := u.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if exists, err := u.Exists(); err != nil || !exists {
		t.Errorf("Exists at rest: %t, %v", exists, err)
	}
	if err := u.Check(); err != nil {
		t.Errorf("Check at rest: %v", err)
	}
	if _, err := u.DiskUsage(t.Context()); err != nil {
		t.Errorf("DiskUsage at rest: %v", err)
	}
	if again := mustPrepare(t, u, plain); !again.Existed {
		t.Error("an upper at rest did not exist")
	}
	wantWritten(t, filepath.Join(path, "f"))
}

// testOverlay mounts an overlay, writes to it, and unmounts it.
func (b Backend) testOverlay(t *testing.T) {
	u := b.New(t)
	view := mountView(t, u)
	mustWrite(t, filepath.Join(view, "f"), []byte("written"))
	path, _ := u.Paths()
	wantWritten(t, filepath.Join(path, "f"))
}

// testClearWork clears what a volatile overlay left.
func (b Backend) testClearWork(t *testing.T) {
	u := b.New(t)
	mustPrepare(t, u, plain)
	path, work := u.Paths()
	mustWrite(t, filepath.Join(path, "f"), []byte("written"))
	if err := os.MkdirAll(filepath.Join(work, "work/incompat/volatile"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := u.ClearWork(); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(work); err != nil || len(left) != 0 {
		t.Errorf("%v is left in the work directory: %v", left, err)
	}
	wantWritten(t, filepath.Join(path, "f"))
}

// testYield yields an upper twice, and prepares it again.
func (b Backend) testYield(t *testing.T) {
	u := b.New(t)
	dirs := mustPrepare(t, u, plain)
	path, _ := u.Paths()
	mustWrite(t, filepath.Join(path, "f"), []byte("written"))
	dirs.Close()
	for range 2 {
		if err := u.Yield(); err != nil {
			t.Fatal(err)
		}
	}
	if again := mustPrepare(t, u, plain); !again.Existed {
		t.Error("a yielded upper did not exist")
	}
	wantWritten(t, filepath.Join(path, "f"))
}

// testDiscard discards an upper in use, twice, and makes it again.
func (b Backend) testDiscard(t *testing.T) {
	u := b.New(t)
	dirs := mustPrepare(t, u, plain)
	path, _ := u.Paths()
	mustWrite(t, filepath.Join(path, "f"), []byte("written"))
	dirs.Close()
	for range 2 {
		if err := u.Discard(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if b.PodOwned {
		wantWritten(t, filepath.Join(path, "f"))
		return
	}
	wantAbsent(t, u)
	if again := mustPrepare(t, u, plain); again.Existed {
		t.Error("a discarded upper existed")
	}
	if _, err := os.Lstat(filepath.Join(path, "f")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was written to a discarded upper: %v", err)
	}
}

// testLost removes the directories of an upper in use.
func (b Backend) testLost(t *testing.T) {
	u := b.New(t)
	mustPrepare(t, u, plain)
	for _, path := range pathsOf(u) {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
	if err := u.Check(); !errdefs.IsNotFound(err) {
		t.Errorf("Check of a lost upper: %v, want NotFound", err)
	}
}

// wantAbsent checks what an absent upper answers.
func wantAbsent(t *testing.T, u upper.Upper) {
	t.Helper()
	if exists, err := u.Exists(); err != nil || exists {
		t.Errorf("Exists: %t, %v", exists, err)
	}
	if err := u.Check(); !errdefs.IsNotFound(err) {
		t.Errorf("Check: %v, want NotFound", err)
	}
	for name, usage := range map[string]func(context.Context) (upper.Usage, error){"Usage": u.Usage, "Free": u.Free} {
		if got, err := usage(t.Context()); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %+v, %v, want NotFound", name, got, err)
		}
	}
	if bytes, err := u.DiskUsage(t.Context()); bytes != 0 || (err != nil && !errdefs.IsNotFound(err)) {
		t.Errorf("DiskUsage: %d, %v, want nothing or NotFound", bytes, err)
	}
	for _, path := range pathsOf(u) {
		if !filepath.IsAbs(path) {
			t.Errorf("path %q is not absolute", path)
		}
	}
}

// plain are the attributes of the root of most layers.
var plain = upper.RootAttr{Mode: 0o755}

func mustPrepare(t *testing.T, u upper.Upper, root upper.RootAttr) upper.Dirs {
	t.Helper()
	dirs, err := u.Prepare(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(dirs.Close)
	return dirs
}

func pathsOf(u upper.Upper) []string {
	upperPath, workPath := u.Paths()
	return []string{upperPath, workPath}
}

func mustWrite(t *testing.T, path string, data []byte) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.Write(data)
	// btrfs counts what is on the disk.
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		t.Fatal(err)
	}
}

// wantWritten checks that a file has what the suite wrote.
func wantWritten(t *testing.T, path string) {
	t.Helper()
	if data, err := os.ReadFile(path); err != nil || string(data) != "written" {
		t.Errorf("%s has %q: %v", path, data, err)
	}
}

// wantSame checks that a path leads to an open directory.
func wantSame(t *testing.T, path string, dir *os.File) {
	t.Helper()
	opened, err := linux.OpenDir(path)
	if err != nil {
		t.Error(err)
		return
	}
	defer opened.Close()
	if same, err := linux.SameFile(opened, dir); err != nil || !same {
		t.Errorf("%s is not the directory that was opened: %v", path, err)
	}
}
