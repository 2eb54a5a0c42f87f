package layer

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// onSameMount reopens nothing.
type onSameMount struct{}

func (onSameMount) Reopen(*os.File) *os.File { return nil }

func newTestRoots(t *testing.T) (roots *Roots, dir string) {
	t.Helper()
	protected, err := NewProtectedDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	roots, err = NewRoots(map[string]Root{"images": {Path: dir}}, protected, onSameMount{})
	if err != nil {
		t.Fatal(err)
	}
	return roots, dir
}

// TestArchiveIsNotOpenedBeforeItsTypeIsKnown checks that opening an archive has no effect on a device, pipe or socket that somebody put
// into the layer root: inotify reports every open but one of a handle (O_PATH).
func TestArchiveIsNotOpenedBeforeItsTypeIsKnown(t *testing.T) {
	for name, create := range map[string]func(path string) error{
		"pipe":   func(path string) error { return unix.Mkfifo(path, 0o666) },
		"device": func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))) },
		"socket": func(path string) error {
			listener, err := net.Listen("unix", path)
			if err == nil {
				t.Cleanup(func() { listener.Close() })
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			roots, dir := newTestRoots(t)
			path := filepath.Join(dir, "a.tar")
			if err := create(path); errors.Is(err, unix.EPERM) {
				t.Skip("needs CAP_MKNOD")
			} else if err != nil {
				t.Fatal(err)
			}
			events, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(events)
			if _, err := unix.InotifyAddWatch(events, path, unix.IN_OPEN); err != nil {
				t.Fatal(err)
			}
			ref, err := reference.Parse("archive://images/a.tar")
			if err != nil {
				t.Fatal(err)
			}
			_, err = roots.openArchive(ref)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "neither a file nor a directory") {
				t.Errorf("got error %v", err)
			}
			if n, err := unix.Read(events, make4k()); !errors.Is(err, unix.EAGAIN) {
				t.Errorf("it was opened: %d bytes of events, %v", n, err)
			}
		})
	}
}

func make4k() []byte { return make([]byte, 4096) }

func TestOpenArchive(t *testing.T) {
	roots, dir := newTestRoots(t)
	if err := os.WriteFile(filepath.Join(dir, "a.tar"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "layout"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, read := range map[string]func(*os.File) error{
		"a.tar":  func(f *os.File) error { _, err := f.Read(make4k()); return err },
		"layout": func(f *os.File) error { _, err := f.ReadDir(-1); return err },
	} {
		t.Run(name, func(t *testing.T) {
			ref, err := reference.Parse("archive://images/" + name)
			if err != nil {
				t.Fatal(err)
			}
			file, err := roots.openArchive(ref)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			if err := read(file); err != nil {
				t.Error(err)
			}
		})
	}
}
