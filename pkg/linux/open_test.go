package linux

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func openDir(t *testing.T, path string) *os.File {
	t.Helper()
	dir, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return dir
}

// renameElsewhere renames a file to and fro until the test ends: the kernel then cannot be sure of any lookup through "..".
func renameElsewhere(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	if err := os.Mkdir(a, 0o755); err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() {
		close(stop)
		<-stopped
	})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			_ = unix.Rename(a, b)
			_ = unix.Rename(b, a)
		}
	}()
}

// TestOpenBesideRenames: a rename elsewhere makes no lookup through ".." fail.
func TestOpenBesideRenames(t *testing.T) {
	root := t.TempDir()
	if err := errors.Join(os.MkdirAll(filepath.Join(root, "b", "c"), 0o755), os.Mkdir(filepath.Join(root, "a"), 0o755),
		os.Symlink("../b", filepath.Join(root, "a", "link"))); err != nil {
		t.Fatal(err)
	}
	dir := openDir(t, root)
	renameElsewhere(t)
	// So many lookups have to be disturbed for the test to show something.
	const enough = 50
	for name, resolve := range map[string]uint64{"beneath": ResolveBeneath, "in root": ResolveInRoot} {
		t.Run(name, func(t *testing.T) {
			disturbed := 0
			deadline := time.Now().Add(time.Minute)
			for disturbed < enough {
				how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: resolve}
				if fd, err := unix.Openat2(int(dir.Fd()), "a/link/c", &how); errors.Is(err, unix.EAGAIN) {
					disturbed++
				} else if err == nil {
					unix.Close(fd)
				}
				file, err := Open(dir, "a/link/c", O_PATH, resolve)
				if err != nil {
					t.Fatal(err)
				}
				file.Close()
				if time.Now().After(deadline) {
					t.Fatalf("the renames disturbed only %d lookups in a minute: this test shows nothing", disturbed)
				}
			}
		})
	}
}

func TestOpenStaysBeneath(t *testing.T) {
	outer := t.TempDir()
	root := filepath.Join(outer, "root")
	if err := errors.Join(os.Mkdir(root, 0o755), os.Mkdir(filepath.Join(root, "etc"), 0o755),
		os.Symlink("/etc", filepath.Join(root, "absolute")), os.Symlink("../outside", filepath.Join(root, "up")),
		os.Mkdir(filepath.Join(outer, "outside"), 0o755)); err != nil {
		t.Fatal(err)
	}
	dir := openDir(t, root)
	for name, test := range map[string]struct {
		path    string
		resolve uint64
		want    error
	}{
		"a link out of a directory":       {"up", ResolveBeneath, syscall.EXDEV},
		"an absolute link":                {"absolute", ResolveBeneath, syscall.EXDEV},
		"an absolute link within a root":  {"absolute", ResolveInRoot, nil},
		"a link out of a root":            {"up", ResolveInRoot, fs.ErrNotExist},
		"a link where none may be":        {"absolute", ResolveNoSymlinks, syscall.ELOOP},
		"nothing":                         {"missing", ResolveBeneath, fs.ErrNotExist},
		"the directory itself":            {".", ResolveBeneath, nil},
		"a link that nothing is said of":  {"up", 0, nil},
		"beneath a directory of the root": {"etc", ResolveBeneath | ResolveNoXdev, nil},
	} {
		t.Run(name, func(t *testing.T) {
			file, err := Open(dir, test.path, O_PATH, test.resolve)
			if err == nil {
				file.Close()
			}
			if !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
}

// TestErrorsNameCallAndPath: every error says which call failed, and on which path.
func TestErrorsNameCallAndPath(t *testing.T) {
	root := t.TempDir()
	dir := openDir(t, root)
	missing := filepath.Join(root, "no", "such")
	closed := openDir(t, root)
	closed.Close()
	for call, do := range map[string]func() error{
		"openat2":       func() error { _, err := Open(dir, "no/such", O_PATH, ResolveBeneath); return err },
		"mkdirat":       func() error { return Mkdirat(dir, "no/such", 0o755) },
		"mknodat":       func() error { return Mknodat(dir, "no/such", syscall.S_IFREG, 0) },
		"symlinkat":     func() error { return Symlinkat("target", dir, "no/such") },
		"linkat":        func() error { return Linkat(dir, "no/such", dir, "other") },
		"unlinkat":      func() error { return Unlinkat(dir, "no/such") },
		"rmdir":         func() error { return Rmdirat(dir, "no/such") },
		"renameat2":     func() error { return Renameat(dir, "no/such", nil, "/other", 0) },
		"readlinkat":    func() error { _, err := Readlinkat(dir, "no/such"); return err },
		"fchownat":      func() error { return Fchownat(dir, "no/such", 0, 0) },
		"fchmodat":      func() error { return Fchmodat(dir, "no/such", 0o700) },
		"fstatat":       func() error { _, err := Fstatat(dir, "no/such"); return err },
		"stat":          func() error { _, err := StatPath(missing); return err },
		"statx":         func() error { _, err := StatMount(dir, "no/such"); return err },
		"statfs":        func() error { _, err := FileSystemUsageAt(missing); return err },
		"umount":        func() error { return Unmount(missing) },
		"mount":         func() error { return Mount("x", missing, "tmpfs", 0, "") },
		"open_tree":     func() error { _, err := OpenTree(dir, "no/such"); return err },
		"lsetxattr u.x": func() error { return SetXattrAt(dir, "no/such", "u.x", nil) },
		"lgetxattr u.x": func() error { _, err := GetXattrAt(dir, "no/such", "u.x"); return err },
	} {
		t.Run(call, func(t *testing.T) {
			err := do()
			if err == nil || !strings.HasPrefix(err.Error(), call+" ") || !strings.Contains(err.Error(), missing) {
				t.Errorf("%v names not both %q and %q", err, call, missing)
			}
			if os.Geteuid() == 0 && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%v is not fs.ErrNotExist", err)
			}
		})
	}
	if _, err := StatFile(closed); !errors.Is(err, syscall.EBADF) || !strings.Contains(err.Error(), root) {
		t.Errorf("stat of a closed file: %v", err)
	}
}

// TestCloseOnExec: a child process gets none of the handles.
func TestCloseOnExec(t *testing.T) {
	root := t.TempDir()
	dir := openDir(t, root)
	for name, open := range map[string]func() (*os.File, error){
		"Open":     func() (*os.File, error) { return Open(dir, ".", os.O_RDONLY, ResolveBeneath) },
		"OpenFile": func() (*os.File, error) { return OpenFile(dir, "new", os.O_WRONLY|os.O_CREATE, 0o600, 0) },
		"OpenDir":  func() (*os.File, error) { return OpenDir(root) },
		"Reopen":   func() (*os.File, error) { return Reopen(dir, os.O_RDONLY|O_DIRECTORY) },
		"Dup":      func() (*os.File, error) { return Dup(dir) },
		"OpenTree": func() (*os.File, error) { return OpenTree(dir, "") },
		"Fsopen": func() (*os.File, error) {
			context, err := Fsopen("tmpfs")
			if err != nil {
				return nil, err
			}
			return context.file, nil
		},
		"FSContext.Mount": func() (*os.File, error) {
			context, err := Fsopen("tmpfs")
			if err != nil {
				return nil, err
			}
			defer context.Close()
			if err := context.Create(); err != nil {
				return nil, err
			}
			return context.Mount(MountAttrNoDev)
		},
	} {
		t.Run(name, func(t *testing.T) {
			file, err := open()
			if errors.Is(err, syscall.EPERM) && os.Geteuid() != 0 {
				t.Skip("this needs root")
			}
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			flags, err := unix.FcntlInt(file.Fd(), unix.F_GETFD, 0)
			if err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("flags %#x (%v): it is not close-on-exec", flags, err)
			}
		})
	}
}

// TestReopen: a handle of O_PATH leads to its file also when that has another name.
func TestReopen(t *testing.T) {
	root := t.TempDir()
	old := filepath.Join(root, "old")
	if err := os.WriteFile(old, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	handle, err := Open(nil, old, O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	if err := os.Rename(old, filepath.Join(root, "new")); err != nil {
		t.Fatal(err)
	}
	file, err := Reopen(handle, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	data := make([]byte, 7)
	if _, err := file.Read(data); err != nil || string(data) != "content" {
		t.Errorf("read %q: %v", data, err)
	}
	if path, err := CurrentPath(handle); err != nil || path != filepath.Join(root, "new") {
		t.Errorf("it is at %s: %v", path, err)
	}
	if same, err := SameFile(handle, file); err != nil || !same {
		t.Errorf("it is another file: %v", err)
	}
}
