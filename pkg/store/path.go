package store

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

// maxLinks is how many symbolic links a path may lead through (the kernel's MAXSYMLINKS).
const maxLinks = 40

// openInLayers opens a directory of an image: in each of the layers' directories, the topmost first, the directory of that
// path, from the first layer that has it down to the one that hides what is below. It looks a path up as overlayfs does in
// a mounted view, so that no view has to be mounted for it. Links are followed with the image as their root.
func openInLayers(layers []*os.File, name string) ([]*os.File, error) {
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
			return nil, fmt.Errorf("%q in the image: %w", path.Join(append(walked, component)...), err)
		}
		if found.link == "" {
			current = found.dirs
			walked = append(walked, component)
			continue
		}
		if links++; links > maxLinks {
			return nil, fmt.Errorf("%w: %q in the image leads through more than %d links", errdefs.ErrInvalidArgument, name, maxLinks)
		}
		// The walk begins again at the root, with the link's target in place of the link: `..` at the root is the root.
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

// lookedUp is what a name in a merged directory is: a merged directory, or a link.
type lookedUp struct {
	dirs []*os.File
	link string
}

// lookUp looks up one name in a merged directory.
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

// effectOnLower is what an entry does to the entries of the same name in lower layers.
type effectOnLower int

const (
	// showsLower is a directory that is merged with lower ones.
	showsLower effectOnLower = iota
	// opaque is a directory that is not.
	opaque
	// hidesLower is no directory.
	hidesLower
)

// classify returns the effect of an entry and, if it is a link, its target. The topmost entry may not be a file.
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
	return hidesLower, "", fmt.Errorf("%w: it is a file, and a layer is a directory", errdefs.ErrInvalidArgument)
}

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
