package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// mountImage mounts a new file system of that name and size at a directory that it makes, and unmounts it at the end
// of the test. Those that are written once have content in them.
func mountImage(t *testing.T, name string, size int64, path, content string) {
	t.Helper()
	makeImage(t, name, path+".img", size, content)
	mountExisting(t, name, path+".img", path)
}

// makeImage makes a file system in an image file.
func makeImage(t *testing.T, name, image string, size int64, content string) {
	t.Helper()
	mustRun(t, drivertest.MakeImage(name, image, size, content))
}

// mustRun is must for a program that may not be installed.
func mustRun(t *testing.T, err error) {
	t.Helper()
	needs.Program(t, err)
	must(t, err)
}

// mountExisting mounts the file system in an image file, and unmounts it at the end of the test. Where this kernel has no
// quotas for it, which is proved by the mount that it refuses, the test is skipped.
func mountExisting(t *testing.T, name, image, path string) {
	t.Helper()
	must(t, os.MkdirAll(path, 0o755))
	if err := drivertest.MountImage(name, image, path); err != nil && strings.Contains(name, "quota") {
		t.Skipf("this kernel does not mount it: %v", err)
	} else {
		must(t, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
}

// fill writes files to a directory.
func fill(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		write(t, filepath.Join(dir, name), content)
	}
}
