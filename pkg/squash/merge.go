package squash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// maxOpen is the most directories that are open at the same time: those on the way to the one that is being merged, in each upper that
// has it and in the result.
const maxOpen = 1 << 13

// pauseBelow is the number of levels of which the buffers of the listings are kept.
const pauseBelow = 32

// Merge merges uppers, the topmost first, into an empty directory. Over any lowers, overlayfs shows it as it shows the uppers over
// them. The names and files are on the disk when Merge returns without an error. After an error, what is in the directory has to be
// discarded.
//
// Files are linked, not copied, where the file system allows it. A link changes the link count and the change time (ctime) of
// the file, in views of the uppers too. MergeApart makes none. Nobody may change the uppers, neither during a merge nor, where files were
// linked, afterwards.
//
// The error is errdefs.ErrResourceExhausted for a tree that is too deep, and errdefs.ErrDataLoss for uppers that overlayfs does not show
// either.
func Merge(ctx context.Context, uppers []*os.File, into *os.File) error {
	return merge(ctx, uppers, into, true)
}

// MergeApart is Merge without links: each file is a copy, which shares blocks with the original where the file system can do that
// (FICLONE). Nothing changes in views of the uppers.
func MergeApart(ctx context.Context, uppers []*os.File, into *os.File) error {
	return merge(ctx, uppers, into, false)
}

func merge(ctx context.Context, uppers []*os.File, into *os.File, links bool) (err error) {
	if len(uppers) == 0 {
		return fmt.Errorf("%w: nothing to merge", errdefs.ErrInvalidArgument)
	}
	m := &merger{files: files{into: into, noLinks: make([]bool, len(uppers)), noClones: make([]bool, len(uppers))}}
	for i := range uppers {
		m.files.noLinks[i] = !links
	}
	defer m.close()
	if err := m.open(uppers, into); err != nil {
		return fmt.Errorf("open the uppers to merge: %w", err)
	}
	for len(m.levels) > 0 {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := m.step(ctx); err != nil {
			return fmt.Errorf("merge %q of the uppers: %w", m.path(), err)
		}
	}
	return linux.SyncFS(into)
}

// merger is the state of one merge: levels from the root to the directory that is being merged.
type merger struct {
	roots  []part
	levels []*level
	files  files
	// opened is the number of directories that are open.
	opened int
	// current is the name that is being merged in the last level.
	current string
}

// level is a directory of the result.
type level struct {
	name string
	into *os.File
	// parts are what it is merged of. listing lists number listed of them.
	parts   []part
	listed  int
	listing *linux.Listing
	// goesOn reports whether overlayfs merges it with what is below the uppers, which it looks up by redirect.
	goesOn   bool
	redirect string
	// isOpaque reports whether it hides what is below the uppers.
	isOpaque bool
	// hasWhiteouts reports whether whiteouts were made in it, and lacksNames whether names of its parts were not.
	hasWhiteouts, lacksNames bool
}

// open begins with the roots. overlayfs merges these whatever they say.
func (m *merger) open(uppers []*os.File, into *os.File) error {
	root := &level{goesOn: true}
	m.levels = append(m.levels, root)
	for i, upper := range uppers {
		dir, err := linux.OpenNamed(upper, ".", handleName)
		if err != nil {
			return err
		}
		root.parts = append(root.parts, part{upper: i, dir: dir})
	}
	m.roots = root.parts
	opened, err := linux.OpenNamed(into, ".", "the merged upper")
	if err != nil {
		return err
	}
	root.into = opened
	root.listing = linux.NewListing(root.parts[0].dir)
	m.opened = len(uppers) + 1
	if err := m.files.open(root.parts); err != nil {
		return err
	}
	return removeACLs(opened)
}

func (m *merger) close() {
	for _, level := range m.levels {
		level.close()
	}
	m.files.close()
}

func (l *level) close() {
	closeParts(l.parts)
	if l.into != nil {
		l.into.Close()
	}
}

// path returns the path of the entry that is being merged, for an error.
func (m *merger) path() string {
	names := make([]string, len(m.levels))
	for i, level := range m.levels {
		names[i] = level.name
	}
	return path.Join(shortPath(names), m.current)
}

// shortPath returns the path of the first names.
func shortPath(names []string) string {
	const most = 16
	if len(names) > most {
		names = append(slices.Clone(names[:most]), "…")
	}
	return path.Join("/", path.Join(names...))
}

// step merges the entries of the last level up to the next directory, which it enters, or to the end, where it leaves the level.
func (m *merger) step(ctx context.Context) error {
	l := m.levels[len(m.levels)-1]
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		name, err := l.next()
		if err != nil {
			return err
		}
		if m.current = name; name == "" {
			return m.leave(ctx, l)
		}
		isDone, err := l.has(name)
		if err != nil {
			return err
		}
		if isDone {
			continue
		}
		entered, err := m.merge(ctx, l, name)
		if err != nil || entered {
			return err
		}
	}
}

// next returns the next name in the parts of a level, and "" at the end.
func (l *level) next() (string, error) {
	for {
		name, err := l.listing.Next()
		if err != nil || name != "" || l.listed == len(l.parts)-1 {
			return name, err
		}
		l.listed++
		l.listing = linux.NewListing(l.parts[l.listed].dir)
	}
}

// has reports whether a name that the current part has was merged already, because a part above has it too.
func (l *level) has(name string) (bool, error) {
	if l.listed == 0 {
		return false, nil
	}
	dirs := []*os.File{l.into}
	if l.lacksNames {
		for _, part := range l.parts[:l.listed] {
			dirs = append(dirs, part.dir)
		}
	}
	for _, dir := range dirs {
		_, err := linux.Fstatat(dir, name)
		if !errors.Is(err, fs.ErrNotExist) {
			return err == nil, err
		}
	}
	return false, nil
}

// merge merges what has one name. It reports whether that is a directory, which it has entered.
func (m *merger) merge(ctx context.Context, l *level, name string) (entered bool, err error) {
	found, err := find(l.parts[l.listed:], m.roots, name)
	if err != nil {
		return false, err
	}
	goesOn := !found.isOver && (found.isAbsolute || l.goesOn)
	if len(found.dirs) > 0 {
		return true, m.enter(l, name, found, goesOn)
	}
	defer found.close()
	switch {
	case found.first != nil && found.isMetacopy && !goesOn:
		return false, fmt.Errorf("%w: nothing has its content", errdefs.ErrDataLoss)
	case found.first != nil:
		return false, m.files.make(ctx, l.parts[l.listed].upper, found, l.into, name)
	case l.goesOn:
		l.hasWhiteouts = true
		return false, m.files.makeWhiteout(l.into, name)
	}
	// There is nothing to hide.
	l.lacksNames = true
	return false, nil
}

// enter makes a directory and takes it as the next level.
func (m *merger) enter(above *level, name string, found result, goesOn bool) error {
	l := &level{name: name, parts: found.dirs, goesOn: goesOn, isOpaque: above.goesOn && !goesOn}
	m.levels = append(m.levels, l)
	m.current = ""
	if goesOn {
		l.redirect = found.target(name)
	}
	if m.opened += len(l.parts) + 1; m.opened > maxOpen {
		return fmt.Errorf("%w: it is too deep in too many uppers", errdefs.ErrResourceExhausted)
	}
	if len(m.levels) > pauseBelow {
		if err := above.listing.Pause(); err != nil {
			return err
		}
	}
	err := linux.Mkdirat(above.into, name, 0o700)
	if err == nil {
		l.into, err = linux.OpenNamed(above.into, name, "a directory of the merged upper")
	}
	l.listing = linux.NewListing(l.parts[0].dir)
	return err
}

// leave finishes the last level and goes back to the one above.
func (m *merger) leave(ctx context.Context, l *level) error {
	if len(m.levels) == 1 {
		// It has names in the root, which gets its times now.
		if err := m.files.clear(ctx); err != nil {
			return err
		}
	}
	if err := l.finish(len(m.levels) == 1); err != nil {
		return err
	}
	m.levels = m.levels[:len(m.levels)-1]
	m.opened -= len(l.parts) + 1
	l.close()
	return nil
}

// finish gives a directory its attributes, which are those of the topmost part.
func (l *level) finish(isRoot bool) error {
	set := map[string]string{}
	if l.isOpaque {
		set[opaqueXattr] = "y"
	}
	if l.redirect != "" {
		set[redirectXattr] = l.redirect
	}
	if l.hasWhiteouts && !isRoot {
		// Where nothing is below, overlayfs lists the directory as it is, with the whiteouts, if it does not have this
		// attribute (ovl_get_inode, OVL_WHITEOUTS). An empty one does not say where it was copied from.
		set[originXattr] = ""
	}
	from := l.parts[0].dir
	stat, err := linux.StatFile(from)
	if err != nil {
		return err
	}
	return setAttributes(from, l.into, stat, set)
}
