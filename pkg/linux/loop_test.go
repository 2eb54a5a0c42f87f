package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

// attachImages attaches image files in directories 0, 1, … of dir, as the driver keeps them, to loop devices.
func attachImages(t testing.TB, dir string, n int) (images []string, loops []*os.File) {
	t.Helper()
	for i := range n {
		base := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(base, 0o755); err != nil {
			t.Fatal(err)
		}
		image, err := os.Create(filepath.Join(base, "disk.img"))
		if err != nil {
			t.Fatal(err)
		}
		if err := image.Truncate(1 << 20); err != nil {
			t.Fatal(err)
		}
		loop, err := AttachLoop(image)
		if err != nil {
			t.Fatal(err)
		}
		if err := image.Close(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { loop.Close() })
		images, loops = append(images, image.Name()), append(loops, loop)
	}
	return images, loops
}

func TestFindLoop(t *testing.T) {
	needs.Root(t)
	dir := t.TempDir()
	images, loops := attachImages(t, dir, 2)
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(filepath.Dir(images[0]), link))
	moved := filepath.Join(dir, "moved")
	for _, path := range []string{images[0], filepath.Join(link, "disk.img"), "moved"} {
		if path == "moved" {
			must(t, os.Rename(filepath.Dir(images[0]), moved))
			path = filepath.Join(moved, "disk.img")
		}
		loop, err := FindLoop(path, dir)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if loop.Name() != loops[0].Name() {
			t.Errorf("%s is on %s, and %s was found", path, loops[0].Name(), loop.Name())
		}
		loop.Close()
	}
	// Where it is mounted, its device is known.
	for _, loop := range loops {
		run(t, "mkfs.ext4", "-q", "-F", loop.Name())
	}
	mounted := t.TempDir()
	for i, path := range []string{filepath.Join(moved, "disk.img"), images[1]} {
		must(t, Mount(loops[i].Name(), mounted, "ext4", 0, ""))
		loop, err := FindLoop(images[1], mounted)
		must(t, UnmountLazily(mounted))
		must(t, err)
		if loop.Name() != loops[1].Name() {
			t.Errorf("with %s mounted, %s is found", path, loop.Name())
		}
		loop.Close()
	}
	other := filepath.Join(dir, "1", "other.img")
	must(t, os.WriteFile(other, nil, 0o600))
	if _, err := FindLoop(other, dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file without a device: %v", err)
	}
}

// TestFindLoopOpensNoOtherDevice: udev looks at a device again whenever somebody closes it who could have written to it. A node with two
// thousand disk images must not do that with all of them when one volume is unpublished.
func TestFindLoopOpensNoOtherDevice(t *testing.T) {
	needs.Root(t)
	dir := t.TempDir()
	images, loops := attachImages(t, dir, 3)
	// Without FAN_REPORT_FID there are no events of devices.
	watch, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_REPORT_FID|unix.FAN_NONBLOCK, 0)
	if errors.Is(err, unix.ENOSYS) {
		t.Skip("this kernel has no fanotify")
	}
	must(t, err)
	defer unix.Close(watch)
	for _, other := range []*os.File{loops[0], loops[2]} {
		must(t, unix.FanotifyMark(watch, unix.FAN_MARK_ADD, unix.FAN_OPEN, unix.AT_FDCWD, other.Name()))
	}
	loop, err := FindLoop(images[1], dir)
	must(t, err)
	loop.Close()
	if opened := opensOf(t, watch, os.Getpid()); opened > 0 {
		t.Errorf("%d devices of other files were opened", opened)
	}
	other, err := os.Open(loops[0].Name())
	must(t, err)
	other.Close()
	if opened := opensOf(t, watch, os.Getpid()); opened != 1 {
		t.Errorf("the device was opened %d times, want 1: what opens devices is not seen here", opened)
	}
}

// opensOf counts the events of a process that are waiting in a fanotify group (fanotify(7)). Others on the machine may look at devices.
func opensOf(t *testing.T, watch, pid int) (opened int) {
	t.Helper()
	// struct fanotify_event_metadata of include/uapi/linux/fanotify.h: at its begin the length of the event, at its end the process.
	const pidAt = 20
	buffer := make([]byte, 64<<10)
	for {
		n, err := unix.Read(watch, buffer)
		if errors.Is(err, unix.EAGAIN) {
			return opened
		}
		must(t, err)
		for events := buffer[:n]; len(events) > 0; events = events[binary.NativeEndian.Uint32(events):] {
			if int(binary.NativeEndian.Uint32(events[pidAt:])) == pid {
				opened++
			}
		}
	}
}

// BenchmarkFindNoLoop looks for an image that has no device, as each publish of one that is at rest does.
func BenchmarkFindNoLoop(b *testing.B) {
	needs.Root(b)
	for _, others := range []int{10, 300} {
		b.Run(fmt.Sprint("others=", others), func(b *testing.B) {
			dir := b.TempDir()
			attachImages(b, dir, others)
			path := filepath.Join(dir, "disk.img")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if _, err := FindLoop(path, dir); !errors.Is(err, fs.ErrNotExist) {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkFindLoop looks for one of a hundred images.
func BenchmarkFindLoop(b *testing.B) {
	needs.Root(b)
	dir := b.TempDir()
	images, _ := attachImages(b, dir, 100)
	for b.Loop() {
		loop, err := FindLoop(images[50], dir)
		if err != nil {
			b.Fatal(err)
		}
		loop.Close()
	}
}

func run(t *testing.T, program string, args ...string) {
	t.Helper()
	needs.Installed(t, program)
	if output, err := exec.Command(program, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", program, err, output)
	}
}
