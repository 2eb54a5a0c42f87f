package squash

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// The extended attributes of overlayfs (enum ovl_xattr in fs/overlayfs/overlayfs.h). Other ones with the prefix say something about one
// upper alone, and are not copied.
const (
	overlayPrefix = "trusted.overlay."
	// escapedPrefix begins attributes that an overlay in a view has set. Views show them without one "overlay.".
	escapedPrefix = overlayPrefix + "overlay."

	opaqueXattr   = overlayPrefix + "opaque"
	redirectXattr = overlayPrefix + "redirect"
	metacopyXattr = overlayPrefix + "metacopy"
	originXattr   = overlayPrefix + "origin"
	// protattrXattr has the flags immutable and append-only of a file.
	protattrXattr = overlayPrefix + "protattr"
)

// isCopied reports whether a copy of a file has its extended attribute.
func isCopied(name string) bool {
	return !strings.HasPrefix(name, overlayPrefix) || strings.HasPrefix(name, escapedPrefix) || name == protattrXattr
}

// copyXattrs gives a file the extended attributes of another one, but for those that isCopied leaves out.
func copyXattrs(from, to *os.File) error {
	names, err := linux.ListXattr(from)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, name := range names {
		if !isCopied(name) {
			continue
		}
		value, err := linux.GetXattr(from, name)
		if errors.Is(err, syscall.ENODATA) || errors.Is(err, syscall.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return err
		}
		if err := linux.SetXattr(to, name, value); err != nil {
			return err
		}
	}
	return nil
}

// xattr returns an extended attribute of an open file. It reports false if there is none.
func xattr(file *os.File, name string) (value []byte, ok bool, _ error) {
	value, err := linux.GetXattr(file, name)
	return valueOf(value, err)
}

// xattrAt is xattr for an entry of a directory.
func xattrAt(dir *os.File, entry, name string) (value []byte, ok bool, _ error) {
	value, err := linux.GetXattrAt(dir, entry, name)
	return valueOf(value, err)
}

// overlayXattrs returns the extended attributes of overlayfs that a copy of a file in an upper needs.
func overlayXattrs(file *os.File) (map[string]string, error) {
	found := map[string]string{}
	for _, name := range []string{opaqueXattr, redirectXattr, metacopyXattr, originXattr} {
		value, ok, err := xattr(file, name)
		if err != nil {
			return nil, err
		}
		if ok {
			found[name] = string(value)
		}
	}
	return found, nil
}

// removeACLs takes away what a directory that was made has inherited: the one that it is a copy of need not have it.
func removeACLs(dir *os.File) error {
	for _, name := range []string{"system.posix_acl_default", "system.posix_acl_access"} {
		err := linux.RemoveXattr(dir, name)
		if err != nil && !errors.Is(err, syscall.ENODATA) && !errors.Is(err, syscall.EOPNOTSUPP) {
			return err
		}
	}
	return nil
}

func valueOf(value []byte, err error) ([]byte, bool, error) {
	if errors.Is(err, syscall.ENODATA) || errors.Is(err, syscall.EOPNOTSUPP) {
		return nil, false, nil
	}
	return value, err == nil, err
}

// isOpaque reports whether a directory of an upper hides those below.
func isOpaque(dir *os.File) (bool, error) {
	value, ok, err := xattr(dir, opaqueXattr)
	if err != nil || !ok {
		return false, err
	}
	if string(value) == "x" {
		// Its whiteouts are files with an attribute. overlayfs makes none, and knows them in lowers only.
		return false, fmt.Errorf("%w: directory %s has %s=x, which no upper has", errdefs.ErrFailedPrecondition, dir.Name(), opaqueXattr)
	}
	return string(value) == "y", nil
}
