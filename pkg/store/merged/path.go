package merged

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// maxLinks is the maximum number of symbolic links that are followed in a path (MAXSYMLINKS of the kernel).
const maxLinks = 40

// Open opens a directory of an image in each of its layers that contribute to it. layers are the directories of the
// layers, the topmost first, and the result has the same order. Open resolves name like overlayfs, but without a
// mount. It resolves links with the image as their root.
func Open(layers []*os.File, name string) ([]*os.File, error) {
	current, err := duplicate(layers)
	if err != nil {
		return nil, err
	}
	links := 0
	rest := strings.Split(name, "/")
	var walked []string
	for len(rest) > 0 {
		component := rest[0]
		rest = rest[1:]
		found, err := lookUp(current, component)
		closeAll(current)
		if err != nil {
			return nil, fmt.Errorf("open %q in the image: %w", path.Join(append(walked, component)...), err)
		}
		if found.link == "" {
			current = found.dirs
			walked = append(walked, component)
			continue
		}
		if links++; links > maxLinks {
			return nil, fmt.Errorf("%w: open %q in the image: more than %d symbolic links", errdefs.ErrInvalidArgument, name, maxLinks)
		}
		// Restart at the root with the target in place of the link. The parent of the root is the root.
		if !path.IsAbs(found.link) {
			found.link = path.Join("/", path.Join(walked...), found.link)
		}
		target := strings.Trim(path.Clean(path.Join("/", found.link)), "/")
		rest = slices.Concat(strings.FieldsFunc(target, func(r rune) bool { return r == '/' }), rest)
		walked = nil
		if current, err = duplicate(layers); err != nil {
			return nil, err
		}
	}
	return current, nil
}

// lookedUp is the result of a lookup in a merged directory: a merged directory or the target of a link.
type lookedUp struct {
	dirs []*os.File
	link string
}

// lookUp looks up one name in a merged directory. It returns ErrNotFound if there is neither a directory nor a link.
func lookUp(layers []*os.File, name string) (lookedUp, error) {
	var found []*os.File
	for _, dir := range layers {
		entry, err := linux.Open(dir, name, linux.O_PATH|linux.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			closeAll(found)
			return lookedUp{}, err
		}
		effect, link, err := classify(entry, len(found) == 0)
		if effect == hidesLower {
			entry.Close()
		} else {
			found = append(found, entry)
		}
		if err != nil || link != "" {
			closeAll(found)
			return lookedUp{link: link}, err
		}
		if effect != showsLower {
			break
		}
	}
	if len(found) == 0 {
		return lookedUp{}, fmt.Errorf("%w: no such directory", errdefs.ErrNotFound)
	}
	return lookedUp{dirs: found}, nil
}

// effectOnLower is the effect of an entry on entries of the same name in lower layers.
type effectOnLower int

const (
	// showsLower is the effect of a directory that is merged with lower directories.
	showsLower effectOnLower = iota
	// opaque is the effect of an opaque directory: it hides lower entries.
	opaque
	// hidesLower is the effect of all other entries, which also hide lower entries.
	hidesLower
)

// classify returns the effect of an entry and, if the entry is a link, its target. It returns an error if the topmost entry
// is a file.
func classify(entry *os.File, topmost bool) (effectOnLower, string, error) {
	stat, err := linux.StatFile(entry)
	if err != nil {
		return hidesLower, "", err
	}
	switch {
	case stat.IsDir():
		isOpaque, err := unpack.IsOpaque(entry)
		if isOpaque {
			return opaque, "", err
		}
		return showsLower, "", err
	case stat.IsWhiteout(), !topmost:
		return hidesLower, "", nil
	case stat.IsSymlink():
		target, err := linux.Readlinkat(entry, "")
		return hidesLower, target, err
	}
	return hidesLower, "", fmt.Errorf("%w: it is a file; want a directory", errdefs.ErrInvalidArgument)
}

// duplicate duplicates open directories.
func duplicate(dirs []*os.File) ([]*os.File, error) {
	copies := make([]*os.File, 0, len(dirs))
	for _, dir := range dirs {
		duplicated, err := linux.Dup(dir)
		if err != nil {
			closeAll(copies)
			return nil, err
		}
		copies = append(copies, duplicated)
	}
	return copies, nil
}

func closeAll(files []*os.File) {
	for _, file := range files {
		file.Close()
	}
}
