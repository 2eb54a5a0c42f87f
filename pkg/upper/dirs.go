package upper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
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
	stat, err := linux.StatFile(dir)
	if err != nil {
		return RootAttr{}, err
	}
	return RootAttr{UID: stat.Uid, GID: stat.Gid, Mode: stat.Perm()}, nil
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
	if err := linux.Fchownat(dir, "", r.UID, r.GID); err != nil {
		return err
	}
	return linux.Fchmodat(dir, "", r.Mode)
}

// openDirs makes the two directories in base, an open directory, if they are missing, and opens them.
func openDirs(base *os.File, root RootAttr) (Dirs, error) {
	existed, err := makeUpper(base, root)
	if err != nil {
		return Dirs{}, err
	}
	if err := linux.Mkdirat(base, workName, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return Dirs{}, err
	}
	upperDir, err := linux.OpenDirAt(base, upperName)
	if err != nil {
		return Dirs{}, err
	}
	workDir, err := linux.OpenDirAt(base, workName)
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
		err := linux.Mkdirat(base, upperName, root.Mode)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return false, err
		}
		return err != nil, nil
	}
	if _, err := linux.Fstatat(base, upperName); err == nil {
		return true, nil
	}
	const temporary = upperName + ".new"
	if err := linux.Mkdirat(base, temporary, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	dir, err := linux.OpenDirAt(base, temporary)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	if err := root.apply(dir); err != nil {
		return false, err
	}
	return false, linux.Renameat(base, temporary, base, upperName, linux.RenameNoReplace)
}

// pather has the paths of an upper's directories.
type pather interface{ Paths() (upper, work string) }

// clearWork empties the work directory of an upper: it removes what overlayfs left there, and the marker of a volatile view,
// with which the kernel would not mount it again.
func clearWork(upper pather) error {
	_, path := upper.Paths()
	// In another volume, the pod can put a link in its place.
	work, err := linux.Open(nil, path, os.O_RDONLY|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("clear the work directory: %w", err)
	}
	defer work.Close()
	names, err := work.Readdirnames(-1)
	for _, name := range names {
		err = errors.Join(err, os.RemoveAll(linux.ProcPath(work)+"/"+name))
	}
	if err != nil {
		return fmt.Errorf("clear the work directory: %w", err)
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
