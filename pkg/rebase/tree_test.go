package rebase

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/needs"
	"github.com/overlay-csi/overlay-csi/test/viewtest"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// memory mounts a tmpfs.
func memory(t testing.TB) string {
	t.Helper()
	needs.Root(t)
	dir, err := os.MkdirTemp("", "rebase")
	must(t, err)
	must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOATIME, "size=1g"))
	t.Cleanup(func() {
		must(t, unix.Unmount(dir, 0))
		must(t, os.Remove(dir))
	})
	return dir
}

// stack is uppers over old layers, and new layers.
type stack struct {
	dir              string
	uppers, old, new []string
	metacopy         bool
	// opened are the mounts and handles of tree.
	undo []func()
}

func (s *stack) overlay(lowers ...[]string) viewtest.Overlay {
	return viewtest.Overlay{Lowers: slices.Concat(lowers...), Metacopy: s.metacopy}
}

// mount mounts an overlay and opens its root.
func (s *stack) mount(t testing.TB, name string, lowers ...[]string) *os.File {
	t.Helper()
	target := filepath.Join(s.dir, name)
	unmount, err := s.overlay(lowers...).Mount(target)
	must(t, err)
	root := s.open(t, target)
	s.undo = append(s.undo, func() {
		root.Close()
		must(t, unmount())
	})
	return root
}

func (s *stack) open(t testing.TB, path string) *os.File {
	t.Helper()
	dir, err := linux.Open(nil, path, os.O_RDONLY|linux.O_DIRECTORY, 0)
	must(t, err)
	return dir
}

// tree mounts what is to be compared. close must be called.
func (s *stack) tree(t testing.TB) Tree {
	t.Helper()
	tree := Tree{
		View: s.mount(t, "v", s.uppers, s.old), Old: s.mount(t, "o", s.old), New: s.mount(t, "n", s.new), OneFileSystem: true,
	}
	for _, path := range s.uppers {
		dir := s.open(t, path)
		s.undo = append(s.undo, func() { dir.Close() })
		tree.Uppers = append(tree.Uppers, dir)
	}
	return tree
}

func (s *stack) close() {
	for _, undo := range slices.Backward(s.undo) {
		undo()
	}
	s.undo = nil
}

// rebase returns the uppers to mount over the new layers, and the conflicts.
func (s *stack) rebase(t testing.TB, policy Policy) (uppers, conflicts []string) {
	t.Helper()
	defer s.close()
	tree := s.tree(t)
	edits, err := Find(t.Context(), tree, policy, func(c Conflict) error {
		conflicts = append(conflicts, fmt.Sprintf("%s%s %s", c.Upper, c.Layers, c.Path))
		return nil
	})
	must(t, err)
	slices.Sort(conflicts)
	if edits == 0 {
		return s.uppers, conflicts
	}
	before := sums(t, s.uppers)
	into, scratch := filepath.Join(s.dir, "w-"+string(policy)), filepath.Join(s.dir, "s-"+string(policy))
	must(t, os.Mkdir(into, 0o700))
	must(t, os.Mkdir(scratch, 0o700))
	intoDir, scratchDir := s.open(t, into), s.open(t, scratch)
	defer intoDir.Close()
	defer scratchDir.Close()
	must(t, Write(t.Context(), tree, policy, intoDir, scratchDir, len(conflicts)%2 == 0))
	if after := sums(t, s.uppers); !slices.Equal(before, after) {
		t.Errorf("the uppers changed:\n%v\n%v", before, after)
	}
	return []string{into}, conflicts
}

// sums describes directories as they are.
func sums(t testing.TB, dirs []string) (all []string) {
	t.Helper()
	for _, dir := range dirs {
		for path, node := range read(t, dir) {
			all = append(all, path+" "+node.text)
		}
	}
	slices.Sort(all)
	return all
}

// node is an entry of a tree: all that is compared of it, and by what name its directory goes on below, in the tests that say it.
type node struct {
	isDir bool
	text  string
	from  string
}

// read describes a tree.
func read(t testing.TB, root string) map[string]node {
	t.Helper()
	nodes := map[string]node{}
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := strings.CutPrefix(strings.TrimPrefix(path, root), "/")
		if name == "" {
			return nil
		}
		var stat unix.Stat_t
		must(t, unix.Lstat(path, &stat))
		n := node{isDir: stat.Mode&unix.S_IFMT == unix.S_IFDIR}
		n.text = fmt.Sprintf("%o %d:%d %#x", stat.Mode, stat.Uid, stat.Gid, stat.Rdev)
		attributes := map[string]string{}
		list := make([]byte, 64<<10)
		size, err := unix.Llistxattr(path, list)
		must(t, err)
		for attribute := range strings.SplitSeq(strings.TrimRight(string(list[:size]), "\x00"), "\x00") {
			value := make([]byte, 64<<10)
			if size, err := unix.Lgetxattr(path, attribute, value); err == nil {
				attributes[attribute] = string(value[:size])
			}
		}
		n.from = attributes["user.from"]
		for _, attribute := range slices.Sorted(maps.Keys(attributes)) {
			n.text += fmt.Sprintf(" %s=%q", attribute, attributes[attribute])
		}
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			must(t, err)
			n.text += fmt.Sprintf(" %d %x", stat.Size, sha256.Sum256(content))
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			must(t, err)
			n.text += " " + target
		}
		nodes[name] = n
		return nil
	}))
	return nodes
}

// readView describes what an overlay shows.
func (s *stack) readView(t testing.TB, lowers ...[]string) map[string]node {
	t.Helper()
	target := filepath.Join(s.dir, "r")
	unmount, err := s.overlay(lowers...).Mount(target)
	must(t, err)
	defer func() { must(t, unmount()) }()
	return read(t, target)
}

// difference returns what differs between two trees.
func difference(got, want map[string]node) (lines []string) {
	for path, n := range want {
		switch other, has := got[path]; {
		case !has:
			lines = append(lines, fmt.Sprintf("%s: lacks %s", path, n.text))
		case other.text != n.text:
			lines = append(lines, fmt.Sprintf("%s: has %s, want %s", path, other.text, n.text))
		}
	}
	for path, n := range got {
		if _, has := want[path]; !has {
			lines = append(lines, fmt.Sprintf("%s: has %s, want nothing", path, n.text))
		}
	}
	slices.Sort(lines)
	return lines
}
