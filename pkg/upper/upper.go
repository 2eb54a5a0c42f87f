// Package upper makes the places that views write to: an upper directory and the work directory that overlayfs wants
// beside it.
package upper

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Names of the directories within an upper's base directory, in the words of overlayfs.
const (
	upperName = "upper"
	workName  = "work"
)

// Dirs is an upper that is ready to be mounted.
type Dirs struct {
	// Upper and Work are open directories (O_PATH) of one file system, reached through one mount.
	Upper, Work *os.File
	// Existed says that the upper was there before, and may have content, or an overlay on it.
	Existed bool
}

// Close closes the directories. They stay.
func (d Dirs) Close() {
	d.Upper.Close()
	d.Work.Close()
}

// Root is what the root of a new upper is to look like: the root of a view is the root of its upper.
type Root struct {
	UID, GID uint32
	// Mode has the permission bits, with set-group-ID and sticky.
	Mode uint32
}

// RootOf is the root as an open directory has it.
func RootOf(dir *os.File) (Root, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &stat); err != nil {
		return Root{}, &os.PathError{Op: "fstat", Path: dir.Name(), Err: err}
	}
	return Root{UID: stat.Uid, GID: stat.Gid, Mode: stat.Mode & 0o7777}, nil
}

// openDirs makes and opens the two directories in base, an open directory.
func openDirs(base *os.File, root Root) (Dirs, error) {
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

// makeUpper makes the upper in base, with its owner and mode before it has its name: a crash between leaves no upper
// with a wrong root.
func makeUpper(base *os.File, root Root) (existed bool, err error) {
	if root == (Root{Mode: 0o755}) {
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

// GiveTo gives the root of an upper that exists to a group, which may do there what mode says besides.
func GiveTo(dir *os.File, gid, mode uint32) error {
	has, err := RootOf(dir)
	if err != nil {
		return err
	}
	want := Root{UID: has.UID, GID: gid, Mode: has.Mode | mode}
	if has == want {
		return nil
	}
	return want.apply(dir)
}

// apply gives an open directory (O_PATH) this owner and mode.
func (r Root) apply(dir *os.File) error {
	if err := unix.Fchownat(int(dir.Fd()), "", int(r.UID), int(r.GID), unix.AT_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "chown", Path: dir.Name(), Err: err}
	}
	if err := unix.Fchmodat(int(dir.Fd()), ".", r.Mode, 0); err != nil {
		return &os.PathError{Op: "chmod", Path: dir.Name(), Err: err}
	}
	return nil
}

// openIn opens a directory entry that is a directory, and no link to one (O_PATH).
func openIn(base *os.File, name string) (*os.File, error) {
	fd, err := unix.Openat(int(base.Fd()), name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: base.Name() + "/" + name, Err: err}
	}
	return os.NewFile(uintptr(fd), base.Name()+"/"+name), nil
}
