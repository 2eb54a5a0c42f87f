package diff

import (
	"archive/tar"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// overlayXattrs are the prefixes of attributes that belong to an overlay. Those that the view shows are of another overlay, whose upper or
// layers lie in the volume: the kernel shows none of the view's own.
var overlayXattrs = []string{"trusted.overlay.", "user.overlay."}

// sameAttributes reports whether a directory has the mode, the owner and the attributes that it has in the layers.
func sameAttributes(e entry) (bool, error) {
	before, err := linux.StatFile(e.base)
	if err != nil || before.Mode != e.stat.Mode || before.Uid != e.stat.Uid || before.Gid != e.stat.Gid {
		return false, err
	}
	was, err := xattrsOf(e.base)
	if err != nil {
		return false, ignoreMany(err)
	}
	is, err := xattrsOf(e.view)
	return err == nil && maps.Equal(was, is), ignoreMany(err)
}

// maxXattrs is how many bytes of attributes a file of a layer may have, names and values. A header of a tar cannot have more.
const maxXattrs = 1 << 20

var errManyXattrs = fmt.Errorf("%w: its attributes have more than %d bytes, which no tar can carry; remove some of them",
	errdefs.ErrFailedPrecondition, maxXattrs)

// ignoreMany returns nil for a directory whose attributes are too large to compare.
func ignoreMany(err error) error {
	if errors.Is(err, errManyXattrs) {
		return nil
	}
	return err
}

func xattrsOf(dir *os.File) (map[string]string, error) {
	names, err := linux.ListXattrAt(dir, ".")
	return readXattrs(names, err, func(name string) ([]byte, error) { return linux.GetXattr(dir, name) })
}

// xattrs returns the extended attributes of an entry in the view, the values by name.
func (e entry) xattrs() (map[string]string, error) {
	if e.view != nil {
		return xattrsOf(e.view)
	}
	names, err := linux.ListXattrAt(e.parent, e.name)
	return readXattrs(names, err, func(name string) ([]byte, error) { return linux.GetXattrAt(e.parent, e.name, name) })
}

func readXattrs(names []string, err error, get func(name string) ([]byte, error)) (map[string]string, error) {
	xattrs := map[string]string{}
	if errors.Is(err, syscall.ENOTSUP) {
		return xattrs, nil
	}
	if err != nil {
		return nil, err
	}
	size := 0
	for _, name := range names {
		value, err := get(name)
		if errors.Is(err, syscall.ENODATA) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if size += len(name) + len(value); size > maxXattrs {
			return nil, errManyXattrs
		}
		xattrs[name] = string(value)
	}
	return xattrs, nil
}

// setXattrs adds the attributes of an entry to its header.
func setXattrs(header *tar.Header, e entry) error {
	xattrs, err := e.xattrs()
	if err != nil {
		return err
	}
	for name, value := range xattrs {
		for _, prefix := range overlayXattrs {
			if strings.HasPrefix(name, prefix) {
				return fmt.Errorf("%w: it has the attribute %s of an overlay in the volume, which no image layer can carry; "+
					"move that overlay's directories out of the volume", errdefs.ErrFailedPrecondition, quote(name))
			}
		}
		switch {
		case unpack.IsIgnoredXattr(name):
			continue
		case strings.Contains(name, "="):
			return fmt.Errorf("%w: the name of its attribute %s has a '=', which a tar cannot carry; remove the attribute",
				errdefs.ErrFailedPrecondition, quote(name))
		}
		if header.PAXRecords == nil {
			header.PAXRecords = map[string]string{}
		}
		header.PAXRecords[unpack.XattrRecord+name] = value
	}
	return nil
}

// readXattr returns an attribute of a directory, "" if it has none.
func readXattr(dir *os.File, name string) (string, error) {
	value, err := linux.GetXattr(dir, name)
	if errors.Is(err, syscall.ENODATA) || errors.Is(err, syscall.ENOTSUP) {
		return "", nil
	}
	return string(value), err
}
