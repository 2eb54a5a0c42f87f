package upper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Names of the directories within an upper's base directory, in the words of overlayfs.
const (
	upperName = "upper"
	workName  = "work"
)

// RootAttr are the attributes of the root directory of an upper, which is the root of the view.
type RootAttr struct {
	UID, GID uint32
	// Mode has the permission bits, with set-group-ID and sticky.
	Mode uint32
}

// RootAttrOf returns the attributes of an open directory.
func RootAttrOf(dir *os.File) (RootAttr, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &stat); err != nil {
		return RootAttr{}, &os.PathError{Op: "fstat", Path: dir.Name(), Err: err}
	}
	return RootAttr{UID: stat.Uid, GID: stat.Gid, Mode: stat.Mode & 0o7777}, nil
}

// SetGroup gives the root of an existing upper to a group, and adds the bits of mode.
func SetGroup(dir *os.File, gid, mode uint32) error {
	has, err := RootAttrOf(dir)
	if err != nil {
		return err
	}
	want := RootAttr{UID: has.UID, GID: gid, Mode: has.Mode | mode}
	if has == want {
		return nil
	}
	return want.apply(dir)
}

// apply sets the attributes of an open directory (O_PATH).
func (r RootAttr) apply(dir *os.File) error {
	if err := unix.Fchownat(int(dir.Fd()), "", int(r.UID), int(r.GID), unix.AT_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "chown", Path: dir.Name(), Err: err}
	}
	if err := unix.Fchmodat(int(dir.Fd()), ".", r.Mode, 0); err != nil {
		return &os.PathError{Op: "chmod", Path: dir.Name(), Err: err}
	}
	return nil
}

// openDirs makes the two directories in base, an open directory, if they are missing, and opens them.
func openDirs(base *os.File, root RootAttr) (Dirs, error) {
	existed, err := makeUpper(base, root)
	if err != nil {
		return Dirs{}, err
	}
	if err := unix.Mkdirat(int(base.Fd()), workName, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return Dirs{}, &os.PathError{Op: "mkdir", Path: base.Name() + "/" + workName, Err: err}
	}
	upperDir, err := openIn(base, upperName)
	if err != nil {
		return Dirs{}, err
	}
	workDir, err := openIn(base, workName)
	if err != nil {
		upperDir.Close()
		return Dirs{}, err
	}
	return Dirs{Upper: upperDir, Work: workDir, Existed: existed}, nil
}

// makeUpper makes the upper directory in base. It sets owner and mode before the directory has its name, so that a crash
// leaves no upper with a wrong root.
func makeUpper(base *os.File, root RootAttr) (existed bool, err error) {
	if root == (RootAttr{Mode: 0o755}) {
		err := unix.Mkdirat(int(base.Fd()), upperName, root.Mode)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return false, &os.PathError{Op: "mkdir", Path: base.Name() + "/" + upperName, Err: err}
		}
		return err != nil, nil
	}
	if err := unix.Fstatat(int(base.Fd()), upperName, &unix.Stat_t{}, unix.AT_SYMLINK_NOFOLLOW); err == nil {
		return true, nil
	}
	const temporary = upperName + ".new"
	if err := unix.Mkdirat(int(base.Fd()), temporary, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return false, &os.PathError{Op: "mkdir", Path: base.Name() + "/" + temporary, Err: err}
	}
	dir, err := openIn(base, temporary)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	if err := root.apply(dir); err != nil {
		return false, err
	}
	err = unix.Renameat2(int(base.Fd()), temporary, int(base.Fd()), upperName, unix.RENAME_NOREPLACE)
	if err != nil {
		return false, &os.PathError{Op: "rename", Path: base.Name() + "/" + temporary, Err: err}
	}
	return false, nil
}

// openIn opens a directory entry that is a directory itself, not a link to one (O_PATH).
func openIn(base *os.File, name string) (*os.File, error) {
	fd, err := unix.Openat(int(base.Fd()), name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: base.Name() + "/" + name, Err: err}
	}
	return os.NewFile(uintptr(fd), base.Name()+"/"+name), nil
}

// pather has the paths of an upper's directories.
type pather interface{ Paths() (upper, work string) }

// clearWork empties the work directory of an upper: it removes what overlayfs left there, and the marker of a volatile view,
// with which the kernel would not mount it again.
func clearWork(upper pather) error {
	_, work := upper.Paths()
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

// checkDirs checks that the directories of an upper exist and can be written to.
func checkDirs(upper pather) error {
	upperDir, work := upper.Paths()
	for _, path := range []string{upperDir, work} {
		there, err := exists(path)
		if err != nil {
			return fmt.Errorf("stat the upper: %w", err)
		}
		if !there {
			return fmt.Errorf("%w: the upper's directory %s is gone", errdefs.ErrNotFound, path)
		}
	}
	return CheckWritable(work)
}

// exists reports whether there is something at path, which is not followed if it is a link.
func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
