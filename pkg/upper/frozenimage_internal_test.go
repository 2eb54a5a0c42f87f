package upper

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// TestOpenAttached: a kernel before Linux 6.15 makes no clone of a detached mount. What is attached for that is not left, and what a crash
// leaves is detached at start.
func TestOpenAttached(t *testing.T) {
	needs.Root(t)
	content, path := t.TempDir(), filepath.Join(t.TempDir(), imageName)
	if err := os.Mkdir(filepath.Join(content, upperName), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(content, upperName, "file"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if output, err := exec.Command(makeExt4, "-q", "-F", "-d", content, path, "8M").CombinedOutput(); err != nil {
		t.Skipf("no ext4 can be made here: %v: %s", err, output)
	}
	image, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	b := &Backends{config: Config{MountDir: filepath.Join(t.TempDir(), "mounts")}}
	mounted, err := b.mountFrozenImage(image)
	if err != nil {
		t.Fatal(err)
	}
	defer mounted.Close()
	dir, err := b.openAttached(mounted)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if content, err := os.ReadFile(linux.ProcPath(dir) + "/file"); err != nil || string(content) != "content" {
		t.Errorf("a file in it has %q, %v", content, err)
	}
	if left, err := os.ReadDir(b.config.MountDir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}

	left := filepath.Join(b.config.MountDir, attachedPrefix+"left")
	if err := os.Mkdir(left, 0o700); err != nil {
		t.Fatal(err)
	}
	target, err := linux.OpenDir(left)
	if err != nil {
		t.Fatal(err)
	}
	again, err := b.mountFrozenImage(image)
	if err == nil {
		err = linux.MoveMount(again, target)
		again.Close()
	}
	target.Close()
	if err != nil {
		t.Fatal(err)
	}
	clearMountDir(b.config.MountDir)
	if left, err := os.ReadDir(b.config.MountDir); err != nil || len(left) > 0 {
		t.Errorf("left after a start: %v, %v", left, err)
	}
}
