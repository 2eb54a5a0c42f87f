package upper_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/upper/uppertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// freezing are the backends whose uppers can be frozen, and where each is tried.
var freezing = []struct {
	root    string
	backend upper.Backend
	// inUse is set if an upper can be copied while pods write to it.
	inUse bool
}{
	{"ext4", upper.Directory, false},
	{"ext4 with project quota", upper.ProjectQuota, false},
	{"xfs with project quota", upper.ProjectQuota, false},
	{"btrfs with quota", upper.BtrfsQgroup, true},
	{"ext4", upper.DiskImage, true},
	{"xfs", upper.DiskImage, true},
}

func forFreezing(t *testing.T, test func(t *testing.T, open *upper.Backends, root *os.File, at upper.Location, inUse bool)) {
	needs.Root(t)
	for _, c := range freezing {
		t.Run(string(c.backend)+" on "+c.root, func(t *testing.T) {
			root := newDataRoot(t, c.root)
			if err := os.Mkdir(filepath.Join(root.Name(), "frozen"), 0o700); err != nil {
				t.Fatal(err)
			}
			at := upper.Location{Backend: c.backend, Base: "base", Limit: upper.LimitOf(uppertest.Size)}
			test(t, newBackends(t, root), root, at, c.inUse)
		})
	}
}

// prepared is an upper in use with a file in it.
func prepared(t *testing.T, open *upper.Backends, root *os.File, at upper.Location) upper.Upper {
	t.Helper()
	u := newUpper(t, open, root, at)
	prepareAndClose(t, u)
	path, _ := u.Paths()
	if err := os.WriteFile(filepath.Join(path, "file"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	return u
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantFrozen opens a frozen upper, and fails the test if a file in it has other content, or can be written to.
func wantFrozen(t *testing.T, open *upper.Backends, backend upper.Backend, id, want string) *os.File {
	t.Helper()
	dir, err := open.OpenFrozen(t.Context(), backend, id)
	must(t, err)
	t.Cleanup(func() { dir.Close() })
	content, err := os.ReadFile(linux.ProcPath(dir) + "/file")
	if err != nil || string(content) != want {
		t.Errorf("the frozen upper has %q, %v; want %q", content, err, want)
	}
	return dir
}

func TestFreeze(t *testing.T) {
	forFreezing(t, func(t *testing.T, open *upper.Backends, root *os.File, at upper.Location, _ bool) {
		u, id := prepared(t, open, root, at), upper.NewFrozenID()
		must(t, open.PrepareFreeze(t.Context(), at, id))
		// A crash can come between any two steps.
		for range 2 {
			must(t, open.Freeze(at, id))
		}
		if there, err := u.Exists(); err != nil || there {
			t.Errorf("the upper is still there: %v, %v", there, err)
		}
		first := wantFrozen(t, open, at.Backend, id, "content")
		second := wantFrozen(t, open, at.Backend, id, "content")
		if same, err := linux.SameFile(first, second); err != nil || !same {
			t.Errorf("two handles of it are of different file systems: %v", err)
		}
		// The next upper is another one.
		prepareAndClose(t, u)
		path, _ := u.Paths()
		must(t, os.WriteFile(filepath.Join(path, "file"), []byte("new"), 0o600))
		wantFrozen(t, open, at.Backend, id, "content")
		if ids, err := open.ListFrozen(); err != nil || len(ids) != 1 || ids[0] != id {
			t.Errorf("listed %v, %v", ids, err)
		}
		must(t, open.CheckFrozen(at.Backend, id))
		first.Close()
		second.Close()
		for range 2 {
			must(t, open.DiscardFrozen(id))
		}
		if err := open.CheckFrozen(at.Backend, id); !errdefs.IsNotFound(err) {
			t.Errorf("check one that was discarded: %v", err)
		}
		if _, err := open.OpenFrozen(t.Context(), at.Backend, id); !errdefs.IsDataLoss(err) {
			t.Errorf("open one that was discarded: %v", err)
		}
	})
}

func TestCopyInUse(t *testing.T) {
	forFreezing(t, func(t *testing.T, open *upper.Backends, root *os.File, at upper.Location, inUse bool) {
		u, id := prepared(t, open, root, at), upper.NewFrozenID()
		path, _ := u.Paths()
		if !inUse {
			err := open.CopyInUse(t.Context(), at, id)
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "stop the pods") {
				t.Errorf("got %v, want what to do", err)
			}
			bytes, inodes, err := open.MeasureInUse(t.Context(), at)
			must(t, err)
			must(t, open.CopyFiles(t.Context(), at, id, bytes, inodes))
			must(t, os.WriteFile(filepath.Join(path, "file"), []byte("new"), 0o600))
			wantFrozen(t, open, at.Backend, id, "content").Close()
			must(t, open.DiscardFrozen(id))
			wantWritable(t, path)
			return
		}
		// A writer writes a number to one file, and then to the other.
		written, stop, done := make(chan struct{}, 1), make(chan struct{}), make(chan error, 1)
		go func() { done <- writePairs(path, written, stop) }()
		<-written
		must(t, open.CopyInUse(t.Context(), at, id))
		close(stop)
		must(t, <-done)
		dir := wantFrozen(t, open, at.Backend, id, "content")
		first, second := number(t, linux.ProcPath(dir)+"/first"), number(t, linux.ProcPath(dir)+"/second")
		if first == 0 || first < second || first > second+1 {
			t.Errorf("the copy is not of one moment: the files have %d and %d", first, second)
		}
		if last := number(t, path+"/second"); last < second {
			t.Errorf("the upper has %d, its copy %d", last, second)
		}
		must(t, os.WriteFile(filepath.Join(path, "file"), []byte("new"), 0o600))
		wantFrozen(t, open, at.Backend, id, "content")
		dir.Close()
		must(t, open.DiscardFrozen(id))
		wantWritable(t, path)
	})
}

// writePairs writes ever larger numbers to two files, the one after the other is on the disk.
func writePairs(dir string, written chan<- struct{}, stop <-chan struct{}) error {
	var files [2]*os.File
	for i, name := range []string{"first", "second"} {
		file, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		defer file.Close()
		files[i] = file
	}
	for n := uint64(1); ; n++ {
		for _, file := range files {
			if _, err := file.WriteAt(binary.LittleEndian.AppendUint64(nil, n), 0); err != nil {
				return err
			}
			if err := file.Sync(); err != nil {
				return err
			}
		}
		select {
		case written <- struct{}{}:
		case <-stop:
			return nil
		default:
		}
	}
}

func number(t *testing.T, path string) uint64 {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil || len(data) != 8 {
		t.Fatalf("read a number: %v, %v", data, err)
	}
	return binary.LittleEndian.Uint64(data)
}

func wantWritable(t *testing.T, dir string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(dir, "after"), []byte("x"), 0o600))
}

// TestThaw: a process that was killed while it copied a disk image has left its file system frozen. The next one thaws it.
func TestThaw(t *testing.T) {
	needs.Root(t)
	root, mountDir := newDataRoot(t, "ext4"), t.TempDir()
	must(t, os.Mkdir(filepath.Join(root.Name(), "frozen"), 0o700))
	at := upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(uppertest.Size)}
	open := newBackendsAt(t, root, mountDir)
	u := prepared(t, open, root, at)
	path, _ := u.Paths()
	freeze := func() {
		dir, err := linux.Open(nil, path, os.O_RDONLY|linux.O_DIRECTORY, 0)
		must(t, err)
		defer dir.Close()
		must(t, linux.FreezeFS(dir))
	}
	for name, thaw := range map[string]func(){
		"reconcile": func() { must(t, open.Thaw()) },
		"start":     func() { newBackendsAt(t, root, mountDir) },
	} {
		t.Run(name, func(t *testing.T) {
			freeze()
			if err := open.CopyInUse(t.Context(), at, upper.NewFrozenID()); !errdefs.IsUnavailable(err) || !errors.Is(err, syscall.EBUSY) {
				t.Errorf("copy one that is frozen: %v", err)
			}
			thaw()
			wantWritable(t, path)
			must(t, open.Thaw())
		})
	}
}

// TestFrozenDiskImageInUse: an image whose loop device a container still has is not frozen.
func TestFrozenDiskImageInUse(t *testing.T) {
	needs.Root(t)
	root := newDataRoot(t, "ext4")
	must(t, os.Mkdir(filepath.Join(root.Name(), "frozen"), 0o700))
	at := upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(uppertest.Size)}
	open := newBackends(t, root)
	u := prepared(t, open, root, at)
	path, _ := u.Paths()
	container, err := os.Create(filepath.Join(path, "open"))
	must(t, err)
	must(t, u.Release(t.Context()))
	if err := open.PrepareFreeze(t.Context(), at, upper.NewFrozenID()); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v, want unavailable", err)
	}
	must(t, container.Close())
}

// TestFrozenImageTakesWhatWasWritten: what is reserved for an image and was never written is given back when it is frozen.
func TestFrozenImageTakesWhatWasWritten(t *testing.T) {
	needs.Root(t)
	for _, name := range []string{"ext4", "xfs"} {
		t.Run(name, func(t *testing.T) {
			root := newDataRoot(t, name)
			must(t, os.Mkdir(filepath.Join(root.Name(), "frozen"), 0o700))
			at := upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(512 << 20)}
			open, id := newBackends(t, root), upper.NewFrozenID()
			prepared(t, open, root, at)
			written, err := open.WrittenBytes(t.Context(), at)
			must(t, err)
			must(t, open.PrepareFreeze(t.Context(), at, id))
			must(t, open.Freeze(at, id))
			stat, err := linux.StatPath(filepath.Join(root.Name(), upper.FrozenPath(at.Backend, id)))
			must(t, err)
			if stat.DiskBytes() > 64<<20 || stat.DiskBytes() > written+(1<<20) {
				t.Errorf("it takes %d bytes, and %d were written", stat.DiskBytes(), written)
			}
			wantFrozen(t, open, at.Backend, id, "content")
		})
	}
}

func TestFrozenID(t *testing.T) {
	open := newBackends(t, newDataRoot(t, "tmpfs"))
	for _, id := range []string{"", ".", "..", "../volumes", strings.Repeat("a", 31), strings.Repeat("g", 32), strings.Repeat("a", 34)} {
		if _, err := open.OpenFrozen(t.Context(), upper.Directory, id); !errdefs.IsDataLoss(err) {
			t.Errorf("%q: %v", id, err)
		}
	}
	if a, b := upper.NewFrozenID(), upper.NewFrozenID(); a == b {
		t.Error(fmt.Sprint("the same twice: ", a))
	}
}
