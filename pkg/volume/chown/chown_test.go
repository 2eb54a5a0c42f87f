package chown

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func tree(t *testing.T, path string, owners Owners) int {
	t.Helper()
	root, err := os.Open(path)
	must(t, err)
	defer root.Close()
	done, err := Tree(t.Context(), root, owners)
	must(t, err)
	return done
}

func statOf(t *testing.T, path string) linux.Stat {
	t.Helper()
	stat, err := linux.Fstatat(nil, path)
	must(t, err)
	return stat
}

// TestGroup needs no root: whoever runs it may give files to the own group.
func TestGroup(t *testing.T) {
	path := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, nil, 0o600))
	must(t, os.MkdirAll(filepath.Join(path, "dir/beneath"), 0o700))
	must(t, os.WriteFile(filepath.Join(path, "dir/program"), nil, 0o755))
	must(t, os.Symlink(outside, filepath.Join(path, "link")))
	must(t, syscall.Mkfifo(filepath.Join(path, "fifo"), 0o600))
	gid := uint32(os.Getgid())

	if done := tree(t, path, Owners{Group: &gid}); done != 6 {
		t.Errorf("%d files, want 6", done)
	}
	for name, want := range map[string]uint32{"": 0o2775, "dir": 0o2770, "dir/beneath": 0o2770, "dir/program": 0o775, "fifo": 0o600} {
		stat := statOf(t, filepath.Join(path, name))
		if name == "" {
			want = stat.Perm() | GroupDirMode
		}
		if stat.Perm() != want || stat.Gid != gid {
			t.Errorf("%q has mode %o and group %d, want %o and %d", name, stat.Perm(), stat.Gid, want, gid)
		}
	}
	if stat := statOf(t, outside); stat.Perm() != 0o600 {
		t.Errorf("a link was followed: mode %o", stat.Perm())
	}

	before := statOf(t, filepath.Join(path, "dir/program"))
	tree(t, path, Owners{Group: &gid})
	if after := statOf(t, filepath.Join(path, "dir/program")); after.Ctim != before.Ctim {
		t.Error("a file was changed that was as requested")
	}
}

// TestDeepOverlay changes a tree of merged directories that is too deep to keep each open. Each directory is copied up with the
// first change beneath it, which moves the entries of the one above.
func TestDeepOverlay(t *testing.T) {
	needs.Root(t)
	base := t.TempDir()
	for _, dir := range []string{"lower", "upper", "work", "view"} {
		must(t, os.Mkdir(filepath.Join(base, dir), 0o755))
	}
	const levels, perLevel = 100, 20
	deep := strings.Repeat("d/", levels)
	must(t, os.MkdirAll(filepath.Join(base, "lower", deep), 0o755))
	must(t, os.MkdirAll(filepath.Join(base, "upper", deep[:levels]), 0o755))
	for level := range levels {
		for i := range perLevel {
			name := filepath.Join(base, "lower", strings.Repeat("d/", level), strconv.Itoa(i))
			must(t, os.WriteFile(name, nil, 0o600))
			if i%3 == 0 {
				must(t, os.Chown(name, 1001, 1002))
			}
		}
	}
	view := filepath.Join(base, "view")
	options := "lowerdir=" + base + "/lower,upperdir=" + base + "/upper,workdir=" + base + "/work"
	must(t, syscall.Mount("overlay", view, "overlay", 0, options))
	defer func() { must(t, syscall.Unmount(view, 0)) }()

	tree(t, view, Owners{UID: 1001, GID: 1002})
	files := 0
	must(t, filepath.WalkDir(view, func(path string, _ fs.DirEntry, err error) error {
		if stat := statOf(t, path); stat.Uid != 1001 || stat.Gid != 1002 {
			return errors.Join(err, errors.New(path+" was left out"))
		}
		files++
		return err
	}))
	if want := levels + 1 + perLevel*levels; files != want {
		t.Errorf("%d files, want %d", files, want)
	}
}

// TestLinkInPlaceOfAFile has a pod put a link in place of a file after the walk has looked at that. The file that it points to is the
// node's.
func TestLinkInPlaceOfAFile(t *testing.T) {
	path, outside := t.TempDir(), filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, nil, 0o600))
	must(t, os.WriteFile(filepath.Join(path, "f"), nil, 0o600))
	stat := statOf(t, filepath.Join(path, "f"))
	must(t, os.Remove(filepath.Join(path, "f")))
	must(t, os.Symlink(outside, filepath.Join(path, "f")))
	dir, err := os.Open(path)
	must(t, err)
	defer dir.Close()
	gid := uint32(os.Getgid())
	c := changer{owners: Owners{Group: &gid}}
	must(t, c.change(dir, "f", stat))
	if mode := statOf(t, outside).Perm(); mode != 0o600 {
		t.Errorf("the file behind the link has mode %04o", mode)
	}
}
