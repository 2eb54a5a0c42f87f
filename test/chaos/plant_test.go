package chaos

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// plantedThings make what an upper at a path in another volume meets. The driver must refuse it or live with it, and nothing outside
// of the volume may change.
var plantedThings = map[string]func(w *world, up string) error{
	"link":   func(w *world, up string) error { return os.Symlink(w.canary(), up) },
	"fifo":   func(_ *world, up string) error { return unix.Mkfifo(up, 0o666) },
	"device": func(_ *world, up string) error { return unix.Mknod(up, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 130))) },
	"file":   func(_ *world, up string) error { return os.WriteFile(up, nil, 0o666) },
	"owner": func(w *world, up string) error {
		if err := os.Mkdir(up, 0o777); err != nil {
			return err
		}
		owner := filepath.Join(up, "overlay-csi.json")
		switch w.random.IntN(3) {
		case 0:
			return unix.Mknod(owner, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 130)))
		case 1:
			return os.Symlink(filepath.Join(w.canary(), "key"), owner)
		}
		return os.WriteFile(owner, []byte(`{"layers": [`), 0o666)
	},
}
