package linux

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/needs"
)

// TestBareNamespace starts a program where it sees three mounts, also where the root mount is shared, and changes nothing for others.
func TestBareNamespace(t *testing.T) {
	needs.Root(t)
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	// In a mount namespace of its own, which is shared as that of a node with systemd is.
	err := onThread(func() error {
		if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")); err != nil {
			return err
		}
		before, err := Mounts(nil)
		if err != nil {
			return err
		}
		namespace, err := NewBareNamespace()
		if err != nil {
			return err
		}
		defer namespace.Close()
		opened, err := OpenDir(dir)
		if err != nil {
			return err
		}
		defer opened.Close()
		var output []byte
		err = InMountNamespace(namespace, opened, func() (err error) {
			output, err = exec.Command("sh", "-c", "echo y > made; cat /proc/self/mounts").CombinedOutput()
			return err
		})
		if err != nil {
			return err
		}
		if count := strings.Count(string(output), "\n"); count != 3 {
			t.Errorf("the program sees %d mounts, want 3: %s", count, output)
		}
		after, err := Mounts(nil)
		if len(after) != len(before) {
			t.Errorf("%d mounts, and %d before", len(after), len(before))
		}
		return err
	})
	must(t, err)
	if _, err := os.Stat(dir + "/made"); err != nil {
		t.Errorf("the working directory was another one: %v", err)
	}
}
