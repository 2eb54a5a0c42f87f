package erofs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/erofs"
	"github.com/overlay-csi/overlay-csi/test/erofstest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// builder builds an image, and ends the test where that fails.
type builder struct {
	*erofs.Image
	t              testing.TB
	metadata, data string
}

func build(t testing.TB) *builder {
	t.Helper()
	dir := t.TempDir()
	b := &builder{t: t, metadata: filepath.Join(dir, "metadata"), data: filepath.Join(dir, "data")}
	file, err := os.OpenFile(b.data, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	must(t, err)
	t.Cleanup(func() { file.Close() })
	b.Image = erofs.New(file)
	return b
}

func (b *builder) write() {
	b.t.Helper()
	file, err := os.OpenFile(b.metadata, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	must(b.t, err)
	defer file.Close()
	metadataBytes, dataBytes, err := b.WriteMetadata(file)
	must(b.t, err)
	for path, want := range map[string]int64{b.metadata: metadataBytes, b.data: dataBytes} {
		info, err := os.Stat(path)
		must(b.t, err)
		if info.Size() != want {
			b.t.Errorf("%s has %d bytes, and is said to have %d", path, info.Size(), want)
		}
	}
}

// check writes the image, checks it, and returns the path of its mount.
func (b *builder) check() string {
	b.t.Helper()
	b.write()
	return erofstest.Check(b.t, b.metadata, b.data)
}

// file makes a file with parts of content at their offsets.
func (b *builder) file(dir erofs.Inode, name string, size int64, parts map[int64]string) erofs.Inode {
	b.t.Helper()
	file, err := b.Create(dir, name, 0o644, size)
	must(b.t, err)
	for offset := int64(0); offset < size; offset += 4096 {
		if part, ok := parts[offset]; ok {
			_, err := file.WriteAt([]byte(part), offset)
			must(b.t, err)
		}
		if len(parts) == 0 {
			break
		}
	}
	file.Close()
	return file.Inode()
}

func (b *builder) dir(in erofs.Inode, name string) erofs.Inode {
	b.t.Helper()
	made, err := b.Mkdir(in, name, 0o755)
	must(b.t, err)
	return made
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestEmpty has images without files, or without content.
func TestEmpty(t *testing.T) {
	needs.Root(t)
	nothing := build(t)
	if entries, err := os.ReadDir(nothing.check()); err != nil || len(entries) > 0 {
		t.Errorf("%v, %v", entries, err)
	}
	empty := build(t)
	empty.file(empty.Root(), "f", 0, nil)
	if content, err := os.ReadFile(empty.check() + "/f"); err != nil || len(content) > 0 {
		t.Errorf("%q, %v", content, err)
	}
}

// TestHoles checks what is a hole: whole chunks, wherever they are.
func TestHoles(t *testing.T) {
	needs.Root(t)
	const chunk = 64 << 10
	full := strings.Repeat("x", chunk)
	for name, c := range map[string]struct {
		size  int64
		parts map[int64]string
		// holes are the beginnings of holes in units of chunks, each followed by that of the data after it.
		holes []int64
	}{
		"none":                {2 * chunk, map[int64]string{0: full, chunk: full}, []int64{2}},
		"smaller than chunks": {2 * chunk, map[int64]string{0: "x", chunk + 4096: "x"}, []int64{2}},
		"the beginning":       {2 * chunk, map[int64]string{chunk: full}, []int64{0, 1, 2}},
		"the end":             {2 * chunk, map[int64]string{0: full}, []int64{1}},
		"the middle":          {3 * chunk, map[int64]string{0: full, 2 * chunk: full}, []int64{1, 2, 3}},
		"all":                 {3*chunk + 5, nil, []int64{0}},
		"end within a block":  {3*chunk + 5, map[int64]string{0: full, 3 * chunk: "12345"}, []int64{1, 3, 4}},
		"several":             {5 * chunk, map[int64]string{chunk: full, 3 * chunk: full}, []int64{0, 1, 2, 3, 4}},
	} {
		t.Run(name, func(t *testing.T) {
			b := build(t)
			b.file(b.Root(), "f", c.size, c.parts)
			b.file(b.Root(), "after", 4, map[int64]string{0: "next"})
			file, err := os.Open(b.check() + "/f")
			must(t, err)
			defer file.Close()
			want := make([]byte, c.size)
			for offset, part := range c.parts {
				copy(want[offset:], part)
			}
			got := make([]byte, c.size)
			if _, err := file.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the content differs, %v", err)
			}
			at := int64(0)
			for i, hole := range c.holes {
				whence := unix.SEEK_HOLE
				if i%2 == 1 {
					whence = unix.SEEK_DATA
				}
				if at, err = unix.Seek(int(file.Fd()), at, whence); err != nil || at != min(hole*chunk, c.size) {
					t.Errorf("%d of %v is at %d, %v", i, c.holes, at, err)
				}
			}
		})
	}
}

// TestLargeFiles has files whose holes are larger than a disk. They take next to nothing.
func TestLargeFiles(t *testing.T) {
	needs.Root(t)
	b := build(t)
	sizes := map[string]int64{"1 TiB": 1 << 40, "5 GiB": 5 << 30, "4 GiB and 1": 1<<32 + 1}
	for name, size := range sizes {
		b.file(b.Root(), name+" of zeros", size, nil)
		file, err := b.Create(b.Root(), name, 0o644, size)
		must(t, err)
		_, err = file.WriteAt([]byte("first"), 0)
		must(t, err)
		_, err = file.WriteAt([]byte("x"), (size-1)/4096*4096)
		must(t, err)
		file.Close()
	}
	root := b.check()
	for name, size := range sizes {
		file, err := os.Open(filepath.Join(root, name))
		must(t, err)
		defer file.Close()
		info, err := file.Stat()
		must(t, err)
		at := make([]byte, 1)
		if _, err := file.ReadAt(at, (size-1)/4096*4096); info.Size() != size || err != nil || at[0] != 'x' {
			t.Errorf("%s: %d bytes, %q, %v", name, info.Size(), at, err)
		}
		if _, err := file.ReadAt(at, size/2); err != nil || at[0] != 0 {
			t.Errorf("%s: %q in the middle, %v", name, at, err)
		}
	}
	var stat unix.Stat_t
	must(t, unix.Stat(b.metadata, &stat))
	if stat.Size > 3<<20 {
		t.Errorf("the metadata has %d bytes", stat.Size)
	}
	must(t, unix.Stat(b.data, &stat))
	if stat.Blocks*512 > 1<<20 {
		t.Errorf("the data takes %d bytes", stat.Blocks*512)
	}
	huge := build(t)
	if _, err := huge.Create(huge.Root(), "f", 0o644, 1<<62); !errors.Is(err, erofs.ErrCannotHold) {
		t.Errorf("a file of 2^62 bytes: %v", err)
	}
}

// TestLargeDirectories has directories of several blocks, with names that end where blocks do, and names before "." and "..".
func TestLargeDirectories(t *testing.T) {
	needs.Root(t)
	b := build(t)
	want := map[string]int{}
	for dirNumber, count := range []int{0, 1, 14, 15, 16, 17, 200, 5000} {
		dirName := fmt.Sprint("dir-", dirNumber)
		dir := b.dir(b.Root(), dirName)
		for i := range count {
			name := fmt.Sprintf("%0*d", 1+(i*7)%255, i)
			switch i % 5 {
			case 1:
				name = "!" + name[1:] + "-"
			case 2:
				name = "." + name[1:] + "."
			}
			if len(name) > 255 || name == ".." || name == "." {
				name = fmt.Sprint(i)
			}
			_, err := b.Mknod(dir, name, syscall.S_IFIFO|0o600, 0)
			if errors.Is(err, syscall.EEXIST) {
				continue
			}
			must(t, err)
			want[dirName]++
		}
	}
	root := b.check()
	for name, count := range want {
		entries, err := os.ReadDir(filepath.Join(root, name))
		if err != nil || len(entries) != count {
			t.Errorf("%s has %d entries, want %d, %v", name, len(entries), count, err)
		}
		for _, entry := range entries {
			// The kernel searches for each name in the blocks.
			if _, err := os.Lstat(filepath.Join(root, name, entry.Name())); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestNamesAndDepths has the longest names, paths and links that Linux takes, and directories deeper than a path.
func TestNamesAndDepths(t *testing.T) {
	needs.Root(t)
	b := build(t)
	b.file(b.Root(), strings.Repeat("n", 255), 1, map[int64]string{0: "x"})
	target := strings.Repeat("t", 4095)
	for n := range 300 {
		_, err := b.Symlink(target[:1+n*4094/299], b.Root(), fmt.Sprint("link-", n))
		must(t, err)
	}
	root := b.check()
	for n := range 300 {
		if got, err := os.Readlink(fmt.Sprint(root, "/link-", n)); err != nil || got != target[:1+n*4094/299] {
			t.Errorf("link %d has %d bytes, %v", n, len(got), err)
		}
	}
	deep := build(t)
	dir := deep.Root()
	const depth = 3000
	for range depth {
		dir = deep.dir(dir, "d")
	}
	deep.file(dir, strings.Repeat("n", 255), 1, map[int64]string{0: "x"})
	deep.write()
	// fsck.erofs 1.5 runs out of stack.
	at, err := unix.Open(erofstest.Mount(t, deep.metadata, deep.data), unix.O_PATH, 0)
	must(t, err)
	for range depth {
		next, err := unix.Openat(at, "d", unix.O_PATH, 0)
		unix.Close(at)
		must(t, err)
		at = next
	}
	defer unix.Close(at)
	var stat unix.Stat_t
	must(t, unix.Fstatat(at, strings.Repeat("n", 255), &stat, unix.AT_SYMLINK_NOFOLLOW))
}

// TestAttributes has attributes of all sizes, one and many, shared and not, with everything else that may follow an inode.
func TestAttributes(t *testing.T) {
	needs.Root(t)
	// go-erofs reads the first.
	checkAttributes(t, build(t), []int{0, 1, 3, 4, 100, 3400, 3490, 3500})
	checkAttributes(t, build(t), []int{3900, 3980, 4000, 4030, 4050, 4096, 5000, 20_000, 65_535})
}

func checkAttributes(t *testing.T, b *builder, sizes []int) {
	t.Helper()
	for n, size := range sizes {
		value := []byte(strings.Repeat("v", size))
		file := b.file(b.Root(), fmt.Sprint("file-", n), 3, map[int64]string{0: "abc"})
		must(t, b.SetXattr(file, "user.own", append([]byte(fmt.Sprint(n)), value...)[:min(size+2, 65_535)]))
		dir := b.dir(b.Root(), fmt.Sprint("dir-", n))
		b.dir(dir, "in")
		link, err := b.Symlink("target", b.Root(), fmt.Sprint("link-", n))
		must(t, err)
		for _, of := range []erofs.Inode{dir, link} {
			must(t, b.SetXattr(of, "trusted.x"+fmt.Sprint(n), value))
			must(t, b.SetXattr(of, "security.shared", []byte("all")))
		}
	}
	many := []erofs.Inode{b.file(b.Root(), "many", 0, nil), b.file(b.Root(), "many-too", 0, nil)}
	for i := range 400 {
		for _, of := range many {
			must(t, b.SetXattr(of, fmt.Sprint("user.", i), []byte(fmt.Sprint(i))))
		}
	}
	must(t, b.RemoveXattr(many[1], "user.7"))
	root := b.check()
	for n, size := range sizes {
		value := make([]byte, 64<<10)
		got, err := unix.Lgetxattr(fmt.Sprint(root, "/link-", n), "trusted.x"+fmt.Sprint(n), value)
		if err != nil || got != size || strings.Trim(string(value[:got]), "v") != "" {
			t.Errorf("an attribute of %d bytes has %d, %v", size, got, err)
		}
	}
}

// TestLinksAndRemovals checks what is left of files and directories that were removed.
func TestLinksAndRemovals(t *testing.T) {
	needs.Root(t)
	b := build(t)
	file := b.file(b.Root(), "a", 5, map[int64]string{0: "hello"})
	dir := b.dir(b.Root(), "d")
	must(t, b.Link(file, dir, "b"))
	must(t, b.Link(file, b.Root(), "c"))
	must(t, b.Remove(b.Root(), "a"))
	gone := b.dir(b.Root(), "gone")
	b.file(b.dir(gone, "in"), "f", 5, map[int64]string{0: "hello"})
	must(t, b.Link(file, gone, "d"))
	must(t, b.Remove(b.Root(), "gone"))
	for n := range 100_000 {
		name := fmt.Sprint("n", n%10)
		b.file(b.Root(), name, 0, nil)
		must(t, b.Remove(b.Root(), name))
	}
	b.dir(b.Root(), "gone")
	b.SetTime(file, time.Unix(-5, 7))
	root := b.check()
	var names []string
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		names = append(names, strings.TrimPrefix(path, filepath.Clean(root)))
		return err
	}))
	if got := strings.Join(names[1:], " "); got != "/c /d /d/b /gone" {
		t.Errorf("the image has %s", got)
	}
}
