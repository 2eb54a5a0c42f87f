package unpack

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Whiteouts of an image (OCI image specification, "Representing Changes") and of overlayfs (kernel documentation,
// "whiteouts and opaque directories").
const (
	// WhiteoutPrefix begins the name of an entry that hides the rest of the name in lower layers.
	WhiteoutPrefix = ".wh."
	// opaqueName hides everything in its directory in lower layers. Other names with whiteoutMeta are AUFS's own.
	opaqueName   = ".wh..wh..opq"
	whiteoutMeta = ".wh..wh."
	// opaqueXattr of "y" is what overlayfs calls an opaque directory.
	opaqueXattr = "trusted.overlay.opaque"
)

// whiteout makes a whiteout of overlayfs, a character device 0/0, from one of an image. A whiteout hides entries of lower
// layers only, never entries of its own layer.
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
	err := linux.Mknodat(dir, name, syscall.S_IFCHR, 0)
	if !errors.Is(err, syscall.EEXIST) {
		return err
	}
	// A file of this layer hides the entries of lower layers anyway. A directory needs the attribute.
	made, err := openDir(dir, name)
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer made.Close()
	return setOpaque(made)
}

// isHidden reports whether a directory, or one above it, is opaque. A whiteout in it would hide nothing, and overlayfs,
// which reads such a directory as it is, would list its name.
func (u *unpacker) isHidden(dir *os.File) (bool, error) {
	root, err := linux.StatFile(u.root)
	if err != nil {
		return false, err
	}
	for up := "."; ; up += "/.." {
		at, err := linux.Fstatat(dir, up)
		if err != nil || at.ID() == root.ID() {
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

// setOpaque makes a directory hide what lower layers have in it. The handle may be one of O_PATH.
func setOpaque(dir *os.File) error { return linux.SetXattr(dir, opaqueXattr, []byte("y")) }

// IsOpaque reports whether a directory hides what lower layers have in it. The handle may be one of O_PATH.
func IsOpaque(dir *os.File) (bool, error) {
	value, err := linux.GetXattr(dir, opaqueXattr)
	if errors.Is(err, syscall.ENODATA) {
		return false, nil
	}
	return string(value) == "y", err
}

// isWhiteout reports whether overlayfs would take a device for a whiteout.
func isWhiteout(typeflag byte, major, minor int64) bool {
	return typeflag == tar.TypeChar && linux.Mkdev(uint32(major), uint32(minor)) == 0
}
