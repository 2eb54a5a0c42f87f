package diff_test

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var (
	seed  = flag.Uint64("seed", 1, "the first seed of TestRandomWalk")
	seeds = flag.Uint64("seeds", 15, "how many seeds TestRandomWalk takes")
)

// TestRandomWalk writes layers and uppers by random steps, and compares what unpackers make of the layer with the view.
func TestRandomWalk(t *testing.T) {
	for n := range *seeds {
		t.Run(fmt.Sprint(*seed+n), func(t *testing.T) {
			random := rand.New(rand.NewPCG(*seed+n, 15))
			s := newStack(t)
			s.metacopy = random.IntN(2) == 0
			for range 1 + random.IntN(3) {
				layer := s.layers[0]
				if s.mounted > 1 {
					layer = s.addLayer()
				}
				w := &writer{t: t, random: random, root: layer, isLayer: true}
				for range 60 {
					w.step()
				}
			}
			for range 1 + random.IntN(4) {
				s.write(func(view string) {
					w := &writer{t: t, random: random, root: view}
					for range random.IntN(80) {
						w.step()
					}
				})
			}
			roundTrip(t, s)
		})
	}
}

// writer changes a tree by random steps.
type writer struct {
	t      *testing.T
	random *rand.Rand
	root   string
	// isLayer is set for a layer, which has whiteouts and no files with several links: a copy of one of them is no link to the other.
	isLayer bool
}

// pick returns the path of an entry of the tree, the root excepted, "" if there is none.
func (w *writer) pick(is func(fs.DirEntry) bool) string {
	var paths []string
	must(w.t, filepath.WalkDir(w.root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && path != w.root && is(entry) {
			paths = append(paths, path)
		}
		return err
	}))
	if len(paths) == 0 {
		return ""
	}
	return paths[w.random.IntN(len(paths))]
}

func isDir(entry fs.DirEntry) bool { return entry.IsDir() }
func isReg(entry fs.DirEntry) bool { return entry.Type().IsRegular() }
func isAny(entry fs.DirEntry) bool { return entry.Type() != fs.ModeDevice|fs.ModeCharDevice }

// newPath returns a path in some directory, which may exist.
func (w *writer) newPath() string {
	dir := w.pick(isDir)
	if dir == "" || w.random.IntN(4) == 0 {
		dir = w.root
	}
	name := string(rune('a' + w.random.IntN(7)))
	if w.random.IntN(20) == 0 {
		name = strings.Repeat(name, 255)
	}
	return filepath.Join(dir, name)
}

// step makes one change. Whether it succeeds does not matter, as long as the kernel says why it does not.
func (w *writer) step() {
	w.t.Helper()
	err := w.change()
	for _, allowed := range []error{
		syscall.ENOENT, syscall.EEXIST, syscall.ENOTDIR, syscall.EISDIR, syscall.ENOTEMPTY, syscall.EINVAL, syscall.ENAMETOOLONG,
		syscall.EXDEV, syscall.ELOOP, syscall.EBUSY, syscall.EPERM, syscall.ENXIO,
	} {
		if err == nil || strings.Contains(err.Error(), allowed.Error()) {
			return
		}
	}
	w.t.Fatal(err)
}

func (w *writer) change() error {
	any, file, dir := w.pick(isAny), w.pick(isReg), w.pick(isDir)
	at := time.Unix(w.random.Int64N(2e9), w.random.Int64N(1e9))
	switch w.random.IntN(22) {
	case 0, 1, 2:
		return create(w.newPath(), strings.Repeat("x", w.random.IntN(9000)))
	case 3, 4:
		return os.MkdirAll(filepath.Join(w.newPath(), string(rune('a'+w.random.IntN(7)))), 0o755)
	case 5:
		if w.isLayer {
			// As pkg/unpack makes whiteouts: no view lists them.
			path := w.newPath()
			if err := unix.Mknod(path, unix.S_IFCHR, 0); err != nil {
				return err
			}
			return unix.Setxattr(filepath.Dir(path), "trusted.overlay.origin", nil, 0)
		}
		return os.RemoveAll(any)
	case 6:
		return os.Remove(any)
	case 7, 8:
		return os.Rename(any, w.newPath())
	case 9, 10:
		return os.Rename(dir, w.newPath())
	case 11:
		return unix.Renameat2(unix.AT_FDCWD, any, unix.AT_FDCWD, w.pick(isAny), unix.RENAME_EXCHANGE)
	case 12:
		return os.Symlink("../"+string(rune('a'+w.random.IntN(7))), w.newPath())
	case 13:
		if w.isLayer {
			return nil
		}
		return os.Link(file, w.newPath())
	case 14:
		kinds := []uint32{unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO}
		return unix.Mknod(w.newPath(), kinds[w.random.IntN(3)]|0o640, int(unix.Mkdev(1, 3+w.random.Uint32N(900))))
	case 15:
		return unix.Setxattr(w.pick(func(e fs.DirEntry) bool { return isDir(e) || isReg(e) }), "user.x", []byte(fmt.Sprint(w.random.Int())), 0)
	case 16:
		return os.Lchown(any, w.random.IntN(5), w.random.IntN(5))
	case 17:
		return unix.Chmod(w.pick(func(e fs.DirEntry) bool { return isDir(e) || isReg(e) }), 0o700|w.random.Uint32N(0o7777))
	case 18:
		times := []unix.Timespec{unix.NsecToTimespec(at.UnixNano()), unix.NsecToTimespec(at.UnixNano())}
		return unix.UtimesNanoAt(unix.AT_FDCWD, any, times, unix.AT_SYMLINK_NOFOLLOW)
	case 19:
		return os.Truncate(file, w.random.Int64N(1<<20))
	case 20:
		if err := os.RemoveAll(dir); err != nil || dir == "" || w.isLayer {
			return err
		}
		if w.random.IntN(2) == 0 {
			return create(dir, "file over directory")
		}
		return os.Mkdir(dir, 0o755)
	default:
		return write(file, os.O_APPEND, "appended")
	}
}

// create makes a file. There must be none: what is there may be a device.
func create(path, content string) error { return write(path, os.O_CREATE|os.O_EXCL, content) }

func write(path string, flags int, content string) error {
	file, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|flags, 0o600)
	if err != nil {
		return err
	}
	_, err = file.WriteString(content)
	return errors.Join(err, file.Close())
}
