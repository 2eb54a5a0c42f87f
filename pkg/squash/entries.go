package squash

import (
	"context"
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

// Dir is a directory of one or more uppers as overlayfs merges it, without what lies below them. Its methods must not be called
// concurrently.
type Dir struct {
	parts, roots []part
	// listing lists number listed of the parts.
	listed  int
	listing *linux.Listing
	goesOn  bool
}

// Entry is what uppers have by one name.
type Entry struct {
	// IsWhiteout is set if the name is a whiteout. Dir is the directory if it is one, and nil otherwise.
	IsWhiteout bool
	Dir        *Dir
	// GoesOn is set if something that belongs to the entry lies below the uppers: the rest of a directory, or the content of a metacopy
	// file. It is looked up by Below: a path from the root if IsAbsolute, else a name in what the directory around it goes on with.
	GoesOn     bool
	Below      string
	IsAbsolute bool
}

// OpenRoot opens the root of uppers, the topmost first. The caller closes it after all directories that were found in it.
func OpenRoot(uppers []*os.File) (*Dir, error) {
	root := &Dir{goesOn: true}
	for i, upper := range uppers {
		dir, err := linux.OpenNamed(upper, ".", handleName)
		if err != nil {
			root.Close()
			return nil, err
		}
		root.parts = append(root.parts, part{upper: i, dir: dir})
	}
	if len(root.parts) == 0 {
		return nil, fmt.Errorf("%w: there are no uppers", errdefs.ErrInvalidArgument)
	}
	root.roots = root.parts
	root.listing = linux.NewListing(root.parts[0].dir)
	return root, nil
}

// Close closes the directory.
func (d *Dir) Close() { closeParts(d.parts) }

// Len returns of how many directories this one is merged, which are open.
func (d *Dir) Len() int { return len(d.parts) }

// Topmost returns the directory in the topmost upper that has it, which gives it its attributes. It is open for reading until Close.
func (d *Dir) Topmost() *os.File { return d.parts[0].dir }

// Next returns the next name, and "" at the end.
func (d *Dir) Next() (string, error) {
	for {
		name, err := d.listing.Next()
		if err != nil {
			return "", err
		}
		if name == "" {
			if d.listed == len(d.parts)-1 {
				return "", nil
			}
			d.listed++
			d.listing = linux.NewListing(d.parts[d.listed].dir)
			continue
		}
		isDone, err := d.hasAbove(name)
		if err != nil {
			return "", err
		}
		if !isDone {
			return name, nil
		}
	}
}

// Pause gives back the memory of the listing until the next name is asked for.
func (d *Dir) Pause() error { return d.listing.Pause() }

// hasAbove reports whether a part above the one that is listed has a name.
func (d *Dir) hasAbove(name string) (bool, error) {
	for _, part := range d.parts[:d.listed] {
		_, err := linux.Fstatat(part.dir, name)
		if !errors.Is(err, fs.ErrNotExist) {
			return err == nil, err
		}
	}
	return false, nil
}

// Find looks up the name that Next returned. It returns ErrDataLoss for what overlayfs does not show either. The caller closes the
// directory if it is one.
func (d *Dir) Find(name string) (Entry, error) {
	found, err := find(d.parts[d.listed:], d.roots, name)
	if err != nil {
		return Entry{}, err
	}
	entry := Entry{GoesOn: !found.isOver && (found.isAbsolute || d.goesOn), IsAbsolute: found.isAbsolute, Below: strings.Join(found.path, "/")}
	if len(found.dirs) > 0 {
		entry.Dir = &Dir{parts: found.dirs, roots: d.roots, goesOn: entry.GoesOn, listing: linux.NewListing(found.dirs[0].dir)}
		return entry, nil
	}
	defer found.close()
	entry.IsWhiteout = found.first == nil
	entry.GoesOn = entry.GoesOn && found.first != nil && found.isMetacopy
	return entry, nil
}

// Complete gives a metacopy file in a directory of an upper, which nothing else uses, its content, which is read from there. The file is
// made in scratch first, a directory of the same file system. Other names of the file stay what they are.
func Complete(ctx context.Context, dir *os.File, name string, content, scratch *os.File) (err error) {
	from, err := linux.Open(dir, name, linux.O_PATH|linux.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	stat, err := linux.StatFile(from)
	if err != nil {
		return err
	}
	const made = "complete"
	to, err := linux.OpenFile(scratch, made, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|linux.O_NOFOLLOW, 0o600, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	if err := linux.CopyFile(ctx, content, to); err != nil {
		return err
	}
	if err := to.Truncate(stat.Size); err != nil {
		return err
	}
	if err := setAttributes(from, to, stat, nil); err != nil {
		return err
	}
	return linux.Renameat(scratch, made, dir, name, 0)
}

// MakeTransparent has a directory of an upper, which nothing else uses, show what lies below it.
func MakeTransparent(dir *os.File) error {
	if _, has, err := xattr(dir, opaqueXattr); err != nil || !has {
		return err
	}
	return linux.RemoveXattr(dir, opaqueXattr)
}

// CopyAttributes gives a directory of an upper, which nothing else uses, the mode and the extended attributes of a directory that a view
// shows, and an owner and a group.
func CopyAttributes(shown, to *os.File, uid, gid uint32) error {
	stat, err := linux.StatFile(shown)
	if err != nil {
		return err
	}
	if err := linux.Fchownat(to, "", uid, gid); err != nil {
		return err
	}
	if err := linux.Fchmodat(to, "", stat.Perm()); err != nil {
		return err
	}
	wanted, err := linux.ListXattr(shown)
	if err != nil {
		return err
	}
	for i, name := range wanted {
		value, has, err := xattr(shown, name)
		if err != nil || !has {
			return err
		}
		wanted[i] = storedName(name)
		if err := linux.SetXattr(to, wanted[i], value); err != nil {
			return err
		}
	}
	has, err := linux.ListXattr(to)
	if err != nil {
		return err
	}
	for _, name := range has {
		// Those of security modules are the node's.
		isOthers := strings.HasPrefix(name, "security.") || !isCopied(name)
		if isOthers || slices.Contains(wanted, name) {
			continue
		}
		if err := linux.RemoveXattr(to, name); err != nil && !errors.Is(err, syscall.ENODATA) {
			return err
		}
	}
	return nil
}

// storedName returns how an upper has an extended attribute that a view shows.
func storedName(shown string) string {
	if rest, isNested := strings.CutPrefix(shown, overlayPrefix); isNested {
		return escapedPrefix + rest
	}
	return shown
}
