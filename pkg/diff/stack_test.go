package diff_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/diff"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// stack is a volume: layers, and uppers that were written to one after the other.
type stack struct {
	t       testing.TB
	dir     string
	mounter *overlay.Mounter
	// layers and uppers are the paths of the directories, the topmost first.
	layers, uppers []string
	// current is the upper that is being written to.
	current  string
	metacopy bool
	mounted  int
}

// newStack returns a stack with one layer, which is empty.
func newStack(t testing.TB) *stack {
	t.Helper()
	needs.Root(t)
	needs.Installed(t, "cp")
	dir, remove, err := drivertest.WorkDir()
	must(t, err)
	t.Cleanup(func() { must(t, remove()) })
	s := &stack{t: t, dir: dir, mounter: newMounter(t, dir)}
	s.addLayer()
	return s
}

func newMounter(t testing.TB, work string, without ...string) *overlay.Mounter {
	t.Helper()
	dir := filepath.Join(work, "mounter")
	must(t, os.MkdirAll(dir, 0o755))
	features, err := overlay.Probe(dir)
	must(t, err)
	features, err = features.Without(without...)
	must(t, err)
	mounter, err := overlay.NewMounter(overlay.Config{
		Dir: dir, Features: features, MountUtils: mount.NewWithoutSystemd(""), Commands: utilexec.New(),
	})
	must(t, err)
	t.Cleanup(func() { must(t, mounter.Close()) })
	return mounter
}

// mkdir makes a directory with a number in its name.
func (s *stack) mkdir(name string) string {
	s.t.Helper()
	s.mounted++
	path := filepath.Join(s.dir, fmt.Sprintf("%s-%d", name, s.mounted))
	must(s.t, os.Mkdir(path, 0o755))
	return path
}

// addLayer adds a layer above the others and returns its path.
func (s *stack) addLayer() string {
	s.t.Helper()
	s.layers = slices.Insert(s.layers, 0, s.mkdir("layer"))
	return s.layers[0]
}

// write adds an upper above the others, mounts it, and calls do with the path of the view.
func (s *stack) write(do func(view string)) {
	s.t.Helper()
	upper, work, view := s.mkdir("upper"), s.mkdir("work"), s.mkdir("view")
	spec := overlay.Spec{Upper: s.open(upper), Work: s.open(work), Metacopy: s.metacopy, Attributes: overlay.Attributes{NoDev: true}}
	for _, dir := range slices.Concat(s.uppers, s.layers) {
		spec.Lowers = append(spec.Lowers, s.open(dir))
	}
	must(s.t, s.mounter.Overlay(spec, s.open(view)))
	s.current = upper
	func() {
		defer func() { must(s.t, unix.Unmount(view, unix.MNT_DETACH)) }()
		do(view)
	}()
	s.uppers = slices.Insert(s.uppers, 0, upper)
}

func (s *stack) open(path string) *os.File {
	s.t.Helper()
	dir, err := os.Open(path)
	must(s.t, err)
	s.t.Cleanup(func() { dir.Close() })
	return dir
}

// detached opens an overlay of directories, the topmost first.
func (s *stack) detached(frozen, layers []string) *os.File {
	s.t.Helper()
	spec := overlay.Spec{}
	for _, dir := range frozen {
		spec.Frozen = append(spec.Frozen, overlay.FrozenUpper{Dir: s.open(dir)})
	}
	for _, dir := range layers {
		spec.Lowers = append(spec.Lowers, s.open(dir))
	}
	root, err := s.mounter.OpenDetached(spec)
	must(s.t, err)
	s.t.Cleanup(func() { root.Close() })
	return root
}

func (s *stack) tree() diff.Tree {
	s.t.Helper()
	tree := diff.Tree{View: s.detached(s.uppers, s.layers), Base: s.detached(nil, s.layers)}
	for _, upper := range s.uppers {
		tree.Uppers = append(tree.Uppers, s.open(upper))
	}
	return tree
}

// layer returns the tar of the layer.
func (s *stack) layer(tree diff.Tree) []byte {
	s.t.Helper()
	var data bytes.Buffer
	must(s.t, diff.WriteLayer(s.t.Context(), tree, &data))
	return data.Bytes()
}

// changes returns the lines of the changes.
func (s *stack) changes(tree diff.Tree) []string {
	s.t.Helper()
	lines := []string{}
	must(s.t, diff.Walk(s.t.Context(), tree, func(c diff.Change) error {
		lines = append(lines, c.Kind.String()+" "+c.Path)
		return nil
	}))
	return lines
}

// unpacked unpacks the tar of a layer into a lower.
func (s *stack) unpacked(data []byte) string {
	s.t.Helper()
	tree, scratch := filepath.Join(s.mkdir("unpacked"), "tree"), s.mkdir("scratch")
	_, err := unpack.Tar(s.t.Context(), bytes.NewReader(data), tree, scratch, unpack.Limits{})
	must(s.t, err)
	return tree
}

// viewAt mounts directories read-only, and returns the path.
func (s *stack) viewAt(frozen, lowers []string) string {
	s.t.Helper()
	return fmt.Sprintf("/proc/self/fd/%d/.", s.detached(frozen, lowers).Fd())
}

// flat returns a copy of the layers in one directory, and what they look like there.
func (s *stack) flat() string {
	s.t.Helper()
	path := s.mkdir("flat")
	output, err := exec.Command("cp", "-a", "--reflink=auto", s.mountBase()+"/.", path).CombinedOutput()
	if err != nil {
		s.t.Fatalf("cp: %v: %s", err, output)
	}
	return path
}

func (s *stack) mountBase() string {
	s.t.Helper()
	spec := overlay.Spec{Attributes: overlay.Attributes{ReadOnly: true}}
	for _, dir := range s.layers {
		spec.Lowers = append(spec.Lowers, s.open(dir))
	}
	target := s.mkdir("base")
	must(s.t, s.mounter.Overlay(spec, s.open(target)))
	s.t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
	return target
}

// look describes a tree: a line with attributes and content for each path. Sockets are left out.
func look(t testing.TB, root string) map[string]string {
	t.Helper()
	type id struct{ dev, ino uint64 }
	found, links := map[string]string{}, map[id][]string{}
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
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
		line := fmt.Sprintf("mode %o owner %d:%d time %d.%09d", stat.Mode, stat.Uid, stat.Gid, stat.Mtim.Sec, stat.Mtim.Nsec)
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFSOCK:
			return nil
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size %d content %x", stat.Size, sha256.Sum256(content))
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " to " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" device %d:%d", unix.Major(stat.Rdev), unix.Minor(stat.Rdev))
		}
		if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
			key := id{stat.Dev, stat.Ino}
			links[key] = append(links[key], name)
		}
		found[name] = line + xattrsOf(t, path)
		return nil
	}))
	for _, names := range links {
		for _, name := range names {
			if len(names) > 1 {
				found[name] += fmt.Sprintf(" linked %q", names)
			}
		}
	}
	return found
}

func xattrsOf(t testing.TB, path string) string {
	t.Helper()
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, names)
	if errors.Is(err, unix.ENOTSUP) {
		return ""
	}
	must(t, err)
	list := strings.FieldsFunc(string(names[:n]), func(r rune) bool { return r == 0 })
	slices.Sort(list)
	var line strings.Builder
	for _, name := range list {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		must(t, err)
		fmt.Fprintf(&line, " %s=%q", name, value[:n])
	}
	return line.String()
}

// compare reports how two trees differ.
func compare(t testing.TB, what string, got, want map[string]string) {
	t.Helper()
	differences := 0
	report := func(format string, args ...any) {
		if differences++; differences <= 10 {
			t.Errorf(what+": "+format, args...)
		}
	}
	for name, line := range want {
		if other, ok := got[name]; !ok {
			report("%q is missing: %s", name, line)
		} else if other != line {
			report("%q:\n got %s\nwant %s", name, other, line)
		}
	}
	for name, line := range got {
		if _, ok := want[name]; !ok {
			report("%q should not be there: %s", name, line)
		}
	}
}
