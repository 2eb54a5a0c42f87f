package unpack

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// The OCI image specification ("Representing Changes") defines whiteouts of images. The kernel's documentation of overlayfs
// ("whiteouts and opaque directories") defines those of overlayfs.
const (
	// WhiteoutPrefix is the prefix of the names of whiteouts. The rest of the name is the name that lower layers lose.
	WhiteoutPrefix = ".wh."
	// opaqueName is the name of an entry that hides the content of its directory in lower layers.
	opaqueName = ".wh..wh..opq"
	// whiteoutMeta is the prefix of names that AUFS reserves.
	whiteoutMeta = ".wh..wh."
	// opaqueXattr marks an opaque directory of overlayfs. Its value is "y".
	opaqueXattr = "trusted.overlay.opaque"
	// originXattr has overlayfs look for whiteouts in a directory when it lists it. Otherwise it does so only in one that it
	// merges with a lower directory, and lists whiteouts as files that cannot be read (ovl_get_inode in fs/overlayfs/inode.c:
	// "non-merge dir that may have whiteouts"). The empty value says that it is not known what the directory was copied from.
	originXattr = "trusted.overlay.origin"
)

// makeWhiteout converts a whiteout of an image to one of overlayfs, which is a character device 0/0. A whiteout hides
// entries of lower layers only, never entries of its own layer.
func makeWhiteout(in dir, base string) error {
	if base == opaqueName {
		return setOpaque(in)
	}
	if len(base) >= len(whiteoutMeta) && base[:len(whiteoutMeta)] == whiteoutMeta {
		return nil
	}
	name := base[len(WhiteoutPrefix):]
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("%w: the whiteout hides %q, which is not a file name", errdefs.ErrInvalidArgument, name)
	}
	err := in.mknod(name, syscall.S_IFCHR, 0)
	if err == nil {
		return in.setXattr(originXattr, nil)
	}
	if !errors.Is(err, syscall.EEXIST) {
		return err
	}
	// A file of this layer hides the entry of lower layers anyway. A directory must be opaque to do so.
	made, err := in.open(name)
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer made.close()
	// It is another directory than the one in lower layers, whether it has an entry or not.
	if err := clearImplied(made); err != nil {
		return err
	}
	return setOpaque(made)
}

// setOpaque marks a directory as opaque: it hides its content in lower layers.
func setOpaque(of node) error { return of.setXattr(opaqueXattr, []byte("y")) }

// IsOpaque reports whether a directory hides its content in lower layers. dir may be an O_PATH handle.
func IsOpaque(dir *os.File) (bool, error) {
	return isOpaque(func(name string) ([]byte, error) { return linux.GetXattr(dir, name) })
}

func isOpaque(getXattr func(name string) ([]byte, error)) (bool, error) {
	value, err := getXattr(opaqueXattr)
	if errors.Is(err, syscall.ENODATA) {
		return false, nil
	}
	return string(value) == "y", err
}
