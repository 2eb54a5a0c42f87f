package dataroot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	// treeOpen is the number of levels of directories that stay open. Deeper down, the way back is "..".
	treeOpen = 64
	// treeLevels is the number of levels whose directories are known again on the way back, each by 16 bytes. In a deeper tree the upper
	// half of them is forgotten: what is below is deleted first, and the rest from the top once more.
	treeLevels = 1 << 17
)

// tree deletes one directory with what is in it. It enters each directory once, renames nothing, which a quota or a subvolume can
// forbid, and keeps neither more than treeOpen descriptors nor a path: a pod may have made any number of levels.
type tree struct {
	// name is what the handles of all directories are called.
	name   string
	levels int
	pace   *pace
	// ids are the directories from the top to the last one. open are the first ones of them, and the last one.
	ids  []linux.FileID
	open []*openDir
	// cut is set if the upper ones were forgotten, so that the way to the top is not known. Of the others, the last one alone is open.
	cut bool
}

// openDir is a directory that is being emptied.
type openDir struct {
	dir *os.File
	// names are entries that were read and not deleted.
	names []string
	// entered is set once the first of them was entered, and is empty.
	entered bool
}

// remove deletes the contents of the directory that parent has under a name.
func (t *tree) remove(ctx context.Context, parent *os.File, name string) error {
	for {
		top, err := linux.OpenNamed(parent, name, t.name)
		if err != nil {
			return err
		}
		t.cut = false
		if err := t.empty(ctx, top); err != nil || !t.cut {
			return err
		}
	}
}

func (t *tree) empty(ctx context.Context, top *os.File) error {
	defer t.close()
	if err := t.enter(top); err != nil {
		return err
	}
	for len(t.open) > 0 {
		if err := t.step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// enter takes a directory as the next level.
func (t *tree) enter(dir *os.File) error {
	stat, err := linux.StatFile(dir)
	if err != nil {
		return errors.Join(err, dir.Close())
	}
	if len(t.ids) >= t.levels {
		t.ids = slices.Delete(t.ids, 0, len(t.ids)/2)
		last := len(t.open) - 1
		closeDirs(t.open[:last])
		t.open = t.open[last:]
		t.cut = true
	}
	if t.cut || len(t.ids) > treeOpen {
		// The level above is not among the first ones.
		last := len(t.open) - 1
		closeDirs(t.open[last:])
		t.open = t.open[:last]
	}
	t.ids = append(t.ids, stat.ID())
	t.open = append(t.open, &openDir{dir: dir})
	return nil
}

// step deletes an entry of the last level, enters it, or leaves the level if there is none.
func (t *tree) step(ctx context.Context) error {
	last := t.open[len(t.open)-1]
	name, err := last.next()
	if err != nil {
		return err
	}
	if name == "" {
		return t.leave()
	}
	err = removeOne(last.dir, name)
	if !isNotEmpty(err) {
		last.names, last.entered = last.names[1:], false
		return errors.Join(err, t.pace.step(ctx))
	}
	if last.entered {
		return fmt.Errorf("delete a directory in %s: somebody makes files in it: %w", t.name, err)
	}
	child, err := linux.OpenNamed(last.dir, name, t.name)
	if err != nil {
		return err
	}
	last.entered = true
	return t.enter(child)
}

// leave goes back to the level above the last one.
func (t *tree) leave() error {
	last := t.open[len(t.open)-1]
	defer last.dir.Close()
	t.ids, t.open = t.ids[:len(t.ids)-1], t.open[:len(t.open)-1]
	if len(t.ids) == 0 || !t.cut && len(t.open) == len(t.ids) {
		return nil
	}
	parent, err := linux.OpenNamed(last.dir, "..", t.name)
	if err != nil {
		return err
	}
	t.open = append(t.open, &openDir{dir: parent})
	stat, err := linux.StatFile(parent)
	if err == nil && stat.ID() != t.ids[len(t.ids)-1] {
		err = fmt.Errorf("delete %s: %w", t.name, linux.ErrMoved)
	}
	return err
}

func (t *tree) close() {
	closeDirs(t.open)
	t.ids, t.open = t.ids[:0], t.open[:0]
}

func closeDirs(dirs []*openDir) {
	for _, level := range dirs {
		level.dir.Close()
	}
}

// next returns the name of an entry, "" if there is none.
func (d *openDir) next() (string, error) {
	if len(d.names) == 0 {
		// Each batch is read from the beginning: the order of a directory changes as entries are removed.
		if _, err := d.dir.Seek(0, io.SeekStart); err != nil {
			return "", err
		}
		names, err := d.dir.Readdirnames(deleteBatch)
		if len(names) == 0 {
			if errors.Is(err, io.EOF) || errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
			return "", err
		}
		d.names = names
	}
	return d.names[0], nil
}

// removeOne deletes a file or an empty directory. It returns nil if there is none.
func removeOne(dir *os.File, name string) error {
	err := linux.Unlinkat(dir, name)
	if errors.Is(err, syscall.EISDIR) {
		err = linux.Rmdirat(dir, name)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func isNotEmpty(err error) bool {
	return errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST)
}
