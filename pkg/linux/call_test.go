package linux

import (
	"os"
	"syscall"
	"testing"
)

func TestFullPath(t *testing.T) {
	named := func(name string) *os.File {
		fd, err := syscall.Open("/", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		dir := os.NewFile(uintptr(fd), name)
		t.Cleanup(func() { dir.Close() })
		return dir
	}
	for name, c := range map[string]struct {
		dir        *os.File
		path, want string
	}{
		"no directory":     {nil, "a/b", "a/b"},
		"beneath":          {named("/data"), "a/b", "/data/a/b"},
		"the directory":    {named("/data"), "", "/data"},
		"in the root":      {named("/"), "tmp", "/tmp"},
		"from the root on": {named("/"), "/tmp/x", "/tmp/x"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := fullPath(c.dir, c.path); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}
