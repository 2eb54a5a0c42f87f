package squash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// files makes what is not a directory.
type files struct {
	into *os.File
	// scratch is a directory in into with names of files that get more of them. scratchName is its name.
	scratch     *os.File
	scratchName string
	// noLinks and noClones say of which uppers no file can be linked, and shares no blocks with a copy.
	noLinks, noClones []bool
}

// whiteoutName is the name in scratch of a whiteout, which all whiteouts are links to, as overlayfs does it.
const whiteoutName = "whiteout"

// open makes the scratch directory. No upper has its name in the root.
func (f *files) open(roots []part) error {
	for {
		f.scratchName = ".merge-" + uuid.NewString()
		isFree := true
		for _, root := range roots {
			if _, err := linux.Fstatat(root.dir, f.scratchName); !errors.Is(err, fs.ErrNotExist) {
				isFree = false
			}
		}
		if isFree {
			break
		}
	}
	if err := linux.Mkdirat(f.into, f.scratchName, 0o700); err != nil {
		return err
	}
	var err error
	f.scratch, err = linux.OpenNamed(f.into, f.scratchName, "the scratch directory of a merge")
	return err
}

// clear removes the scratch directory.
func (f *files) clear(ctx context.Context) error {
	_, err := linux.Walk(ctx, f.scratch, func(dir *os.File, name string, _ linux.Stat) error {
		if name == "" {
			return nil
		}
		return linux.Unlinkat(dir, name)
	})
	if err != nil {
		return err
	}
	return linux.Rmdirat(f.into, f.scratchName)
}

func (f *files) close() {
	if f.scratch != nil {
		f.scratch.Close()
	}
}

// makeWhiteout makes a whiteout.
func (f *files) makeWhiteout(into *os.File, name string) error {
	err := linux.Linkat(f.scratch, whiteoutName, into, name)
	if err == nil {
		return nil
	}
	if errors.Is(err, syscall.EMLINK) {
		err = linux.Unlinkat(f.scratch, whiteoutName)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := linux.Mknodat(f.scratch, whiteoutName, syscall.S_IFCHR, 0); err != nil {
		return err
	}
	return linux.Linkat(f.scratch, whiteoutName, into, name)
}

// make makes what was found first, in the upper of that number.
func (f *files) make(ctx context.Context, upper int, found result, into *os.File, name string) error {
	first := found.first
	isSame, err := found.isSame()
	if err != nil {
		return err
	}
	if isSame && !f.noLinks[upper] {
		err := linux.Linkat(first.dir, first.name, into, name)
		if !isNotLinkable(err) {
			return err
		}
		// Another project's directory, or another file system or subvolume.
		f.noLinks[upper] = errors.Is(err, syscall.EXDEV)
	}
	if first.stat.Nlink == 1 || found.isMetacopyOfItsName() {
		return f.copy(ctx, upper, found, into, name)
	}
	known := fmt.Sprintf("%d-%d", upper, first.stat.Ino)
	err = linux.Linkat(f.scratch, known, into, name)
	if err == nil {
		return nil
	}
	if errors.Is(err, syscall.EMLINK) {
		err = linux.Unlinkat(f.scratch, known)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := f.copy(ctx, upper, found, into, name); err != nil {
		return err
	}
	return linux.Linkat(into, name, f.scratch, known)
}

// isNotLinkable reports whether an error says that a file cannot have another name there: linkat(2).
func isNotLinkable(err error) bool {
	return slices.ContainsFunc([]syscall.Errno{syscall.EXDEV, syscall.EPERM, syscall.EMLINK}, func(errno syscall.Errno) bool {
		return errors.Is(err, errno)
	})
}

// isSame reports whether the file in the result is the one in the upper: it needs no content or redirect that it does not have.
func (r *result) isSame() (bool, error) {
	wasMetacopy := r.data != nil || r.isMetacopy
	if !wasMetacopy {
		return true, nil
	}
	if r.data != nil {
		return false, nil
	}
	has, _, err := xattrAt(r.first.dir, r.first.name, redirectXattr)
	return string(has) == r.target(r.first.name), err
}

// isMetacopyOfItsName reports whether the content is looked up by the name of this link. Other links of the file may lead elsewhere.
func (r *result) isMetacopyOfItsName() bool { return (r.data != nil || r.isMetacopy) && !r.isAbsolute }

// copy makes a copy.
func (f *files) copy(ctx context.Context, upper int, found result, into *os.File, name string) error {
	first := found.first
	from, err := linux.Open(first.dir, first.name, linux.O_PATH|linux.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	if first.stat.IsRegular() {
		return f.copyRegular(ctx, upper, found, from, into, name)
	}
	return copySpecial(from, first.stat, into, name)
}

// copySpecial makes a copy of what is neither a directory nor a regular file, and is open at from by O_PATH.
func copySpecial(from *os.File, stat linux.Stat, into *os.File, name string) (err error) {
	if stat.IsSymlink() {
		var target string
		if target, err = linux.Readlinkat(from, ""); err == nil {
			err = linux.Symlinkat(target, into, name)
		}
	} else {
		err = linux.Mknodat(into, name, stat.Mode, stat.Rdev)
	}
	if err != nil {
		return err
	}
	made, err := linux.Open(into, name, linux.O_PATH|linux.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer made.Close()
	if err := setAttributes(from, made, stat, nil); err != nil {
		return err
	}
	// There are no times of a handle of O_PATH before Linux 5.8.
	return linux.Utimensat(into, name, accessed(stat), modified(stat))
}

// copyRegular makes a copy of a regular file, which is open at from by O_PATH.
func (f *files) copyRegular(ctx context.Context, upper int, found result, from, into *os.File, name string) (err error) {
	made, err := linux.OpenFile(into, name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|linux.O_NOFOLLOW, 0o600, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, made.Close()) }()
	overlay := map[string]string{}
	switch {
	case found.isMetacopy:
		value, _, err := xattr(from, metacopyXattr)
		if err != nil {
			return err
		}
		overlay[metacopyXattr] = string(value)
		if target := found.target(found.first.name); target != "" {
			overlay[redirectXattr] = target
		}
	case found.data != nil:
		err = f.copyContent(ctx, upper, found.data, made, math.MaxInt64)
	case found.first.stat.Size > 0:
		var data *os.File
		if data, err = linux.Reopen(from, os.O_RDONLY|syscall.O_NOATIME); err == nil {
			err = errors.Join(f.copyContent(ctx, upper, data, made, math.MaxInt64), data.Close())
		}
	}
	if err == nil {
		err = made.Truncate(found.first.stat.Size)
	}
	if err == nil {
		err = setAttributes(from, made, found.first.stat, overlay)
	}
	return err
}

// copyContent copies the content of a file, by sharing its blocks if the file system can do that. It returns EFBIG if it would copy more
// than that many bytes.
func (f *files) copyContent(ctx context.Context, upper int, from, to *os.File, most int64) error {
	if !f.noClones[upper] {
		err := linux.Clone(to, from)
		if err == nil {
			return nil
		}
		// Whatever it is, a copy says so if it is more than that.
		f.noClones[upper] = errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOTTY)
	}
	return linux.CopyFileUpTo(ctx, from, to, most)
}

// setAttributes gives a file the owner, mode, extended attributes and times of another one, and these attributes of overlayfs. It sets
// no times of a handle of O_PATH.
func setAttributes(from, to *os.File, stat linux.Stat, overlay map[string]string) error {
	if err := linux.Fchownat(to, "", stat.Uid, stat.Gid); err != nil {
		return err
	}
	isPath := !stat.IsDir() && !stat.IsRegular()
	if !stat.IsSymlink() {
		// After the owner, which clears the set-user-ID bit.
		if err := linux.Fchmodat(to, "", stat.Perm()); err != nil {
			return err
		}
	}
	if err := copyXattrs(from, to); err != nil {
		return err
	}
	for name, value := range overlay {
		if err := linux.SetXattr(to, name, []byte(value)); err != nil {
			return err
		}
	}
	if isPath {
		return nil
	}
	return linux.Futimens(to, accessed(stat), modified(stat))
}

func accessed(stat linux.Stat) time.Time { return time.Unix(stat.Atim.Unix()) }
func modified(stat linux.Stat) time.Time { return time.Unix(stat.Mtim.Unix()) }
