package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// makers are the programs that make a file system of each kind in an image file. For those that are written once,
// content is a directory that goes in.
var makers = map[string]func(image, content string) *exec.Cmd{
	"ext4":     func(image, _ string) *exec.Cmd { return exec.Command("mkfs.ext4", "-q", "-F", image) },
	"xfs":      func(image, _ string) *exec.Cmd { return exec.Command("mkfs.xfs", "-q", "-f", image) },
	"btrfs":    func(image, _ string) *exec.Cmd { return exec.Command("mkfs.btrfs", "-q", "-f", image) },
	"erofs":    func(image, content string) *exec.Cmd { return exec.Command("mkfs.erofs", "-Enosbcrc", image, content) },
	"squashfs": func(image, content string) *exec.Cmd { return exec.Command("mksquashfs", content, image, "-quiet") },
}

// mountImage mounts a new file system of that kind and size at a directory that it makes, and unmounts it at the end
// of the test.
func mountImage(t *testing.T, kind string, size int64, path, content string) {
	t.Helper()
	image := path + ".img"
	if kind != "erofs" && kind != "squashfs" {
		must(t, os.WriteFile(image, nil, 0o600))
		must(t, os.Truncate(image, size))
	}
	runCommand(t, makers[kind](image, content))
	must(t, os.MkdirAll(path, 0o755))
	mountExisting(t, image, path)
}

// mountExisting mounts the file system in an image file, and unmounts it at the end of the test.
func mountExisting(t *testing.T, image, path string) {
	t.Helper()
	runCommand(t, exec.Command("mount", "-o", "loop", image, path))
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
}

// runCommand runs a program that the test needs. Where it is not installed the test is skipped, which says what to
// install; with OVERLAY_CSI_TEST_ALL, as in CI, it fails.
func runCommand(t *testing.T, command *exec.Cmd) {
	t.Helper()
	if _, err := exec.LookPath(command.Path); err != nil {
		if os.Getenv("OVERLAY_CSI_TEST_ALL") != "" {
			t.Fatalf("%s is not installed", command.Args[0])
		}
		t.Skipf("%s is not installed", command.Args[0])
	}
	if output, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, output)
	}
}

// fill writes files to a directory.
func fill(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		write(t, filepath.Join(dir, name), content)
	}
}
