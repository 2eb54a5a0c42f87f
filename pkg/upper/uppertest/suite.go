// Package uppertest is the suite that every kind of upper passes.
package uppertest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Prepare makes an upper ready, with a root that looks like this.
type Prepare func(ctx context.Context, root upper.RootAttr) (upper.Dirs, error)

// Run runs the suite over one kind. make returns a new upper, on a file system that can hold it, each time.
func Run(t *testing.T, make func(t *testing.T) (prepare Prepare, release func() error)) {
	t.Run("root looks like the layer", func(t *testing.T) {
		prepare, _ := make(t)
		dirs := mustPrepare(t, prepare, upper.RootAttr{UID: 1000, GID: 2000, Mode: 0o2770})
		var stat unix.Stat_t
		if err := unix.Fstat(int(dirs.Upper.Fd()), &stat); err != nil || stat.Mode&0o7777 != 0o2770 || stat.Uid != 1000 || stat.Gid != 2000 {
			t.Errorf("mode %o, owner %d:%d, %v", stat.Mode&0o7777, stat.Uid, stat.Gid, err)
		}
		if dirs.Existed {
			t.Error("a new upper existed")
		}
	})
	t.Run("prepared again it has what was written", func(t *testing.T) {
		prepare, release := make(t)
		first := mustPrepare(t, prepare, plain)
		write(t, first.Upper, "kept")
		for range 2 {
			if err := release(); err != nil {
				t.Fatal(err)
			}
		}
		first.Close()
		second := mustPrepare(t, prepare, plain)
		if !second.Existed {
			t.Error("an upper that was there did not exist")
		}
		if err := unix.Faccessat(int(second.Upper.Fd()), "kept", unix.F_OK, 0); err != nil {
			t.Errorf("what was written is gone: %v", err)
		}
	})
	t.Run("an overlay mounts on it", func(t *testing.T) {
		prepare, release := make(t)
		dirs := mustPrepare(t, prepare, plain)
		target := t.TempDir()
		options := "lowerdir=" + t.TempDir() + ",upperdir=" + proc(dirs.Upper) + ",workdir=" + proc(dirs.Work)
		if err := unix.Mount("overlay", target, "overlay", 0, options); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(target, "f"), nil, 0o644); err != nil {
			t.Error(err)
		}
		if err := unix.Unmount(target, 0); err != nil {
			t.Fatal(err)
		}
		dirs.Close()
		if err := release(); err != nil {
			t.Error(err)
		}
	})
}

// plain is the root that most layers have.
var plain = upper.RootAttr{Mode: 0o755}

func mustPrepare(t *testing.T, prepare Prepare, root upper.RootAttr) upper.Dirs {
	t.Helper()
	dirs, err := prepare(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(dirs.Close)
	return dirs
}

func write(t *testing.T, dir *os.File, name string) {
	t.Helper()
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
}

func proc(dir *os.File) string {
	return fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
}
