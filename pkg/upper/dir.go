package upper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Dir is an upper in a plain directory of the node's own file system.
type Dir struct {
	root *os.File
	base string
}

var _ Place = Dir{}

// NewDir returns the upper that is kept in base, a path beneath root. root is an open directory, on whose mount the
// upper is used.
func NewDir(root *os.File, base string) Dir { return Dir{root: root, base: base} }

// Prepare makes the directories where they are missing.
func (d Dir) Prepare(_ context.Context, root Root) (Dirs, error) {
	base, err := d.open(unix.O_PATH)
	if errors.Is(err, fs.ErrNotExist) {
		if err := unix.Mkdirat(int(d.root.Fd()), d.base, 0o700); err != nil {
			return Dirs{}, fmt.Errorf("make the upper's directory %s: %w", d.path(), err)
		}
		base, err = d.open(unix.O_PATH)
	}
	if err != nil {
		return Dirs{}, err
	}
	defer base.Close()
	dirs, err := openDirs(base, root)
	if err != nil {
		return Dirs{}, fmt.Errorf("prepare an upper: %w", err)
	}
	return dirs, nil
}

// open opens the base directory. No link is followed, nor anything above the root.
func (d Dir) open(flags uint64) (*os.File, error) {
	fd, err := unix.Openat2(int(d.root.Fd()), d.base, &unix.OpenHow{
		Flags:   flags | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, fmt.Errorf("open the upper's directory %s: %w", d.path(), err)
	}
	return os.NewFile(uintptr(fd), d.path()), nil
}

// Paths are where the upper and work directories are.
func (d Dir) Paths() (upper, work string) {
	return d.path() + "/" + upperName, d.path() + "/" + workName
}

func (d Dir) path() string { return d.root.Name() + "/" + d.base }

// ClearWork empties the work directory.
func (d Dir) ClearWork() error { return clearWork(d) }

// Release has nothing to do.
func (d Dir) Release() error { return nil }

// Discard discards the two directories.
func (d Dir) Discard(discard func(path string) error) error {
	upper, work := d.Paths()
	return errors.Join(discard(upper), discard(work))
}

// Grow has nothing to do: there is no limit.
func (d Dir) Grow(context.Context, Limit) error { return nil }

// Usage counts the files of the upper, and what is free beside them.
func (d Dir) Usage(ctx context.Context) (Usage, error) {
	path, _ := d.Paths()
	return usageOf(ctx, path)
}

// Taken is what the files of the upper take.
func (d Dir) Taken(ctx context.Context) (int64, error) {
	path, _ := d.Paths()
	used, err := countTree(ctx, path)
	return used.bytes, err
}

// Exists reports whether the upper has been made.
func (d Dir) Exists() (bool, error) {
	path, _ := d.Paths()
	return isThere(path)
}

// Check looks whether the upper is there, and can be written to.
func (d Dir) Check() error { return checkDirs(d) }

// Free is what is left on the file system.
func (d Dir) Free(context.Context) (Usage, error) { return FileSystemUsage(d.path()) }

func isThere(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// checkDirs looks whether the directories of an upper are there, and can be written to.
func checkDirs(place interface{ Paths() (upper, work string) }) error {
	upper, work := place.Paths()
	for _, path := range []string{upper, work} {
		there, err := isThere(path)
		if err != nil {
			return fmt.Errorf("look at the upper: %w", err)
		}
		if !there {
			return fmt.Errorf("%w: the upper's directory %s is gone", errdefs.ErrNotFound, path)
		}
	}
	return CheckWritable(work)
}

// writtenName is the attribute that CheckWritable sets. Nobody reads it.
const writtenName = "trusted.overlay-csi.written"

// CheckWritable finds out whether the file system of a directory can be written to, by writing: one that the kernel has given
// up on need not say that it is read-only (ext4 from Linux 6.12 on), and takes new times for files without a word (ext4 before
// that). The error is of the kind FailedPrecondition where it is read-only. That there is no room is none.
func CheckWritable(dir string) error {
	err := unix.Lsetxattr(dir, writtenName, []byte("y"), 0)
	switch {
	case err == nil, errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return nil
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: the file system of %s is read-only: the kernel log may say why", errdefs.ErrFailedPrecondition, dir)
	}
	return fmt.Errorf("write to a file system: %w", &os.PathError{Op: "setxattr", Path: dir, Err: err})
}

// clearWork empties the work directory of a place: what overlayfs has left there, and the mark of a volatile view, with
// which it would not be mounted again.
func clearWork(place Place) error {
	_, work := place.Paths()
	entries, err := os.ReadDir(work)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("clear the work directory: %w", err)
	}
	for _, entry := range entries {
		if err := os.RemoveAll(work + "/" + entry.Name()); err != nil {
			return fmt.Errorf("clear the work directory: %w", err)
		}
	}
	return nil
}
