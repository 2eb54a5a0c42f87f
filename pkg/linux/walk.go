package linux

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// walkDepth is the most levels of directories that Walk enters: each takes 32 bytes of memory as long as it is open.
	walkDepth = 1 << 17
	// walkOpen is the number of levels of which Walk keeps descriptor and buffer. Deeper down it reads a directory again where
	// it was left.
	walkOpen = 64
	// walkBuffer is what Walk reads of a directory at once. It holds an entry with the longest name.
	walkBuffer = 8 << 10
)

var (
	// ErrTooDeep says that a tree has more levels of directories than Walk enters.
	ErrTooDeep = errors.New("more than 131072 levels of directories")
	// ErrMoved says that a directory was moved while Walk was in it, so that there was no way back.
	ErrMoved = errors.New("a directory was moved while the files beneath it were visited")
)

// Visit is called for one file: an entry of dir, or with an empty name dir itself. It must not keep dir.
type Visit func(dir *os.File, name string, stat Stat) error

// Walk visits all files beneath a directory, which is open for reading, and at last the directory itself. A directory comes after
// what is in it. It follows no link, leaves out what is removed meanwhile, and ends with the first error of visit or of ctx.
//
// Its memory and its descriptors are bounded whatever the tree is: it keeps no path, 64 descriptors, and 32 bytes for each level
// up to 131,072, beyond which it returns [ErrTooDeep]. Below 64 levels it returns to a directory through "..": it returns
// [ErrMoved] if that is another one now. reread then reports that it has read a directory in parts: entries that visit makes or
// moves up, as a copy-up does with the entries of a merged directory of overlayfs, may then have been left out.
func Walk(ctx context.Context, root *os.File, visit Visit) (reread bool, err error) {
	handle, err := Open(root, ".", os.O_RDONLY|O_DIRECTORY, 0)
	if err != nil {
		return false, err
	}
	w := walk{name: root.Name() + "/…", visit: visit}
	defer w.close()
	if err := w.enter(handle); err != nil {
		return false, err
	}
	for len(w.levels) > 0 {
		if err := ctx.Err(); err != nil {
			return w.reread, err
		}
		if err := w.step(ctx); err != nil {
			return w.reread, err
		}
	}
	return w.reread, nil
}

// walk is the state of one Walk: levels from the root to the directory that is being read.
type walk struct {
	// name is what the handles of all directories beneath the root are called: a path would grow with the depth.
	name   string
	visit  Visit
	levels []walkLevel
	// open are the listings of the first levels and of the last one.
	open   []*listing
	reread bool
}

// walkLevel is a directory on the way from the root, with the position after the entry that leads to the next level.
type walkLevel struct {
	id     FileID
	offset int64
}

// enter takes a directory as the next level.
func (w *walk) enter(dir *os.File) error {
	stat, err := StatFile(dir)
	if err == nil && len(w.levels) >= walkDepth {
		err = ErrTooDeep
	}
	if err != nil {
		return errors.Join(err, dir.Close())
	}
	if len(w.levels) > walkOpen {
		// The level above is not among the first ones.
		last := len(w.open) - 1
		err := w.open[last].dir.Close()
		w.open = w.open[:last]
		if err != nil {
			return errors.Join(err, dir.Close())
		}
	}
	w.levels = append(w.levels, walkLevel{id: stat.ID()})
	w.open = append(w.open, &listing{dir: dir})
	return nil
}

// step visits the entries of the last level up to the next directory, which it enters, or to the end, where it leaves the level.
func (w *walk) step(ctx context.Context) error {
	level, list := &w.levels[len(w.levels)-1], w.open[len(w.open)-1]
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		name, offset, err := list.next()
		if err != nil {
			return err
		}
		if name == "" {
			return w.leave()
		}
		level.offset = offset
		stat, err := Fstatat(list.dir, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if !stat.IsDir() {
			err = w.visit(list.dir, name, stat)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			continue
		}
		child, err := OpenNamed(list.dir, name, w.name)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
			continue
		}
		if err != nil {
			return err
		}
		return w.enter(child)
	}
}

// leave visits the directory of the last level and goes back to the one above.
func (w *walk) leave() error {
	last := w.open[len(w.open)-1]
	stat, err := StatFile(last.dir)
	if err == nil {
		err = w.visit(last.dir, "", stat)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w.levels = w.levels[:len(w.levels)-1]
	w.open = w.open[:len(w.open)-1]
	defer last.dir.Close()
	if len(w.open) == len(w.levels) {
		return nil
	}
	above := w.levels[len(w.levels)-1]
	parent, err := OpenNamed(last.dir, "..", w.name)
	if err != nil {
		return err
	}
	w.reread = true
	w.open = append(w.open, &listing{dir: parent})
	if stat, err := StatFile(parent); err != nil {
		return err
	} else if stat.ID() != above.id {
		return fmt.Errorf("%w: %s", ErrMoved, w.name)
	}
	_, err = parent.Seek(above.offset, 0)
	return err
}

func (w *walk) close() {
	for _, list := range w.open {
		list.dir.Close()
	}
}

// OpenNamed opens an entry that is a directory, for reading (openat(2)). name is what its handle is called: in a deep tree, a path would
// grow with the depth.
func OpenNamed(dir *os.File, path, name string) (*os.File, error) {
	return open("openat", dir, path, name, func(fd int) (int, error) {
		return unix.Openat(fd, path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
}

// Listing reads the names in a directory one by one, and takes no more memory for a large one.
type Listing struct {
	list listing
	// after is the position after the name that was read last.
	after int64
}

// NewListing returns a listing of a directory that is open for reading. It moves the position of the handle, which must be used for
// nothing else that does.
func NewListing(dir *os.File) *Listing { return &Listing{list: listing{dir: dir}} }

// Next returns the next name, "." and ".." left out, and "" at the end.
func (l *Listing) Next() (string, error) {
	name, offset, err := l.list.next()
	if name != "" {
		l.after = offset
	}
	return name, err
}

// Pause gives the memory back until the next call of Next, which reads on in the directory.
func (l *Listing) Pause() error {
	if l.list.buf == nil {
		return nil
	}
	l.list.buf, l.list.left = nil, nil
	_, err := l.list.dir.Seek(l.after, io.SeekStart)
	return err
}

// listing reads the entries of a directory, and the position after each, which os.File does not give.
type listing struct {
	dir  *os.File
	buf  []byte
	left []byte
}

// next returns the next entry but "." and "..", and the position after it. The name is "" at the end.
func (l *listing) next() (name string, offset int64, err error) {
	for {
		if len(l.left) == 0 {
			if l.buf == nil {
				l.buf = make([]byte, walkBuffer)
			}
			var n int
			err := call("getdents64", l.dir, func(fd int) (err error) {
				n, err = unix.Getdents(fd, l.buf)
				return err
			})
			if errors.Is(err, fs.ErrNotExist) {
				// The directory was removed.
				return "", 0, nil
			}
			if err != nil || n == 0 {
				return "", 0, err
			}
			l.left = l.buf[:n]
		}
		name, offset = l.take()
		if name != "." && name != ".." {
			return name, offset, nil
		}
	}
}

// take takes the first entry in the buffer: struct linux_dirent64 of getdents(2).
func (l *listing) take() (name string, offset int64) {
	const header = 19
	size := binary.NativeEndian.Uint16(l.left[16:18])
	text, _, _ := bytes.Cut(l.left[header:size], []byte{0})
	offset = int64(binary.NativeEndian.Uint64(l.left[8:16]))
	l.left = l.left[size:]
	return string(text), offset
}
