package unpack_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tree describes a directory tree. It maps the path of each entry to a line with its attributes.
type tree map[string]string

// readTree returns the attributes of a tree that an image determines. It leaves out the times of the entries in withoutTimes.
func readTree(t *testing.T, root string, withoutTimes map[string]bool) tree {
	t.Helper()
	found := tree{}
	inodes := map[uint64]string{}
	must(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
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
		if stat.Mode&unix.S_IFMT == unix.S_IFCHR && stat.Rdev == 0 {
			// overlayfs ignores the other attributes of a whiteout.
			found[name] = "whiteout"
			return nil
		}
		line := fmt.Sprintf("mode %o owner %d:%d", stat.Mode, stat.Uid, stat.Gid)
		if !withoutTimes[name] {
			line += fmt.Sprintf(" time %d.%09d", stat.Mtim.Sec, stat.Mtim.Nsec)
		}
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size %d content %x", stat.Size, sha256.Sum256(content))
			if stat.Nlink > 1 {
				if inodes[stat.Ino] == "" {
					inodes[stat.Ino] = name
				}
				line += " as " + inodes[stat.Ino]
			}
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " to " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" device %d", stat.Rdev)
		}
		found[name] = line + xattrsOf(t, path)
		return nil
	}))
	return found
}

func xattrsOf(t *testing.T, path string) string {
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
		if name == "trusted.overlay.origin" || name == "trusted.overlay.implied" {
			// Other unpackers do not set them. Without the first, views show whiteouts.
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		must(t, err)
		fmt.Fprintf(&line, " %s=%q", name, value[:n])
	}
	return line.String()
}

func (want tree) compare(t *testing.T, got tree) {
	t.Helper()
	differences := 0
	report := func(format string, args ...any) {
		if differences++; differences <= 20 {
			t.Errorf(format, args...)
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
	if differences > 20 {
		t.Errorf("and %d others", differences-20)
	}
}
