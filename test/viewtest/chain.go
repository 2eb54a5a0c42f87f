package viewtest

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Chain is a number of uppers over layers, all in one directory.
type Chain struct {
	Dir string
	// Uppers and Layers are paths, the topmost first.
	Uppers, Layers []string
	Metacopy       bool
	random         *rand.Rand
}

// NewChain makes layers with random trees.
func NewChain(t testing.TB, dir string, seed uint64) *Chain {
	t.Helper()
	c := &Chain{Dir: dir, random: rand.New(rand.NewPCG(seed, 1))}
	c.Metacopy = c.random.IntN(2) == 0
	c.Layers = c.NewLayers(t, "l")
	return c
}

// NewLayers makes one to three layers. The first two names of chains are the same.
func (c *Chain) NewLayers(t testing.TB, prefix string) (layers []string) {
	t.Helper()
	for i := range 1 + c.random.IntN(3) {
		layer := filepath.Join(c.Dir, fmt.Sprintf("%s%d", prefix, i))
		if err := os.Mkdir(layer, 0o755); err != nil {
			t.Fatal(err)
		}
		c.Change(layer, 25)
		layers = append(layers, layer)
	}
	return layers
}

// Grow makes uppers on top, each by changes in a view of what is there.
func (c *Chain) Grow(t testing.TB, uppers, changes int) {
	t.Helper()
	for range uppers {
		name := filepath.Join(c.Dir, fmt.Sprintf("u%d", len(c.Uppers)))
		for _, dir := range []string{name, name + ".work"} {
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		o := Overlay{Lowers: append(append([]string{}, c.Uppers...), c.Layers...), Upper: name, Work: name + ".work", Metacopy: c.Metacopy}
		target := filepath.Join(c.Dir, "view")
		unmount, err := o.Mount(target)
		if err != nil {
			t.Fatal(err)
		}
		c.Change(target, c.random.IntN(changes)+1)
		if err := unmount(); err != nil {
			t.Fatal(err)
		}
		c.Uppers = append([]string{name}, c.Uppers...)
	}
}

// IntN returns a random number below n.
func (c *Chain) IntN(n int) int { return c.random.IntN(n) }

// Change makes random changes in a tree. Those that fail are fine: a name may have no directory above it, for instance.
func (c *Chain) Change(root string, count int) {
	for range count {
		c.change(root)
	}
}

// path returns a random path: one that exists, or often one that does not.
func (c *Chain) path(root string) string {
	path := root
	for range 4 {
		if c.random.IntN(4) == 0 && path != root {
			break
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			break
		}
		if len(entries) == 0 || c.random.IntN(4) == 0 {
			return filepath.Join(path, c.name())
		}
		path = filepath.Join(path, entries[c.random.IntN(len(entries))].Name())
	}
	return path
}

func (c *Chain) dirPath(root string) string {
	for range 8 {
		path := c.path(root)
		if stat, err := os.Lstat(path); err == nil && stat.IsDir() && path != root {
			return path
		}
	}
	return c.path(root)
}

func (c *Chain) newPath(root string) string {
	path := c.path(root)
	for range 4 {
		if _, err := os.Lstat(path); err != nil {
			return path
		}
		if stat, err := os.Lstat(path); err == nil && stat.IsDir() {
			path = filepath.Join(path, c.name())
		} else {
			path = filepath.Join(filepath.Dir(path), c.name())
		}
	}
	return path
}

func (c *Chain) name() string { return string(rune('a' + c.random.IntN(7))) }

func (c *Chain) time() time.Time {
	return time.Unix(int64(c.random.IntN(1<<30)), int64(c.random.IntN(1e9)))
}

func (c *Chain) change(root string) {
	switch c.random.IntN(25) {
	case 0, 1:
		write(c.newPath(root), strings.Repeat(c.name(), c.random.IntN(9000)))
	case 2:
		write(c.path(root), c.name())
	case 3, 4, 5:
		_ = os.Mkdir(c.newPath(root), fs.FileMode(0o700+c.random.IntN(64)))
	case 6:
		path := c.newPath(root)
		_ = os.MkdirAll(filepath.Join(path, c.name(), c.name()), 0o755)
		write(filepath.Join(path, c.name()), "x")
	case 7:
		if path := c.path(root); path != root {
			_ = os.RemoveAll(path)
		}
	case 8:
		_ = os.Remove(c.path(root))
	case 9, 10:
		_ = unix.Rename(c.dirPath(root), c.newPath(root))
	case 11:
		// Within its directory, for a relative redirect.
		if path := c.dirPath(root); path != root {
			_ = unix.Rename(path, filepath.Join(filepath.Dir(path), c.name()))
		}
	case 12:
		_ = unix.Rename(c.path(root), c.path(root))
	case 13:
		_ = unix.Renameat2(unix.AT_FDCWD, c.path(root), unix.AT_FDCWD, c.path(root), unix.RENAME_EXCHANGE)
	case 14:
		_ = os.Link(c.path(root), c.newPath(root))
	case 15:
		_ = os.Symlink(c.name(), c.newPath(root))
	case 16:
		// Without these, all of an upper with metacopy would be files with content.
		if path := c.path(root); !isLink(path) {
			_ = os.Chmod(path, fs.FileMode(c.random.IntN(0o1000))|fs.ModeSetuid)
		}
	case 17:
		_ = os.Lchown(c.path(root), c.random.IntN(5), c.random.IntN(5))
	case 18:
		c.setTimes(c.path(root))
	case 19:
		_ = unix.Lsetxattr(c.path(root), "user."+c.name(), []byte(c.name()), 0)
		_ = unix.Lsetxattr(c.path(root), "trusted."+c.name(), []byte(c.name()), 0)
	case 20:
		_ = unix.Lremovexattr(c.path(root), "user."+c.name())
		acl := []byte("\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\x05\x00\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff" +
			"\x10\x00\x04\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff")
		_ = unix.Lsetxattr(c.path(root), "system.posix_acl_access", acl, 0)
		_ = unix.Lsetxattr(c.dirPath(root), "system.posix_acl_default", acl, 0)
	case 21:
		types := []uint32{unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK}
		_ = unix.Mknod(c.newPath(root), types[c.random.IntN(4)]|0o640, int(unix.Mkdev(1, 5)))
	case 22:
		c.writeSparse(c.path(root))
	case 23:
		// A directory that is made again is opaque.
		if path := c.dirPath(root); path != root {
			_ = os.RemoveAll(path)
			_ = os.Mkdir(path, 0o750)
			write(filepath.Join(path, c.name()), "")
		}
	case 24:
		// As another overlay in the view does it.
		_ = unix.Lsetxattr(c.dirPath(root), "trusted.overlay.opaque", []byte("y"), 0)
	}
}

// write replaces the content of a file, which it makes. What is none is left alone: opening a FIFO would wait.
func write(path, content string) {
	if stat, err := os.Stat(path); err == nil && !stat.Mode().IsRegular() {
		return
	}
	_ = os.WriteFile(path, []byte(content), 0o644)
}

func isLink(path string) bool {
	stat, err := os.Lstat(path)
	return err == nil && stat.Mode()&fs.ModeSymlink != 0
}

func (c *Chain) setTimes(path string) {
	accessed, modified := unix.NsecToTimespec(c.time().UnixNano()), unix.NsecToTimespec(c.time().UnixNano())
	_ = unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{accessed, modified}, unix.AT_SYMLINK_NOFOLLOW)
}

func (c *Chain) writeSparse(path string) {
	stat, err := os.Lstat(path)
	if err != nil || !stat.Mode().IsRegular() {
		return
	}
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer file.Close()
	_, _ = file.WriteAt([]byte(c.name()), int64(c.random.IntN(100000)))
	_ = file.Truncate(int64(c.random.IntN(200000)))
}
