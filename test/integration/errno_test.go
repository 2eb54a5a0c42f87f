package integration

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

func isErrno(err error, want unix.Errno) bool { return errors.Is(err, want) }

func wantXattr(t *testing.T, path, name, want string) {
	t.Helper()
	value := make([]byte, 256)
	n, err := unix.Getxattr(path, name, value)
	if err != nil {
		t.Errorf("%s of %s: %v", name, path, err)
	} else if string(value[:n]) != want {
		t.Errorf("%s of %s is %q instead of %q", name, path, value[:n], want)
	}
}

func procFD(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// kernelAtLeast is for tests of what only a newer kernel has.
func kernelAtLeast(t *testing.T, major, minor int) bool {
	t.Helper()
	var name unix.Utsname
	must(t, unix.Uname(&name))
	var gotMajor, gotMinor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &gotMajor, &gotMinor); err != nil {
		t.Fatal(err)
	}
	return gotMajor > major || (gotMajor == major && gotMinor >= minor)
}

// mountTmpfs mounts a tmpfs for the time of the test.
func mountTmpfs(t *testing.T, path string) {
	t.Helper()
	must(t, unix.Mount("tmpfs", path, "tmpfs", 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
}

// syncFS writes everything of a file system to its disk: a volatile view leaves fsync out.
func syncFS(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd)
}
