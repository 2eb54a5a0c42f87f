package diff

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	// maxPath is the longest path in bytes (PATH_MAX, less the zero byte at its end).
	maxPath = 4095
	// maxOpen is the number of levels of directories whose handles stay open. Those of a deeper level are opened again.
	maxOpen = 16
)

// Walk calls visit for each entry that differs between the layers and the view, a directory before what is in it. A directory of which
// the upper has a copy, because something in it changed, is no change as long as its mode, owner and attributes are those of the layers.
//
// The files may change while it runs: it leaves out what is gone when it comes to it. Entries with paths of more than 4095 bytes are left
// out, and Walk returns an error that names one of them when it has visited all others.
func Walk(ctx context.Context, tree Tree, visit func(Change) error) error {
	var tooLong error
	w := walker{tree: tree, ctx: ctx, skipGone: true}
	w.visit = func(e entry) error {
		if e.path == "" {
			tooLong = pathTooLong(e)
			return nil
		}
		change := Change{Path: e.path, Kind: e.kind, Type: modeOf(e.stat)}
		if e.stat.IsRegular() {
			change.Size = e.stat.Size
		}
		if e.kind == Changed && e.base != nil && !e.opaque {
			same, err := sameAttributes(e)
			if err != nil && !isGone(err) {
				return err
			}
			if same {
				return nil
			}
		}
		return visit(change)
	}
	if err := w.run(); err != nil {
		return err
	}
	return tooLong
}

// entry is a file that differs, or a directory that may, or that has something in it that does.
type entry struct {
	path string
	kind Kind
	// stat is that of the view, or of a deleted entry that of the layers.
	stat linux.Stat
	// parent and name are where the view has it. view is the directory itself if it is one, and base that in the layers, nil for none.
	parent     *os.File
	name       string
	view, base *os.File
	// opaque is set for a directory that hides the one in the layers, and hidden for what is in one that does.
	opaque, hidden bool
	// wasThere reports whether the layers have something of that name, whether or not it is hidden.
	wasThere bool
}

// walker visits the entries of a tree.
type walker struct {
	tree Tree
	ctx  context.Context
	// visit is called for each entry. The path is "" if it is too long.
	visit func(entry) error
	// skipGone has files left out that are gone when the walker comes to them.
	skipGone bool
	levels   []*level
	// outerNames is what the names of all levels but the last take in memory.
	outerNames int
}

// level is a directory on the way from the root.
type level struct {
	path string
	// view, base and uppers are the directory in the view, in the base and in the uppers that have it, open unless the level is a deep one
	// above the last. base is nil and uppers are empty where there are none.
	view, base *os.File
	uppers     []*os.File
	// hasBase and inUppers tell what there is while it is not open.
	hasBase  bool
	inUppers []int
	// whole is set if the directory hides what the layers have, and hidden if they have one.
	whole, hidden bool
	names         names
	listed        bool
}

func (w *walker) run() error {
	defer func() {
		for _, l := range w.levels {
			l.close()
		}
	}()
	root := &level{path: ".", hasBase: w.tree.Base != nil, whole: w.tree.Base == nil}
	for i := range w.tree.Uppers {
		root.inUppers = append(root.inUppers, i)
	}
	if err := w.open(root); err != nil {
		return err
	}
	w.levels = append(w.levels, root)
	stat, err := linux.StatFile(root.view)
	if err != nil {
		return err
	}
	kind := Changed
	if root.base == nil {
		kind = Added
	}
	if err := w.visit(entry{path: ".", kind: kind, stat: stat, view: root.view, base: root.base}); err != nil {
		return err
	}
	for len(w.levels) > 0 {
		if err := w.step(); err != nil {
			return err
		}
	}
	return nil
}

// open opens the directories of a level.
func (w *walker) open(l *level) error {
	var err error
	if l.view, err = openPath(w.tree.View, l.path); err != nil {
		return err
	}
	if l.hasBase {
		if l.base, err = openPath(w.tree.Base, l.path); err != nil {
			return err
		}
	}
	for _, i := range l.inUppers {
		upper, err := openPath(w.tree.Uppers[i], l.path)
		if err != nil {
			return err
		}
		l.uppers = append(l.uppers, upper)
	}
	return nil
}

// openPath opens a directory for reading, by a path on which there is no link.
func openPath(root *os.File, path string) (*os.File, error) {
	const resolve = linux.ResolveBeneath | linux.ResolveNoSymlinks
	return linux.Open(root, path, os.O_RDONLY|linux.O_DIRECTORY, resolve)
}

func (l *level) close() {
	for _, dir := range append(l.uppers, l.view, l.base) {
		if dir != nil {
			dir.Close()
		}
	}
	l.view, l.base, l.uppers = nil, nil, nil
}

// sources are the directories whose names are looked at.
func (l *level) sources() []*os.File {
	switch {
	case !l.whole:
		return l.uppers
	case l.base == nil:
		return []*os.File{l.view}
	}
	return []*os.File{l.view, l.base}
}

// step visits the entries of the last level up to the next directory, which it enters, or to the end, where it leaves the level.
func (w *walker) step() error {
	l := w.levels[len(w.levels)-1]
	for {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		if len(l.names.list) == 0 && (l.names.more || !l.listed) {
			l.listed = true
			if err := l.names.read(l.sources()); err != nil {
				return fmt.Errorf("list %s: %w", quote(l.path), err)
			}
		}
		if len(l.names.list) == 0 {
			return w.leave()
		}
		name := l.names.list[0]
		l.names.list, l.names.last = l.names.list[1:], name
		entered, err := w.compare(l, name)
		if w.skipGone && isGone(err) {
			continue
		}
		if err != nil || entered {
			return err
		}
	}
}

// isGone reports whether an error says that a file was removed or replaced by one of another type.
func isGone(err error) bool {
	for _, gone := range []error{fs.ErrNotExist, syscall.ENOTDIR, syscall.ELOOP, syscall.ESTALE} {
		if errors.Is(err, gone) {
			return true
		}
	}
	return false
}

// compare visits an entry. It reports whether that is a directory in which something may differ, which it has entered.
func (w *walker) compare(l *level, name string) (entered bool, err error) {
	e := entry{path: join(l.path, name), parent: l.view, name: name, kind: Added, hidden: l.hidden}
	var before linux.Stat
	if l.base != nil {
		before, err = linux.Fstatat(l.base, name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
		if e.wasThere = err == nil; e.wasThere {
			e.kind = Changed
		}
	}
	stat, err := linux.Fstatat(l.view, name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !e.wasThere:
		// It is a whiteout of something that an upper had, or one of nothing.
		return false, nil
	case errors.Is(err, fs.ErrNotExist):
		e.kind, stat = Deleted, before
	case err != nil:
		return false, err
	}
	e.stat = stat
	if len(e.path) > maxPath {
		e.path = ""
		return false, w.visit(e)
	}
	if e.kind == Deleted || !stat.IsDir() {
		return false, w.visit(e)
	}
	next, err := w.openChild(l, name, e.wasThere && before.IsDir())
	if err != nil {
		return false, err
	}
	e.view, e.base = next.view, next.base
	e.opaque = next.hidden && !l.hidden
	if err := w.visit(e); err != nil {
		next.close()
		return false, err
	}
	w.enter(next)
	return true, nil
}

// openChild opens a directory in the one of a level. inBase says whether the layers have a directory there.
func (w *walker) openChild(l *level, name string, inBase bool) (_ *level, err error) {
	next := &level{path: join(l.path, name), hasBase: inBase, whole: l.whole || !inBase}
	defer func() {
		if err != nil {
			next.close()
		}
	}()
	if next.view, err = openDir(l.view, name); err != nil {
		return nil, err
	}
	if inBase {
		if next.base, err = openDir(l.base, name); err != nil {
			return nil, err
		}
	}
	if !next.whole {
		if err := l.openInUppers(next, name); err != nil {
			return nil, err
		}
	}
	if next.whole {
		for _, dir := range next.uppers {
			dir.Close()
		}
		next.uppers, next.inUppers = nil, nil
	}
	// What the layers have is hidden by the directory, or by one above it.
	next.hidden = next.whole && inBase || l.hidden
	return next, nil
}

// openInUppers opens a directory in each upper that overlayfs merges into it. It sets whole if the directory hides the one of the layers,
// or shows another one than that.
func (l *level) openInUppers(next *level, name string) error {
	for i, upper := range l.uppers {
		dir, err := openDir(upper, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
			// A whiteout, or another file. It hides what is below it.
			next.whole = true
			return nil
		}
		if err != nil {
			return err
		}
		next.uppers, next.inUppers = append(next.uppers, dir), append(next.inUppers, l.inUppers[i])
		opaque, err := readXattr(dir, "trusted.overlay.opaque")
		if err != nil {
			return err
		}
		redirect, err := readXattr(dir, "trusted.overlay.redirect")
		if err != nil {
			return err
		}
		// A directory that was moved away and back leads to itself.
		isMoved := redirect != "" && redirect != name && redirect != "/"+next.path
		if opaque == "y" || isMoved {
			next.whole = true
			return nil
		}
	}
	return nil
}

// openDir opens an entry that is a directory, for reading.
func openDir(dir *os.File, name string) (*os.File, error) { return linux.OpenNamed(dir, name, name) }

// enter takes a directory as the next level.
func (w *walker) enter(next *level) {
	last := w.levels[len(w.levels)-1]
	switch {
	case w.outerNames > 2*maxOuterNames:
		last.names.forget(fewNames)
	case w.outerNames+last.names.size() > maxOuterNames:
		last.names.forget(keptNames)
	}
	w.outerNames += last.names.size()
	if len(w.levels) > maxOpen {
		last.close()
	}
	w.levels = append(w.levels, next)
}

// leave goes back to the level above.
func (w *walker) leave() error {
	last := len(w.levels) - 1
	w.levels[last].close()
	w.levels = w.levels[:last]
	if last == 0 {
		return nil
	}
	above := w.levels[last-1]
	w.outerNames -= above.names.size()
	if above.view != nil {
		return nil
	}
	err := w.open(above)
	if w.skipGone && isGone(err) {
		above.close()
		above.names = names{}
		return nil
	}
	return err
}

// join returns the path of an entry of a directory.
func join(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}
