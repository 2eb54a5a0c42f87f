package rebase

import (
	"context"
	"errors"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/squash"
)

// Write makes one upper of all uppers of a tree, in an empty directory, that views over the new layers show as the policy says. It is on
// the disk when Write returns without an error. After an error, what is in the directory has to be discarded. scratch is another empty
// directory of the file system, which gets what was removed, and is to be discarded too. With isApart, no file is a link to one of the
// uppers: see [squash.MergeApart].
func Write(ctx context.Context, tree Tree, policy Policy, into, scratch *os.File, isApart bool) error {
	merge := squash.Merge
	if isApart {
		merge = squash.MergeApart
	}
	if err := merge(ctx, tree.Uppers, into); err != nil {
		return err
	}
	tree.Uppers = []*os.File{into}
	w := &walker{comparison: comparison{ctx, tree.OneFileSystem}, tree: tree, policy: policy, editor: &editor{scratch: scratch}}
	if err := w.run(); err != nil {
		return err
	}
	return linux.SyncFS(into)
}

// editor changes an upper that nothing else uses. Its files may be links: names are removed and replaced, and only directories are changed.
type editor struct {
	scratch *os.File
	// dropped is how many entries were moved to scratch.
	dropped int64
}

// keepTimes returns a function that gives a directory back its times, which edits of its entries change.
func (e *editor) keepTimes(l *level) (restore func() error, err error) {
	if e == nil {
		return func() error { return nil }, nil
	}
	dir := l.upper.Topmost()
	stat, err := linux.StatFile(dir)
	if err != nil {
		return nil, err
	}
	return func() error {
		if !l.isEdited {
			return nil
		}
		return linux.Futimens(dir, time.Unix(stat.Atim.Unix()), time.Unix(stat.Mtim.Unix()))
	}, nil
}

// drop removes an entry, so that the view shows that of the layers.
func (w *walker) drop(e *entry) error {
	w.edits++
	if w.editor == nil {
		return nil
	}
	e.level.isEdited = true
	w.editor.dropped++
	to := strconv.FormatInt(w.editor.dropped, 10)
	return linux.Renameat(e.level.upper.Topmost(), e.name, w.editor.scratch, to, linux.RenameNoReplace)
}

// complete gives a file its content if it has none that is the same in the new layers.
func (w *walker) complete(e *entry, hasContent bool) error {
	if hasContent {
		return nil
	}
	w.edits++
	if w.editor == nil {
		return nil
	}
	e.level.isEdited = true
	content, err := linux.Reopen(e.view.handle, os.O_RDONLY)
	if err != nil {
		return err
	}
	err = squash.Complete(w.ctx, e.level.upper.Topmost(), e.name, content, w.editor.scratch)
	return errors.Join(err, content.Close())
}

// makeTransparent has the view show a directory of the new layers together with that of the uppers.
func (w *walker) makeTransparent(e *entry) error {
	w.edits++
	if w.editor == nil {
		return nil
	}
	return squash.MakeTransparent(e.Dir.Topmost())
}

// takeAttributes gives a directory the mode, owner and extended attributes that it has in the new layers.
func (w *walker) takeAttributes(e *entry) error {
	w.edits++
	if w.editor == nil {
		return nil
	}
	shown, err := linux.Reopen(e.newBelow.handle, os.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer shown.Close()
	group := e.newBelow.stat.Gid
	if w.tree.StoredGroup != nil {
		group = w.tree.StoredGroup(group)
	}
	return squash.CopyAttributes(shown, e.Dir.Topmost(), e.newBelow.stat.Uid, group)
}
