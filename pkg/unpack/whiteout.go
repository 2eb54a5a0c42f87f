package unpack

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Whiteouts of an image (OCI image specification, "Representing Changes") and of overlayfs (kernel documentation,
// "whiteouts and opaque directories").
const (
	// WhiteoutPrefix begins the name of an entry that says that the rest of the name is not there.
	WhiteoutPrefix = ".wh."
	// opaqueName says that its directory shows nothing of lower layers. Other names with whiteoutMeta are AUFS's own.
	opaqueName   = ".wh..wh..opq"
	whiteoutMeta = ".wh..wh."
	// opaqueXattr of "y" is what overlayfs calls an opaque directory.
	opaqueXattr = "trusted.overlay.opaque"
)

// whiteout turns an image's whiteout into one of overlayfs: a character device 0/0. It is for lower layers: what this
// layer itself has of that name stays.
func (u *unpacker) whiteout(dir *os.File, base string) error {
	if base == opaqueName {
		return setOpaque(dir)
	}
	if hidden, err := u.isHidden(dir); err != nil || hidden {
		return err
	}
	if len(base) >= len(whiteoutMeta) && base[:len(whiteoutMeta)] == whiteoutMeta {
		return nil
	}
	name := base[len(WhiteoutPrefix):]
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("%w: a whiteout of %q", errdefs.ErrInvalidArgument, name)
	}
	err := unix.Mknodat(int(dir.Fd()), name, unix.S_IFCHR, 0)
	if !errors.Is(err, unix.EEXIST) {
		if err != nil {
			return fmt.Errorf("make a whiteout: mknodat: %w", err)
		}
		return nil
	}
	// A file of this layer hides what is below as it is. A directory must be told.
	made, err := openDir(dir, name)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer made.Close()
	return setOpaque(made)
}

// isHidden reports whether a directory shows nothing of lower layers already. A whiteout in it would hide nothing, and
// overlayfs, which reads such a directory as it is, would list its name.
func (u *unpacker) isHidden(dir *os.File) (bool, error) {
	root, err := identity(u.root, "")
	if err != nil {
		return false, err
	}
	for up := "."; ; up += "/.." {
		at, err := identity(dir, up)
		if err != nil || at == root {
			return false, err
		}
		above, err := openDir(dir, up)
		if err != nil {
			return false, err
		}
		opaque, err := IsOpaque(above)
		above.Close()
		if err != nil || opaque {
			return opaque, err
		}
	}
}

func identity(dir *os.File, path string) (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), path, &stat, unix.AT_EMPTY_PATH); err != nil {
		return 0, fmt.Errorf("fstatat: %w", err)
	}
	return stat.Ino, nil
}

// setOpaque makes a directory hide what lower layers have in it. The handle may be one of O_PATH.
func setOpaque(dir *os.File) error {
	if err := unix.Setxattr(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), opaqueXattr, []byte("y"), 0); err != nil {
		return fmt.Errorf("set %s: %w", opaqueXattr, err)
	}
	return nil
}

// IsOpaque reports whether a directory hides what lower layers have in it. The handle may be one of O_PATH.
func IsOpaque(dir *os.File) (bool, error) {
	var value [2]byte
	n, err := unix.Getxattr(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), opaqueXattr, value[:])
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ERANGE) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("get %s: %w", opaqueXattr, err)
	}
	return n == 1 && value[0] == 'y', nil
}

// isWhiteout reports whether a device would be a whiteout to overlayfs.
func isWhiteout(typeflag byte, major, minor int64) bool {
	return typeflag == tar.TypeChar && unix.Mkdev(uint32(major), uint32(minor)) == 0
}
