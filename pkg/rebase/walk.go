package rebase

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/diff"
	"github.com/overlay-csi/overlay-csi/pkg/squash"
)

const (
	// maxOpen is the most directories that are open at the same time, those on the way to the one that is compared in each tree.
	maxOpen = 1 << 13
	// entryHandles is how many files an entry has open beside its directories in the uppers.
	entryHandles = 5
	// pauseBelow is the number of levels of which the buffers of the listings are kept.
	pauseBelow = 32
)

var errTooDeep = fmt.Errorf("%w: it is too deep in too many uppers", errdefs.ErrResourceExhausted)

// Tree is what is rebased. All directories are open, and stay open with the caller.
type Tree struct {
	// Uppers are the directories of the uppers, the topmost first, open for reading.
	Uppers []*os.File
	// View is the root of an overlay of the uppers and the old layers, Old that of one of the old layers alone, and New that of one of
	// the new layers. Owners are mapped alike in all of them. Old may be nil, for no layers.
	View, Old, New *os.File
	// OneFileSystem is set if the directories of all layers, old and new, are on one file system.
	OneFileSystem bool
	// MayChange is set if somebody may write to the topmost upper.
	MayChange bool
	// StoredGroup returns by which group an upper has a file that the view shows with a group. It may be nil: they are the same.
	StoredGroup func(gid uint32) uint32
}

// Find compares the trees, and calls visit for each conflict, a directory before what is in it. It returns how many entries of the uppers
// have to give way to the new layers for views of the uppers over these to be as the policy says, 0 if the uppers can stay as they are.
//
// Where files may change while it runs, it leaves out what is gone when it comes to it. It returns ErrResourceExhausted for a tree that is
// too deep.
func Find(ctx context.Context, tree Tree, policy Policy, visit func(Conflict) error) (edits int64, err error) {
	w := &walker{comparison: comparison{ctx, tree.OneFileSystem}, tree: tree, policy: policy, visit: visit}
	err = w.run()
	return w.edits, err
}

// walker compares the trees.
type walker struct {
	comparison
	tree   Tree
	policy Policy
	visit  func(Conflict) error
	// editor changes the uppers, which are one that nothing else uses. It is nil to look only.
	editor *editor
	edits  int64
	// opened is how many directories are open, in depth levels.
	opened, depth int
}

// level is a directory that the uppers have.
type level struct {
	path  *place
	upper *squash.Dir
	// below is where the layers have what it goes on with, nil for nothing.
	below *place
	// view is the directory as the uppers show it. old and new are what it goes on with below, nil for nothing.
	view, old, new *os.File
	// isKept is set in a directory that stays as the uppers have it, in spite of a conflict.
	isKept bool
	// isEdited is set once an entry of it was edited.
	isEdited bool
}

func (w *walker) run() error {
	root, err := squash.OpenRoot(w.tree.Uppers)
	if err != nil {
		return err
	}
	defer root.Close()
	// The driver gives the root of an upper its attributes, which are no pod's changes.
	return w.walk(&level{path: &place{}, below: &place{}, upper: root, view: w.tree.View, old: w.tree.Old, new: w.tree.New})
}

// walk compares the entries of a directory.
func (w *walker) walk(l *level) error {
	leave, err := w.enter(l)
	if err != nil {
		return err
	}
	defer leave()
	restore, err := w.editor.keepTimes(l)
	if err != nil {
		return err
	}
	for {
		if w.ctx.Err() != nil {
			return context.Cause(w.ctx)
		}
		name, err := l.upper.Next()
		if err != nil {
			return err
		}
		if name == "" {
			return restore()
		}
		err = w.compare(l, name)
		if err != nil && !(w.tree.MayChange && isGone(err)) {
			if w.depth == 1 {
				return fmt.Errorf("compare %s: %w", quote(name), err)
			}
			return err
		}
		if w.depth > pauseBelow {
			if err := l.upper.Pause(); err != nil {
				return err
			}
		}
	}
}

// enter counts what is open for a directory until leave is called.
func (w *walker) enter(l *level) (leave func(), err error) {
	handles := l.upper.Len() + entryHandles
	if w.opened+handles > maxOpen {
		return nil, errTooDeep
	}
	w.opened += handles
	w.depth++
	return func() { w.opened -= handles; w.depth-- }, nil
}

// entry is one name in a directory.
type entry struct {
	squash.Entry
	level *level
	name  string
	// view is what the uppers show. old and new are what the layers have in the same place, if the directory goes on below.
	view, old, new file
	// oldBelow and newBelow are what the entry itself goes on with in the layers.
	oldBelow, newBelow file
}

func (e *entry) close() {
	if e.Dir != nil {
		e.Dir.Close()
	}
	for _, file := range []file{e.view, e.old, e.new, e.oldBelow, e.newBelow} {
		file.close()
	}
}

// below returns where the layers have what the entry goes on with, nil for nothing.
func (e *entry) below() *place {
	switch {
	case !e.GoesOn || !e.IsAbsolute && e.level.below == nil:
		return nil
	case e.IsAbsolute:
		return &place{&place{}, e.Below}
	}
	return &place{e.level.below, e.Below}
}

// isInPlace reports whether the entry goes on with what the layers have in the same place. What was moved away and back does.
func (e *entry) isInPlace() bool {
	switch {
	case !e.GoesOn || e.level.below == nil:
		return false
	case e.IsAbsolute:
		return e.Below == (&place{e.level.below, e.name}).String()
	}
	return e.Below == e.name
}

// find looks a name up in all trees.
func (w *walker) find(l *level, name string) (e *entry, err error) {
	e = &entry{level: l, name: name}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if e.Entry, err = l.upper.Find(name); err != nil {
		return nil, err
	}
	if e.view, err = look(l.view, name); err != nil {
		return nil, err
	}
	if e.old, err = look(l.old, name); err != nil {
		return nil, err
	}
	if e.new, err = look(l.new, name); err != nil || !e.GoesOn {
		return e, err
	}
	old, new := l.old, l.new
	if e.IsAbsolute {
		old, new = w.tree.Old, w.tree.New
	}
	if e.oldBelow, err = look(old, e.Below); err != nil {
		return nil, err
	}
	e.newBelow, err = look(new, e.Below)
	return e, err
}

// compare compares one entry.
func (w *walker) compare(l *level, name string) error {
	e, err := w.find(l, name)
	if err != nil {
		return err
	}
	defer e.close()
	switch {
	case e.IsWhiteout:
		return w.compareWhiteout(e)
	case e.Dir == nil:
		return w.compareFile(e)
	}
	return w.compareDir(e)
}

// compareWhiteout compares a name that the uppers hide.
func (w *walker) compareWhiteout(e *entry) error {
	if !e.new.there() || e.level.isKept {
		return nil
	}
	if !e.old.there() {
		// It has hidden nothing until now.
		return w.drop(e)
	}
	same, err := w.sameLayers(e.old, e.new)
	if err != nil || same {
		return err
	}
	takes, err := w.conflict(e, diff.Deleted, diff.Changed)
	if err != nil || !takes {
		return err
	}
	return w.drop(e)
}

// compareFile compares what is no directory.
func (w *walker) compareFile(e *entry) error {
	if !e.view.there() {
		return nil // It is gone.
	}
	hasContent := true
	var err error
	if e.GoesOn {
		// The content is that of a file below, and has to be the same there.
		hasContent = e.oldBelow.isRegular() && e.newBelow.isRegular()
		if hasContent {
			hasContent, err = w.sameContent(e.oldBelow, e.newBelow)
		}
		if err != nil {
			return err
		}
	}
	if e.level.isKept {
		return w.complete(e, hasContent)
	}
	untouched, err := w.sameLayers(e.old, e.new)
	if err != nil {
		return err
	}
	layers := kindOf(e.old, e.new)
	switch {
	case untouched && hasContent:
		return nil
	case untouched:
		layers = diff.Changed
		if !e.newBelow.there() {
			layers = diff.Deleted
		}
	default:
		unchanged, err := w.isUnchanged(e)
		if err != nil {
			return err
		}
		if unchanged {
			return w.drop(e)
		}
		alike, err := w.same(e.view, e.new)
		if err != nil {
			return err
		}
		if alike {
			return w.complete(e, hasContent)
		}
	}
	takes, err := w.conflict(e, kindOf(e.old, e.view), layers)
	if err != nil {
		return err
	}
	if takes {
		return w.drop(e)
	}
	return w.complete(e, hasContent)
}

// isUnchanged reports whether the uppers show of a file what the old layers have.
func (w *walker) isUnchanged(e *entry) (bool, error) {
	if e.isInPlace() {
		// A metacopy file has their content.
		return sameMetadata(e.old, e.view)
	}
	return w.same(e.old, e.view)
}

// conflict reports a conflict, and whether the entry of the layers is taken.
func (w *walker) conflict(e *entry, upper, layers diff.Kind) (takes bool, err error) {
	if w.visit != nil {
		err = w.visit(Conflict{Path: (&place{e.level.path, e.name}).String(), Upper: upper, Layers: layers})
	}
	return w.policy == TakeLayers, err
}
