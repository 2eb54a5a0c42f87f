package squash

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// handleName is what handles of directories are called: in a deep tree, a path would grow with the depth.
const handleName = "a directory of an upper"

// part is a directory of one upper.
type part struct {
	upper int
	dir   *os.File
}

// lookup is the state of looking up one name, from the topmost upper down (struct ovl_lookup_data).
type lookup struct {
	// path is what is looked up in the next upper: one name in what the parent is merged of there, or a path from the root of the upper,
	// if isAbsolute. A redirect replaces it.
	path       []string
	isAbsolute bool
	isDir      bool
	isMetacopy bool
	// isOver reports whether nothing below belongs to what was found.
	isOver bool
}

// entry is what was found in one upper.
type entry struct {
	dir  *os.File
	name string
	stat linux.Stat
	// opened is the entry itself, open for reading, if it is a directory, or a file that is looked up for its content.
	opened *os.File
}

// result is what was found in all uppers.
type result struct {
	lookup
	// dirs are what a directory is merged of, the topmost first.
	dirs []part
	// first is what was found, if it is not a directory. Its dir is one of the parent. If both are missing, there is a whiteout.
	first *entry
	// data is the file with the content of first, if first is a metacopy file and an upper has the content.
	data *os.File
}

// find looks up a name in the directories that its parent is merged of, as ovl_lookup does. The topmost has the name. roots are those
// of all uppers.
func find(parent, roots []part, name string) (found result, err error) {
	found.path = []string{name}
	defer func() {
		if err != nil {
			found.close()
		}
	}()
	atRoot := false
	for i := 0; i < len(parent) && !found.isOver; i++ {
		at := parent[i]
		entry, err := found.in(at.dir, found.first != nil)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return found, err
		}
		switch {
		case entry.stat.IsDir():
			found.dirs = append(found.dirs, part{upper: at.upper, dir: entry.opened})
		case found.first == nil:
			found.first = entry
		default:
			// Of metacopy files between the first one and the content, nothing is shown.
			found.setData(entry.opened)
		}
		if found.isAbsolute && !atRoot {
			// It goes on in the next upper, from the root of that.
			parent, i, atRoot = roots, at.upper, true
		}
	}
	return found, nil
}

func (r *result) setData(file *os.File) {
	if r.data != nil {
		r.data.Close()
	}
	r.data = file
}

func (r *result) close() {
	closeParts(r.dirs)
	r.setData(nil)
	r.dirs = nil
}

func closeParts(parts []part) {
	for _, part := range parts {
		part.dir.Close()
	}
}

// in looks up the path in one upper, as ovl_lookup_layer does. It returns ErrNotFound if there is none. With isForData, a file is opened
// that is no metacopy file itself.
func (l *lookup) in(base *os.File, isForData bool) (*entry, error) {
	dir := base
	// A redirect on the way replaces what leads to it, so that the position is counted from the end.
	for left := len(l.path); ; left-- {
		found, err := l.step(dir, left)
		if err == nil && isForData && !l.isMetacopy && found.stat.IsRegular() {
			found.opened, err = linux.Open(dir, found.name, os.O_RDONLY|linux.O_NOFOLLOW|syscall.O_NOATIME, 0)
		}
		if dir != base {
			dir.Close()
		}
		if err != nil || left == 1 {
			return found, err
		}
		dir = found.opened
	}
}

// step looks up one element of the path, as ovl_lookup_single does. left is the number of elements from it to the end.
func (l *lookup) step(dir *os.File, left int) (*entry, error) {
	name, isLast := l.path[len(l.path)-left], left == 1
	stat, err := linux.Fstatat(dir, name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENAMETOOLONG) {
		return nil, errdefs.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	found := &entry{dir: dir, name: name, stat: stat}
	switch {
	case stat.IsWhiteout(), isLast && l.isMetacopy && !stat.IsRegular(), !stat.IsDir() && (l.isDir || !isLast):
		l.isOver = true
		return nil, errdefs.ErrNotFound
	case stat.IsDir():
		return l.stepDir(found, left)
	}
	l.isMetacopy = false
	if stat.IsRegular() {
		if _, l.isMetacopy, err = xattrAt(dir, name, metacopyXattr); err != nil {
			return nil, err
		}
	}
	if l.isOver = !l.isMetacopy; l.isOver {
		return found, nil
	}
	redirect, ok, err := xattrAt(dir, name, redirectXattr)
	if err == nil && ok {
		err = l.redirect(string(redirect), left)
	}
	return found, err
}

// stepDir is step for a directory.
func (l *lookup) stepDir(found *entry, left int) (_ *entry, err error) {
	if found.opened, err = linux.OpenNamed(found.dir, found.name, handleName); err != nil {
		return nil, err
	}
	if left == 1 {
		l.isDir = true
	}
	hides, err := isOpaque(found.opened)
	if err == nil && !hides {
		var redirect []byte
		var ok bool
		if redirect, ok, err = xattr(found.opened, redirectXattr); err == nil && ok {
			err = l.redirect(string(redirect), left)
		}
	}
	if err != nil {
		found.opened.Close()
		return nil, err
	}
	l.isOver = l.isOver || hides
	return found, nil
}

// redirect replaces the path up to the element that is looked up, as ovl_check_redirect does.
func (l *lookup) redirect(to string, left int) error {
	name, isAbsolute := strings.CutPrefix(to, "/")
	elements := strings.Split(name, "/")
	for _, element := range elements {
		if element == "" || element == "." || element == ".." || strings.Contains(element, "\x00") || !isAbsolute && len(elements) > 1 {
			return fmt.Errorf("%w: invalid redirect %.256q", errdefs.ErrDataLoss, to)
		}
	}
	at := len(l.path) - left
	before, after := l.path[:at], l.path[at+1:]
	if isAbsolute {
		before = nil
		l.isAbsolute, l.isOver = true, false
	}
	l.path = slices.Concat(before, elements, after)
	return nil
}

// target returns the redirect that has overlayfs go on with the lookup below. It is "" if it does so without one.
func (l *lookup) target(name string) string {
	switch {
	case l.isAbsolute:
		return "/" + strings.Join(l.path, "/")
	case l.path[0] != name:
		return l.path[0]
	}
	return ""
}
