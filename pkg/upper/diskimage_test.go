package upper_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	utilexec "k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// killed are commands of which one is killed whenever it runs.
type killed struct {
	utilexec.Interface
	program string
}

func (k killed) CommandContext(ctx context.Context, program string, args ...string) utilexec.Cmd {
	if program == k.program {
		return k.Interface.CommandContext(ctx, "sh", "-c", "kill -KILL $$")
	}
	return k.Interface.CommandContext(ctx, program, args...)
}

// TestKilledCheck has e2fsck killed, as by the kernel for its memory: nothing is known of the image, and it is not mounted.
func TestKilledCheck(t *testing.T) {
	root := newDataRoot(t, "tmpfs")
	at := upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(8 << 20)}
	u := newUpper(t, newBackends(t, root), root, at)
	dirs, err := u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
	if err != nil {
		t.Fatal(err)
	}
	dirs.Close()
	if err := u.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	mountDir := t.TempDir()
	u = upper.NewBackends(upper.Config{
		Root: root, MountDir: mountDir, Discard: os.RemoveAll, Commands: killed{utilexec.New(), "e2fsck"},
	}).Open(at)
	if dirs, err = u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755}); err == nil {
		dirs.Close()
		if err := u.Release(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if !errdefs.IsUnavailable(err) {
		t.Errorf("Prepare after a check that was killed: %v, want Unavailable", err)
	}
	if left, err := filepath.Glob(filepath.Join(mountDir, "*")); err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// TestImageOpenElsewhere: somebody has attached the image by another name of it, by which its device is not found.
func TestImageOpenElsewhere(t *testing.T) {
	root := newDataRoot(t, "tmpfs")
	at := upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(8 << 20)}
	u := newUpper(t, newBackends(t, root), root, at)
	prepareAndClose(t, u)
	if err := u.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(root.Name(), "link")
	if err := os.Link(filepath.Join(root.Name(), at.Base, "disk.img"), link); err != nil {
		t.Fatal(err)
	}
	image, err := os.OpenFile(link, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	loop, err := linux.AttachLoop(image)
	image.Close()
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
	if err == nil {
		dirs.Close()
	}
	if !errdefs.IsUnavailable(err) {
		t.Errorf("Prepare of an image that is on another loop device: %v, want Unavailable", err)
	}
	loop.Close()
	if err := u.Release(t.Context()); err != nil {
		t.Error(err)
	}
	prepareAndClose(t, u)
	if err := u.Release(t.Context()); err != nil {
		t.Error(err)
	}
}

// slow are commands of which e2fsck says in a file that it began. The first one goes on when something is written to a FIFO.
type slow struct {
	utilexec.Interface
	fifo, log string
}

func (s slow) CommandContext(ctx context.Context, program string, args ...string) utilexec.Cmd {
	if program != "e2fsck" {
		return s.Interface.CommandContext(ctx, program, args...)
	}
	script := fmt.Sprintf(`echo began >> %[1]s; test $(wc -l < %[1]s) -gt 1 || read line < %[2]s; exec e2fsck "$@"`, s.log, s.fifo)
	return s.Interface.CommandContext(ctx, "sh", append([]string{"-c", script, "sh"}, args...)...)
}

// TestCheckGoesOnAfterItsRequest has e2fsck take longer than kubelet waits for a publish. If each publish began it again, it would never
// end.
func TestCheckGoesOnAfterItsRequest(t *testing.T) {
	root := newDataRoot(t, "tmpfs")
	at := upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(8 << 20)}
	u := newUpper(t, newBackends(t, root), root, at)
	prepare := func(ctx context.Context) error {
		dirs, err := u.Prepare(ctx, upper.RootAttr{Mode: 0o755})
		if err == nil {
			dirs.Close()
		}
		return err
	}
	if err := errors.Join(prepare(t.Context()), u.Release(t.Context())); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	commands := slow{utilexec.New(), filepath.Join(dir, "fifo"), filepath.Join(dir, "log")}
	if err := unix.Mkfifo(commands.fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	u = upper.NewBackends(upper.Config{Root: root, MountDir: t.TempDir(), Discard: os.RemoveAll, Commands: commands}).Open(at)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- prepare(ctx) }()
	// It can be opened when the check has opened it.
	fifo, err := os.OpenFile(commands.fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer fifo.Close()
	cancel()
	if err := <-result; !errdefs.IsUnavailable(err) {
		t.Errorf("Prepare whose request ends amid the check: %v, want Unavailable", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := prepare(ctx); !errdefs.IsUnavailable(err) {
		t.Errorf("Prepare beside the check: %v, want Unavailable", err)
	}
	if log, err := os.ReadFile(commands.log); string(log) != "began\n" {
		t.Errorf("checks: %q (%v), want the one that goes on", log, err)
	}
	// This one waits for the same check, or finds the image in order.
	go func() { result <- prepare(t.Context()) }()
	if _, err := fifo.WriteString("\n"); err != nil {
		t.Fatal(err)
	}
	if err := <-result; err != nil {
		t.Errorf("Prepare after the check: %v", err)
	}
	if err := u.Release(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestUpperLostInsideItsImage: after a repair (e2fsck -y) the upper can lie in lost+found. A database must not start empty.
func TestUpperLostInsideItsImage(t *testing.T) {
	root := newDataRoot(t, "tmpfs")
	backends := newBackends(t, root)
	at := upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(8 << 20)}
	u := newUpper(t, backends, root, at)
	prepare := func() error {
		t.Helper()
		dirs, err := u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
		if err == nil {
			dirs.Close()
		}
		return err
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(prepare())
	inside, _ := u.Paths()
	check(os.WriteFile(filepath.Join(inside, "written"), nil, 0o644))
	moved := filepath.Join(filepath.Dir(inside), "lost+found", "#12")
	check(os.Rename(inside, moved))
	check(u.Release(t.Context()))

	at.Made = true
	u = backends.Open(at)
	for range 2 {
		if err := prepare(); !errdefs.IsDataLoss(err) {
			t.Errorf("%v, want DataLoss", err)
		}
		if _, err := os.Lstat(inside); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it is left mounted: %v", err)
		}
	}
	// Somebody puts it back.
	u = backends.Open(upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(8 << 20)})
	check(prepare())
	check(os.Remove(inside))
	check(os.Rename(moved, inside))
	check(u.Release(t.Context()))
	u = backends.Open(at)
	check(prepare())
	if _, err := os.Lstat(filepath.Join(inside, "written")); err != nil {
		t.Error(err)
	}
	check(u.Release(t.Context()))
}

// TestLoopDeviceThatIsOpen has another process keep a loop device open while its image is released, as udev does. Nobody else must get
// the device, which refuses discards for good (Linux 6.9).
func TestLoopDeviceThatIsOpen(t *testing.T) {
	root := newDataRoot(t, "tmpfs")
	for name, next := range map[string]func(t *testing.T){
		"the next image that is sparse": func(t *testing.T) {
			sparse := upper.NewBackends(upper.Config{
				Root: root, MountDir: t.TempDir(), Discard: os.RemoveAll, Commands: utilexec.New(), Sparse: true,
			})
			at := upper.Location{Backend: upper.DiskImage, Base: "sparse", Limit: upper.LimitOf(8 << 20)}
			prepareAndClose(t, newUpper(t, sparse, root, at))
			loop := findLoop(t, root, at)
			if discards, err := os.ReadFile(discardFile(loop)); err != nil || string(discards) == "0\n" {
				t.Errorf("a sparse image has a loop device that refuses discards: %s (%v)", loop, err)
			}
		},
		"the next image that is released": func(t *testing.T) {
			u := newUpper(t, newBackends(t, root), root, upper.Location{Backend: upper.DiskImage, Base: "other", Limit: upper.LimitOf(8 << 20)})
			if err := u.Release(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
		"the next start": func(t *testing.T) { newBackends(t, root) },
	} {
		t.Run(name, func(t *testing.T) {
			at := upper.Location{Backend: upper.DiskImage, Base: fmt.Sprint("base-", len(name)), Limit: upper.LimitOf(8 << 20)}
			u := newUpper(t, newBackends(t, root), root, at)
			prepareAndClose(t, u)
			loop := findLoop(t, root, at)
			held, err := os.Open(filepath.Join("/dev", loop))
			if err != nil {
				t.Fatal(err)
			}
			if err := u.Release(t.Context()); err != nil {
				t.Fatal(err)
			}
			held.Close()
			next(t)
			// Another process may have got a new device of that name.
			bound := filepath.Join(filepath.Dir(filepath.Dir(discardFile(loop))), "loop")
			discards, err := os.ReadFile(discardFile(loop))
			if _, free := os.Stat(bound); err == nil && string(discards) == "0\n" && errors.Is(free, fs.ErrNotExist) {
				t.Errorf("%s is left for others, and refuses discards", loop)
			}
		})
	}
}

func prepareAndClose(t *testing.T, u upper.Upper) {
	t.Helper()
	dirs, err := u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
	if err != nil {
		t.Fatal(err)
	}
	dirs.Close()
}

// findLoop returns the name of the loop device of a disk image.
func findLoop(t *testing.T, root *os.File, at upper.Location) string {
	t.Helper()
	loop, err := linux.FindLoop(filepath.Join(root.Name(), at.Base, "disk.img"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	return filepath.Base(loop.Name())
}

func discardFile(loop string) string {
	return filepath.Join("/sys/block", loop, "queue/discard_max_bytes")
}

// TestDiskImageOnAFullDisk: what was reserved for an image is there for it, also where others have taken all the rest of the disk.
func TestDiskImageOnAFullDisk(t *testing.T) {
	for _, name := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(name, func(t *testing.T) {
			root := newDataRoot(t, name)
			at := upper.Location{Backend: upper.DiskImage, Base: "base", Limit: upper.LimitOf(16 << 20)}
			u := newUpper(t, newBackends(t, root), root, at)
			for range 2 {
				dirs, err := u.Prepare(t.Context(), upper.RootAttr{Mode: 0o755})
				if err != nil {
					t.Fatal(err)
				}
				dirs.Close()
				if err := u.Release(t.Context()); err != nil {
					t.Fatal(err)
				}
				takeAll(t, root)
			}
		})
	}
}

// takeAll takes what is free on a file system.
func takeAll(t *testing.T, root *os.File) {
	t.Helper()
	file, err := os.Create(filepath.Join(root.Name(), fmt.Sprint("taken-", time.Now().UnixNano())))
	if errors.Is(err, unix.ENOSPC) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	end := int64(0)
	for size := int64(1 << 30); size >= 1<<16; {
		if err := unix.Fallocate(int(file.Fd()), 0, end, size); err == nil {
			end += size
		} else if size /= 2; !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	if err := drivertest.FillUp(file.Name() + "-rest"); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}
