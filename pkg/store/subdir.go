package store

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxLinks is how many symbolic links a path may lead through (the kernel's MAXSYMLINKS).
const maxLinks = 40

// openInStack opens a directory of an image: in each layer of the stack, the topmost first, the directory of that path,
// from the first layer that has it down to the one that hides what is below. It looks a path up as overlayfs does in a
// mounted view, so that no view has to be mounted for it. Links are followed with the image as their root.
func openInStack(stack []*os.File, name string) ([]*os.File, error) {
	links := 0
	rest := strings.Split(name, "/")
	var walked []string
	at := stack
	closeAt := func() {
		if len(at) > 0 && &at[0] != &stack[0] {
			closeAll(at)
		}
	}
	for len(rest) > 0 {
		component := rest[0]
		rest = rest[1:]
		next, link, err := lookup(at, component)
		if err != nil {
			closeAt()
			return nil, fmt.Errorf("%q in the image: %w", path.Join(append(walked, component)...), err)
		}
		if link == "" {
			closeAt()
			at = next
			walked = append(walked, component)
			continue
		}
		if links++; links > maxLinks {
			closeAt()
			return nil, fmt.Errorf("%w: %q in the image leads through more than %d links", errdefs.ErrInvalidArgument, name, maxLinks)
		}
		// Begun again from the root, with the link's target in its place: `..` at the root is the root.
		if !path.IsAbs(link) {
			link = path.Join("/", path.Join(walked...), link)
		}
		target := strings.Trim(path.Clean(path.Join("/", link)), "/")
		rest = append(strings.FieldsFunc(target, func(r rune) bool { return r == '/' }), rest...)
		closeAt()
		at, walked = stack, nil
	}
	if len(at) > 0 && &at[0] == &stack[0] {
		return duplicate(stack)
	}
	return at, nil
}

// lookup opens one name in a merged directory. Where it is a link, it is what the link says instead.
func lookup(stack []*os.File, name string) (found []*os.File, link string, err error) {
	for _, dir := range stack {
		fd, err := unix.Openat(int(dir.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			closeAll(found)
			return nil, "", &os.PathError{Op: "openat", Path: path.Join(dir.Name(), name), Err: err}
		}
		entry := os.NewFile(uintptr(fd), path.Join(dir.Name(), name))
		last, link, err := classify(entry, len(found) == 0)
		if err != nil {
			entry.Close()
			closeAll(found)
			return nil, "", err
		}
		if link != "" {
			entry.Close()
			return nil, link, nil
		}
		if last == hides {
			entry.Close()
			break
		}
		found = append(found, entry)
		if last == opaque {
			break
		}
	}
	if len(found) == 0 {
		return nil, "", fmt.Errorf("%w: there is no such directory", errdefs.ErrNotFound)
	}
	return found, "", nil
}

// What an entry is to the layers below it.
type hiding int

const (
	shows hiding = iota
	opaque
	hides
)

func classify(entry *os.File, topmost bool) (hiding, string, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(entry.Fd()), &stat); err != nil {
		return hides, "", &os.PathError{Op: "fstat", Path: entry.Name(), Err: err}
	}
	switch kind := stat.Mode & unix.S_IFMT; {
	case kind == unix.S_IFDIR:
		isOpaque, err := isOpaque(entry)
		if isOpaque {
			return opaque, "", err
		}
		return shows, "", err
	case kind == unix.S_IFCHR && stat.Rdev == 0, !topmost:
		return hides, "", nil
	case kind == unix.S_IFLNK:
		target := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(entry.Fd()), "", target)
		if err != nil {
			return hides, "", &os.PathError{Op: "readlinkat", Path: entry.Name(), Err: err}
		}
		return hides, string(target[:n]), nil
	}
	return hides, "", fmt.Errorf("%w: it is a file: a layer is a directory", errdefs.ErrInvalidArgument)
}

func duplicate(stack []*os.File) ([]*os.File, error) {
	var copies []*os.File
	for _, dir := range stack {
		fd, err := unix.FcntlInt(dir.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			closeAll(copies)
			return nil, &os.PathError{Op: "dup", Path: dir.Name(), Err: err}
		}
		copies = append(copies, os.NewFile(uintptr(fd), dir.Name()))
	}
	return copies, nil
}

func closeAll(files []*os.File) {
	for _, file := range files {
		file.Close()
	}
}
