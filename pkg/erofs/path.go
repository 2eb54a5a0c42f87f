package erofs

import (
	"os"
	"strings"
	"syscall"
)

const (
	// maxName is the maximum length of a name in bytes (NAME_MAX), maxPath that of a path (PATH_MAX, less the zero byte at its end).
	maxName = 255
	maxPath = 4095
	// maxLinks is how many links are followed in one path (MAXSYMLINKS).
	maxLinks = 40
)

// Open returns what is at a path. Links are followed, also the last one, and lead nowhere outside of the image (openat2(2),
// RESOLVE_IN_ROOT). The error is ENOTDIR if it is no directory.
func (i *Image) Open(path string) (Inode, error) { return i.open(path, maxLinks) }

// OpenNoLinks is [Image.Open] for a path without links. The error is ELOOP for one that has some (RESOLVE_NO_SYMLINKS).
func (i *Image) OpenNoLinks(path string) (Inode, error) { return i.open(path, 0) }

func (i *Image) open(path string, links int) (Inode, error) {
	at, err := i.resolve(path, links)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return at, nil
}

func (i *Image) resolve(path string, mayFollow int) (Inode, error) {
	if len(path) > maxPath {
		return 0, syscall.ENAMETOOLONG
	}
	at, links := root, 0
	for rest := path; rest != ""; {
		name, after, _ := strings.Cut(rest, "/")
		rest = after
		switch {
		case !isType(i.inode(at).mode, syscall.S_IFDIR):
			return 0, syscall.ENOTDIR
		case name == "" || name == ".":
			continue
		case name == "..":
			at = i.parent(at)
			continue
		case len(name) > maxName:
			return 0, syscall.ENAMETOOLONG
		}
		slot, found := i.find(at, name)
		if !found {
			return 0, syscall.ENOENT
		}
		next := i.entries.at(i.index.slots[slot] - slotUsed).inode
		if !isType(i.inode(next).mode, syscall.S_IFLNK) {
			at = next
			continue
		}
		if links++; links > mayFollow {
			return 0, syscall.ELOOP
		}
		target := string(i.texts.at(i.inode(next).content))
		if strings.HasPrefix(target, "/") {
			at = root
		}
		// The kernel has no limit for what a target and the rest of a path have together.
		rest = target + "/" + rest
	}
	if !isType(i.inode(at).mode, syscall.S_IFDIR) {
		return 0, syscall.ENOTDIR
	}
	return at, nil
}

// parent returns the parent of a directory, of the root the root itself.
func (i *Image) parent(dir Inode) Inode {
	if at := i.inode(dir).extents; at != noEntry {
		return i.entries.at(at).parent
	}
	return root
}

// Path returns the path of a directory from the root, which itself is "". It has no links.
func (i *Image) Path(dir Inode) string {
	var names [][]byte
	size := 0
	for at := i.inode(dir).extents; at != noEntry; {
		e := i.entries.at(at)
		names = append(names, i.texts.at(e.name))
		size += len(names[len(names)-1]) + 1
		at = i.inode(e.parent).extents
	}
	var path strings.Builder
	path.Grow(size)
	for n := len(names) - 1; n >= 0; n-- {
		if path.Len() > 0 {
			path.WriteByte('/')
		}
		path.Write(names[n])
	}
	return path.String()
}
