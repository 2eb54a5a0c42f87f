// Package erofstest checks EROFS images by what else reads them: fsck.erofs, go-erofs, and the kernel.
package erofstest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/erofs"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// MaxHashed is the size of the largest file whose content is compared: others may have holes that are larger than memory.
const MaxHashed = 64 << 20

const (
	// goMaxXattr is the size of an attribute that go-erofs 0.3.1 reads in any case, also a shared one: it takes no more than a block of
	// these.
	goMaxXattr = 3500
	// maxDepth is how deep trees may be for the others: fsck.erofs 1.5 runs out of stack, and go-erofs looks up each path from the root.
	maxDepth = 50
)

const (
	whiteout = "whiteout"
	// largeXattr stands for the value of an attribute that is larger than goMaxXattr, with its hash.
	largeXattr = "hash of a large value: "
)

// Tree describes a tree: a line of attributes for each path.
type Tree map[string]string

// Check checks an image of two files. fsck.erofs must find no fault, and go-erofs must read what the kernel does, as far as they can. Check
// returns the path of the kernel's mount, which ends with the test. It skips the test where the kernel mounts no images from files.
func Check(t testing.TB, metadata, data string) string {
	t.Helper()
	mounted := Mount(t, metadata, data)
	tree := Read(t, mounted)
	isDeep, hasLarge := false, false
	for name, line := range tree {
		isDeep = isDeep || strings.Count(name, "/") > maxDepth
		hasLarge = hasLarge || strings.Contains(line, largeXattr)
	}
	if !isDeep {
		Fsck(t, metadata, data)
	}
	if !isDeep && !hasLarge {
		tree.Compare(t, "go-erofs", ReadByGo(t, metadata, data))
	}
	return mounted
}

// Fsck runs fsck.erofs, where it is installed.
func Fsck(t testing.TB, metadata, data string) {
	t.Helper()
	output, err := exec.Command("fsck.erofs", "--extract", "--device="+data, metadata).CombinedOutput()
	if err != nil && !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("fsck.erofs: %v\n%s", err, output)
	}
}

// Mount mounts an image until the test ends, and returns a path of its root.
func Mount(t testing.TB, metadata, data string) string {
	t.Helper()
	return linux.ProcPath(MountFile(t, metadata, data)) + "/."
}

// MountFile mounts an image until the test ends, and returns its root.
func MountFile(t testing.TB, metadata, data string) *os.File {
	t.Helper()
	files := make([]*os.File, 2)
	for i, path := range []string{metadata, data} {
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		files[i] = file
	}
	mounted, err := erofs.Mount(files[0], files[1])
	if errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.ENODEV) {
		t.Skipf("this kernel mounts no EROFS image from files: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mounted.Close() })
	return mounted
}

// Read returns a tree as the kernel shows it. Names of the same inode have the first of them in their lines.
func Read(t testing.TB, root string) Tree {
	t.Helper()
	found, inodes := Tree{}, map[uint64]string{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var stat unix.Stat_t
		if err := unix.Lstat(path, &stat); err != nil {
			return err
		}
		if got := unixType(entry.Type()); name != "." && got != stat.Mode&unix.S_IFMT {
			return fmt.Errorf("%q has the type %o in its directory, and %o itself", name, got, stat.Mode&unix.S_IFMT)
		}
		if stat.Mode&unix.S_IFMT == unix.S_IFCHR && stat.Rdev == 0 {
			// overlayfs ignores the attributes of a whiteout.
			found[name] = whiteout
			return nil
		}
		line := attributes{
			mode: stat.Mode, uid: stat.Uid, gid: stat.Gid, seconds: stat.Mtim.Sec, nanos: stat.Mtim.Nsec, links: uint64(stat.Nlink),
			xattrs: xattrsOf(t, path),
		}
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			line.size = stat.Size
			if stat.Size <= MaxHashed {
				file, err := os.Open(path)
				if err != nil {
					return err
				}
				defer file.Close()
				line.content = contentOf(t, file)
			}
		case unix.S_IFLNK:
			if line.content, err = os.Readlink(path); err != nil {
				return err
			}
		case unix.S_IFCHR, unix.S_IFBLK:
			line.device = stat.Rdev
		}
		if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
			if inodes[stat.Ino] == "" {
				inodes[stat.Ino] = name
			}
			line.first = inodes[stat.Ino]
		}
		found[name] = line.String()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// ReadByGo returns a tree as go-erofs reads it, as far as Read does.
func ReadByGo(t testing.TB, metadata, data string) Tree {
	t.Helper()
	var readers []io.ReaderAt
	for _, path := range []string{metadata, data} {
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		readers = append(readers, padded{file})
	}
	image, err := goerofs.Open(readers[0], goerofs.WithExtraDevices(readers[1]))
	if err != nil {
		t.Fatal(err)
	}
	links := image.(fs.ReadLinkFS)
	found, inodes := Tree{}, map[uint64]string{}
	// fs.WalkDir takes no names that are not UTF-8.
	var walk func(name string) error
	walk = func(name string) error {
		info, err := links.Lstat(name)
		if err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		stat := info.Sys().(*goerofs.Stat)
		line := attributes{
			mode: unixMode(stat.Mode), uid: stat.UID, gid: stat.GID, seconds: int64(stat.Mtime), nanos: int64(stat.MtimeNs),
			links: uint64(stat.Nlink), xattrs: map[string]string{},
		}
		for attribute, value := range stat.Xattrs {
			// It takes the names of access control lists for prefixes.
			line.xattrs[strings.TrimSuffix(attribute, ".")] = value
		}
		switch line.mode & unix.S_IFMT {
		case unix.S_IFREG:
			line.size = info.Size()
			if line.size <= MaxHashed {
				file, err := image.Open(name)
				if err != nil {
					return err
				}
				defer file.Close()
				line.content = contentOf(t, file)
			}
		case unix.S_IFLNK:
			if line.content, err = links.ReadLink(name); err != nil {
				return err
			}
		case unix.S_IFCHR, unix.S_IFBLK:
			line.device = uint64(stat.Rdev)
		}
		if line.mode&unix.S_IFMT == unix.S_IFCHR && line.device == 0 {
			found[name] = whiteout
			return nil
		}
		if !info.IsDir() {
			ino := uint64(stat.Ino)
			if inodes[ino] == "" {
				inodes[ino] = name
			}
			line.first = inodes[ino]
		}
		found[name] = line.String()
		if !info.IsDir() {
			return nil
		}
		entries, err := image.(fs.ReadDirFS).ReadDir(name)
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if err := walk(filepath.Join(name, entry.Name())); err != nil {
				return err
			}
		}
		return nil
	}
	if err := walk("."); err != nil {
		t.Errorf("go-erofs: %v", err)
	}
	return found
}

// padded is a file with zeros after its end: go-erofs reads whole blocks.
type padded struct{ file *os.File }

func (p padded) ReadAt(data []byte, offset int64) (int, error) {
	n, err := p.file.ReadAt(data, offset)
	if errors.Is(err, io.EOF) {
		clear(data[n:])
		return len(data), nil
	}
	return n, err
}

// Compare reports the differences of a tree that something else has read.
func (want Tree) Compare(t testing.TB, reader string, got Tree) {
	t.Helper()
	names := map[string]bool{}
	for _, tree := range []Tree{want, got} {
		for name := range tree {
			names[name] = true
		}
	}
	differences := 0
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if want[name] == got[name] {
			continue
		}
		if differences++; differences <= 10 {
			t.Errorf("%.200q by %s:\n got %.1000s\nwant %.1000s", name, reader, got[name], want[name])
		}
	}
	if differences > 10 {
		t.Errorf("and %d others", differences-10)
	}
}

// attributes are what is compared of a file.
type attributes struct {
	mode, uid, gid uint32
	seconds, nanos int64
	links, device  uint64
	size           int64
	// content is the hash of a regular file, or the target of a link.
	content string
	// first is the first name of the inode.
	first  string
	xattrs map[string]string
}

func (a attributes) String() string {
	line := fmt.Sprintf("mode %o owner %d:%d time %d.%09d links %d", a.mode, a.uid, a.gid, a.seconds, a.nanos, a.links)
	line += fmt.Sprintf(" device %d size %d content %q as %q", a.device, a.size, a.content, a.first)
	for _, name := range slices.Sorted(maps.Keys(a.xattrs)) {
		value := a.xattrs[name]
		if len(value) > goMaxXattr {
			value = fmt.Sprintf("%s%x", largeXattr, sha256.Sum256([]byte(value)))
		}
		line += fmt.Sprintf(" %s=%q", name, value)
	}
	return line
}

func contentOf(t testing.TB, from io.Reader) string {
	t.Helper()
	hash := sha256.New()
	if _, err := io.Copy(hash, from); err != nil {
		t.Error(err)
	}
	return fmt.Sprintf("%x", hash.Sum(nil)[:8])
}

func xattrsOf(t testing.TB, path string) map[string]string {
	t.Helper()
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, name := range strings.FieldsFunc(string(list[:n]), func(r rune) bool { return r == 0 }) {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			t.Fatal(err)
		}
		found[name] = string(value[:n])
	}
	return found
}

// unixMode returns st_mode for a mode of package fs.
func unixMode(mode fs.FileMode) uint32 {
	bits := unixType(mode) | uint32(mode.Perm())
	for flag, bit := range map[fs.FileMode]uint32{
		fs.ModeSetuid: syscall.S_ISUID, fs.ModeSetgid: syscall.S_ISGID, fs.ModeSticky: syscall.S_ISVTX,
	} {
		if mode&flag != 0 {
			bits |= bit
		}
	}
	return bits
}

func unixType(mode fs.FileMode) uint32 {
	for of, bits := range map[fs.FileMode]uint32{
		fs.ModeDir: unix.S_IFDIR, fs.ModeSymlink: unix.S_IFLNK, fs.ModeNamedPipe: unix.S_IFIFO, fs.ModeDevice: unix.S_IFBLK,
		fs.ModeDevice | fs.ModeCharDevice: unix.S_IFCHR,
	} {
		if mode.Type() == of {
			return bits
		}
	}
	return unix.S_IFREG
}
