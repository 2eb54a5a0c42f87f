package squash

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Room is how much a copy may take: bytes of the disk, and inodes.
type Room struct{ Bytes, Inodes int64 }

const (
	// maxReplaced is how often one name is looked at again because something else has it by then.
	maxReplaced = 16
	// maxRemoved is how often a copy of a directory is thrown away because the directory was removed.
	maxRemoved = 1024
	// unaccounted is how many bytes a file may have that take no block: file systems have those of small ones in the inode.
	unaccounted = 64 << 10
)

var errOutOfRoom = fmt.Errorf("%w: pods write faster than the upper can be copied", errdefs.ErrUnavailable)

// errReplaced says that another file has the name by now.
var errReplaced = errors.New("it was replaced")

// CopyInUse copies an upper that an overlay writes to into an empty directory, which is on the disk when it returns. The copy is not of
// one moment: of changes that follow one another it may have the later one alone, a file that is written to meanwhile may be part old and
// part new, and what is moved meanwhile may be missing or be there twice. What does not change is copied as it is, and each name has what
// it had at some time. Nothing changes in the upper.
//
// It returns errdefs.ErrUnavailable if the upper has grown beyond room, or changes faster than it can be copied, and
// errdefs.ErrResourceExhausted for a tree that is too deep. After an error, what is in the directory has to be discarded.
func CopyInUse(ctx context.Context, upper, into *os.File, room Room) error {
	c := &copier{files: files{into: into, noLinks: []bool{true}, noClones: make([]bool, 1)}, left: room}
	defer c.close()
	if err := c.open(upper, into); err != nil {
		return fmt.Errorf("open the upper to copy: %w", err)
	}
	for len(c.levels) > 0 {
		if err := c.step(ctx); err != nil {
			return fmt.Errorf("copy %q of the upper: %w", c.path(), err)
		}
	}
	return linux.SyncFS(into)
}

// copier is the state of one copy: levels from the root to the directory that is being copied.
type copier struct {
	root    linux.FileID
	levels  []*copyLevel
	files   files
	left    Room
	removed int
	// current is the name that is being copied in the last level.
	current string
}

type copyLevel struct {
	name       string
	from, into *os.File
	listing    *linux.Listing
}

func (l *copyLevel) close() {
	l.from.Close()
	l.into.Close()
}

func (c *copier) open(upper, into *os.File) error {
	stat, err := linux.StatFile(upper)
	if err != nil {
		return err
	}
	c.root = stat.ID()
	from, err := linux.OpenNamed(upper, ".", handleName)
	if err != nil {
		return err
	}
	to, err := linux.OpenNamed(into, ".", "the copy of an upper")
	if err != nil {
		from.Close()
		return err
	}
	c.levels = append(c.levels, &copyLevel{from: from, into: to, listing: linux.NewListing(from)})
	if err := c.files.open([]part{{dir: from}}); err != nil {
		return err
	}
	return removeACLs(to)
}

func (c *copier) close() {
	for _, level := range c.levels {
		level.close()
	}
	c.files.close()
}

// path returns the path of the entry that is being copied, for an error.
func (c *copier) path() string {
	names := make([]string, len(c.levels))
	for i, level := range c.levels {
		names[i] = level.name
	}
	return path.Join(shortPath(names), c.current)
}

// step copies the entries of the last level up to the next directory, which it enters, or to the end, where it leaves the level.
func (c *copier) step(ctx context.Context) error {
	l := c.levels[len(c.levels)-1]
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		name, err := l.listing.Next()
		if err != nil {
			return err
		}
		if c.current = name; name == "" {
			return c.leave(ctx, l)
		}
		entered, err := c.entry(ctx, l, name)
		if err != nil || entered {
			return err
		}
	}
}

// entry copies what has a name now. It reports whether that is a directory, which it has entered.
func (c *copier) entry(ctx context.Context, l *copyLevel, name string) (entered bool, err error) {
	for range maxReplaced {
		stat, err := linux.Fstatat(l.from, name)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if stat.IsDir() {
			err = c.enter(l, name)
		} else {
			err = c.copy(ctx, l, name)
		}
		switch {
		case err == nil:
			return stat.IsDir(), nil
		case errors.Is(err, fs.ErrExist):
			// A listing may have a name twice if its entry was made again.
			return false, nil
		case errors.Is(err, errReplaced), errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP):
		default:
			return false, err
		}
	}
	return false, fmt.Errorf("%w: it is replaced all the time", errdefs.ErrUnavailable)
}

// enter makes a directory and takes it as the next level.
func (c *copier) enter(above *copyLevel, name string) (err error) {
	if 2*len(c.levels) >= maxOpen {
		return fmt.Errorf("%w: it is too deep", errdefs.ErrResourceExhausted)
	}
	from, err := linux.OpenNamed(above.from, name, handleName)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			from.Close()
		}
	}()
	stat, err := linux.StatFile(from)
	if err != nil {
		return err
	}
	if err := c.take(1, stat.DiskBytes()); err != nil {
		return err
	}
	if len(c.levels) > pauseBelow {
		if err := above.listing.Pause(); err != nil {
			return err
		}
	}
	if err := linux.Mkdirat(above.into, name, 0o700); err != nil {
		return err
	}
	into, err := linux.OpenNamed(above.into, name, "a directory of the copy of an upper")
	if err != nil {
		return err
	}
	c.levels = append(c.levels, &copyLevel{name: name, from: from, into: into, listing: linux.NewListing(from)})
	c.current = ""
	return nil
}

// leave finishes the last level and goes back to the one above.
func (c *copier) leave(ctx context.Context, l *copyLevel) error {
	if len(c.levels) > 1 {
		wasRemoved, err := c.wasRemoved(l)
		if err != nil {
			return err
		}
		if wasRemoved {
			return c.again(ctx, l)
		}
	} else if err := c.files.clear(ctx); err != nil {
		// It has names in the root, which gets its times now.
		return err
	}
	stat, err := linux.StatFile(l.from)
	if err != nil {
		return err
	}
	set, err := overlayXattrs(l.from)
	if err != nil {
		return err
	}
	if err := setAttributes(l.from, l.into, stat, set); err != nil {
		return err
	}
	c.drop(l)
	return nil
}

func (c *copier) drop(l *copyLevel) {
	c.levels = c.levels[:len(c.levels)-1]
	l.close()
}

// wasRemoved reports whether a directory is no longer in the upper. overlayfs moves a directory that it removes to the work directory, and
// deletes the whiteouts in it there (ovl_clear_empty): a copy that lacks them shows what they hid.
func (c *copier) wasRemoved(l *copyLevel) (bool, error) {
	stat, err := linux.StatFile(l.from)
	if err != nil || stat.Nlink == 0 {
		return err == nil, err
	}
	above := c.levels[len(c.levels)-2].from
	found, err := linux.Fstatat(above, l.name)
	if err == nil && found.ID() == stat.ID() {
		return false, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	// A pod may have moved it. What is copied is as good as any then.
	isBeneath, err := c.isBeneath(l.from)
	return !isBeneath && err == nil, err
}

// isBeneath reports whether a directory is in the upper.
func (c *copier) isBeneath(dir *os.File) (bool, error) {
	at, err := linux.OpenNamed(dir, ".", handleName)
	if err != nil {
		return false, err
	}
	for range maxOpen {
		before, err := linux.StatFile(at)
		if err != nil || before.ID() == c.root {
			return err == nil, errors.Join(err, at.Close())
		}
		above, err := linux.OpenNamed(at, "..", handleName)
		at.Close()
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil // It was removed.
		}
		if err != nil {
			return false, err
		}
		if same, err := linux.StatFile(above); err != nil || same.ID() == before.ID() {
			return false, errors.Join(err, above.Close())
		}
		at = above
	}
	return false, at.Close()
}

// again discards the copy of the last level, and copies what has its name now.
func (c *copier) again(ctx context.Context, l *copyLevel) error {
	if c.removed++; c.removed > maxRemoved {
		return fmt.Errorf("%w: directories are removed all the time", errdefs.ErrUnavailable)
	}
	c.drop(l)
	above := c.levels[len(c.levels)-1]
	// Nobody else has the copy.
	if err := os.RemoveAll(linux.ProcPath(above.into) + "/" + l.name); err != nil {
		return err
	}
	c.current = l.name
	_, err := c.entry(ctx, above, l.name)
	return err
}

// take takes room for what is copied.
func (c *copier) take(inodes, bytes int64) error {
	c.left.Inodes -= inodes
	c.left.Bytes -= bytes
	if c.left.Inodes < 0 || c.left.Bytes < 0 {
		return errOutOfRoom
	}
	return nil
}

// copy copies what is not a directory. Each name of a file with several is a link to the first one, unless the file has changed since.
func (c *copier) copy(ctx context.Context, l *copyLevel, name string) error {
	from, err := linux.Open(l.from, name, linux.O_PATH|linux.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	// Of the handle: another file may have the name by now.
	stat, err := linux.StatFile(from)
	switch {
	case err != nil:
		return err
	case stat.IsDir():
		return errReplaced
	case stat.IsWhiteout():
		return c.files.makeWhiteout(l.into, name)
	case stat.Nlink == 1:
		return c.copyOne(ctx, from, stat, l.into, name)
	}
	known := fmt.Sprintf("%d-%d-%d-%d", stat.Ino, stat.Ctim.Sec, stat.Ctim.Nsec, stat.Size)
	err = linux.Linkat(c.files.scratch, known, l.into, name)
	if err == nil || errors.Is(err, fs.ErrExist) {
		return err
	}
	if isNotLinkable(err) {
		err = linux.Unlinkat(c.files.scratch, known)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := c.copyOne(ctx, from, stat, l.into, name); err != nil {
		return err
	}
	return linux.Linkat(l.into, name, c.files.scratch, known)
}

func (c *copier) copyOne(ctx context.Context, from *os.File, stat linux.Stat, into *os.File, name string) error {
	if err := c.take(1, stat.DiskBytes()); err != nil {
		return err
	}
	if !stat.IsRegular() {
		return copySpecial(from, stat, into, name)
	}
	return c.copyRegular(ctx, from, stat, into, name)
}

// copyRegular makes a copy of a regular file, which is open at from by O_PATH.
func (c *copier) copyRegular(ctx context.Context, from *os.File, stat linux.Stat, into *os.File, name string) (err error) {
	// Before the content: overlayfs gives a metacopy file its content, and then takes the attribute away.
	set, err := overlayXattrs(from)
	if err != nil {
		return err
	}
	made, err := linux.OpenFile(into, name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|linux.O_NOFOLLOW, 0o600, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, made.Close()) }()
	if _, isMetacopy := set[metacopyXattr]; isMetacopy {
		err = made.Truncate(stat.Size)
	} else if stat.Size > 0 {
		err = c.copyContent(ctx, from, made, stat)
	}
	if err != nil {
		return err
	}
	return setAttributes(from, made, stat, set)
}

func (c *copier) copyContent(ctx context.Context, from, made *os.File, stat linux.Stat) error {
	data, err := linux.Reopen(from, os.O_RDONLY|syscall.O_NOATIME)
	if err != nil {
		return err
	}
	defer data.Close()
	// What is left, and what was taken for the file.
	most := c.left.Bytes + min(stat.DiskBytes()+unaccounted, math.MaxInt64-c.left.Bytes)
	err = c.files.copyContent(ctx, 0, data, made, most)
	if errors.Is(err, syscall.EFBIG) {
		return errOutOfRoom
	}
	// A file that was cut ends where it was cut: there is nothing to read (EOF) or to look for (ENXIO).
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ENXIO) {
		return err
	}
	copied, err := linux.StatFile(made)
	if err != nil {
		return err
	}
	return c.take(0, max(0, copied.DiskBytes()-stat.DiskBytes()))
}
