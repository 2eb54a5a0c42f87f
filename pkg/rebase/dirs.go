package rebase

import (
	"context"

	"github.com/overlay-csi/overlay-csi/pkg/diff"
)

// compareDir compares a directory of the uppers, and then what is in it.
func (w *walker) compareDir(e *entry) error {
	if !e.view.isDir() {
		return nil // It is gone.
	}
	next := &level{
		path: &place{e.level.path, e.name}, below: e.below(), upper: e.Dir, view: e.view.handle, isKept: e.level.isKept,
	}
	if e.oldBelow.isDir() {
		next.old = e.oldBelow.handle
	}
	if e.newBelow.isDir() {
		next.new = e.newBelow.handle
	}
	if e.level.isKept {
		return w.walk(next)
	}
	isMerged := e.isInPlace()
	if !e.GoesOn && e.new.isDir() && !e.old.isDir() {
		// Both made a directory, which overlayfs would show as that of the uppers alone.
		if err := w.makeTransparent(e); err != nil {
			return err
		}
		isMerged, next.below, next.new, e.newBelow = true, &place{e.level.below, e.name}, e.new.handle, e.new
		// It is closed as e.new.
		defer func() { e.newBelow = file{} }()
	}
	if !isMerged || !e.oldBelow.isDir() && !e.newBelow.isDir() {
		takes, kept, err := w.comparePlace(e)
		if err != nil || takes {
			return err
		}
		next.isKept = kept
	}
	if e.oldBelow.isDir() && !e.newBelow.isDir() && !next.isKept {
		takes, kept, err := w.compareVanished(e)
		if err != nil || takes {
			return err
		}
		next.isKept = kept
	}
	if e.newBelow.isDir() && !next.isKept {
		if err := w.compareAttributes(e); err != nil {
			return err
		}
	}
	return w.walk(next)
}

// comparePlace compares what a directory hides, or comes in place of. With takes, what the layers have there is taken, and with kept, the
// directory stays, in spite of a conflict.
func (w *walker) comparePlace(e *entry) (takes, kept bool, err error) {
	same, err := w.sameLayers(e.old, e.new)
	if err == nil && !same && e.new.isDir() && e.old.isDir() {
		same, err = sameMetadata(e.view, e.new)
	}
	if err != nil || same {
		return false, false, err
	}
	takes, err = w.conflict(e, kindOf(e.old, e.view), kindOf(e.old, e.new))
	if err == nil && takes {
		err = w.drop(e)
	}
	return takes, !takes, err
}

// compareVanished compares a directory that goes on with one that the new layers do not have. It is a conflict if the uppers have anything
// of their own in it. takes and kept are as in comparePlace.
func (w *walker) compareVanished(e *entry) (takes, kept bool, err error) {
	changed := !e.isInPlace()
	if !changed {
		if changed, err = w.hasChanges(e); err != nil {
			return false, false, err
		}
	}
	if !changed {
		return true, false, w.drop(e)
	}
	takes, err = w.conflict(e, diff.Changed, kindOf(e.oldBelow, e.newBelow))
	if err == nil && takes {
		err = w.drop(e)
	}
	return takes, !takes, err
}

// compareAttributes compares the mode, owner and extended attributes of a directory that the new layers have too.
func (w *walker) compareAttributes(e *entry) error {
	if e.oldBelow.isDir() {
		untouched, err := sameMetadata(e.oldBelow, e.newBelow)
		if err != nil || untouched {
			return err
		}
		unchanged, err := sameMetadata(e.oldBelow, e.view)
		if err != nil {
			return err
		}
		if unchanged {
			return w.takeAttributes(e)
		}
	}
	alike, err := sameMetadata(e.view, e.newBelow)
	if err != nil || alike {
		return err
	}
	takes, err := w.conflict(e, kindOf(e.oldBelow, e.view), kindOf(e.oldBelow, e.newBelow))
	if err != nil || !takes {
		return err
	}
	return w.takeAttributes(e)
}

// hasChanges reports whether the uppers have anything of their own in a directory that is in place, or have changed it. What they only
// hide there does not count.
func (w *walker) hasChanges(e *entry) (bool, error) {
	same, err := sameMetadata(e.oldBelow, e.view)
	if err != nil || !same {
		return !same, err
	}
	// Its names are listed once more afterwards.
	again, err := e.level.upper.Find(e.name)
	if err != nil || again.Dir == nil {
		return false, err
	}
	defer again.Dir.Close()
	l := &level{below: e.below(), upper: again.Dir, view: e.view.handle, old: e.oldBelow.handle}
	leave, err := w.enter(l)
	if err != nil {
		return false, err
	}
	defer leave()
	for {
		if w.ctx.Err() != nil {
			return false, context.Cause(w.ctx)
		}
		name, err := again.Dir.Next()
		if err != nil || name == "" {
			return false, err
		}
		changed, err := w.isChange(l, name)
		if w.tree.MayChange && isGone(err) {
			continue
		}
		if err != nil || changed {
			return changed, err
		}
	}
}

// isChange reports whether an entry, or something in it, is the uppers' own.
func (w *walker) isChange(l *level, name string) (bool, error) {
	e, err := w.find(l, name)
	if err != nil {
		return false, err
	}
	defer e.close()
	switch {
	case e.IsWhiteout || !e.view.there():
		return false, nil
	case e.Dir == nil:
		same, err := w.isUnchanged(e)
		return !same, err
	case !e.isInPlace() || !e.oldBelow.isDir():
		return true, nil
	}
	return w.hasChanges(e)
}
