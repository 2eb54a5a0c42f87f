// Package viewtest makes chains of uppers by random changes in mounted overlays, and compares what overlays show.
package viewtest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Overlay is an overlay to mount.
type Overlay struct {
	// Lowers are the paths of the lowers, the topmost first.
	Lowers []string
	// Upper and Work are empty for a read-only view.
	Upper, Work string
	Metacopy    bool
}

// Mount mounts an overlay with the options of the driver. unmount must be called.
func (o Overlay) Mount(target string) (unmount func() error, _ error) {
	options := "lowerdir=" + strings.Join(o.Lowers, ":") + ",redirect_dir=on,xino=auto"
	if o.Upper != "" {
		options += ",index=off,upperdir=" + o.Upper + ",workdir=" + o.Work
	}
	if o.Metacopy {
		options += ",metacopy=on"
	} else {
		options += ",metacopy=off"
	}
	if len(o.Lowers) == 1 && o.Upper == "" {
		// overlayfs wants two.
		empty := target + ".empty"
		if err := os.MkdirAll(empty, 0o755); err != nil {
			return nil, err
		}
		o.Lowers = append(slices.Clone(o.Lowers), empty)
		return o.Mount(target)
	}
	if err := os.MkdirAll(target, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("overlay", target, "overlay", unix.MS_NOATIME, options); err != nil {
		return nil, fmt.Errorf("mount %s: %w", options, err)
	}
	return func() error { return unix.Unmount(target, 0) }, nil
}

// Show mounts an overlay, returns what it shows, and unmounts it.
func (o Overlay) Show(t testing.TB, target string) []string {
	t.Helper()
	unmount, err := o.Mount(target)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unmount(); err != nil {
			t.Fatal(err)
		}
	}()
	return Show(target)
}

// Show describes all entries of a tree, one in a line: all that programs can see of them but link counts, inode numbers and the sizes
// of directories. Names that are links of one file say so.
func Show(root string) []string {
	s := shower{root: root, links: map[uint64]string{}}
	s.show("")
	return s.lines
}

type shower struct {
	root  string
	lines []string
	// links has the first name of each file.
	links map[uint64]string
}

func (s *shower) show(name string) {
	path := filepath.Join(s.root, name)
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		s.lines = append(s.lines, fmt.Sprintf("%s: %v", name, err))
		return
	}
	line := fmt.Sprintf("%s: mode %o owner %d:%d time %d.%09d %s", name, stat.Mode, stat.Uid, stat.Gid,
		stat.Mtim.Sec, stat.Mtim.Nsec, xattrs(path))
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		s.lines = append(s.lines, line)
		s.showDir(name)
		return
	case unix.S_IFREG:
		line += fmt.Sprintf(" size %d content %s", stat.Size, content(path))
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		line += fmt.Sprintf(" to %q %v", target, err)
	default:
		line += fmt.Sprintf(" device %#x", stat.Rdev)
	}
	if first, ok := s.links[stat.Ino]; ok {
		line += " is " + first
	} else {
		s.links[stat.Ino] = name
	}
	s.lines = append(s.lines, line)
}

func (s *shower) showDir(name string) {
	entries, err := os.ReadDir(filepath.Join(s.root, name))
	if err != nil {
		s.lines = append(s.lines, fmt.Sprintf("%s: %v", name, err))
	}
	for _, entry := range entries {
		s.show(name + "/" + entry.Name())
	}
}

func xattrs(path string) string {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		return fmt.Sprintf("[%v]", err)
	}
	var all []string
	for name := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		all = append(all, fmt.Sprintf("%s=%q %v", name, value[:max(n, 0)], err))
	}
	slices.Sort(all)
	return fmt.Sprint(all)
}

func content(path string) string {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, file); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%x", sum.Sum(nil)[:6])
}

// Compare fails the test where two views differ.
func Compare(t testing.TB, what string, got, want []string) {
	t.Helper()
	if err := Difference(got, want); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// Difference returns what differs between two views.
func Difference(got, want []string) error {
	var all []error
	has := map[string]bool{}
	for _, line := range got {
		has[line] = true
	}
	for _, line := range want {
		if !has[line] {
			all = append(all, fmt.Errorf("lacks %s", line))
		}
		delete(has, line)
	}
	for _, line := range got {
		if has[line] {
			all = append(all, fmt.Errorf("has   %s", line))
		}
	}
	const most = 12
	return errors.Join(all[:min(len(all), most)]...)
}
