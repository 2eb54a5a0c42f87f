package unpack

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// maxPath is the maximum length of a path in bytes (PATH_MAX, less the zero byte at its end).
const maxPath = 4095

// unpackEntry applies one entry of the tar to the tree.
func (u *unpacker) unpackEntry(header *tar.Header, content io.Reader) error {
	if u.stale {
		u.closeParents()
	}
	if err := u.countEntry(); err != nil {
		return err
	}
	attributes := xattrBytes(header)
	u.attributeBytes += attributes
	if err := u.checkSize(); err != nil {
		return err
	}
	if err := u.reserve(blockSize + attributes); err != nil {
		return err
	}
	if header.Typeflag == tar.TypeXGlobalHeader {
		// It is no file. archive/tar does not apply its records to the entries that follow, and so containerd does not either.
		return nil
	}
	if len(header.Name) > maxPath || len(header.Linkname) > maxPath {
		return fmt.Errorf("%w: the path has more than %d bytes", errdefs.ErrInvalidArgument, maxPath)
	}
	// Paths are relative to the root of the image: /../x is /x.
	name := strings.TrimPrefix(path.Clean("/"+header.Name), "/")
	if name == "" {
		if header.Typeflag != tar.TypeDir {
			return fmt.Errorf("%w: the root of the layer is not a directory", errdefs.ErrInvalidArgument)
		}
		return u.setDirAttributes(u.root, name, header)
	}
	dirName, base := path.Split(name)
	in, err := u.parent(path.Clean("/" + dirName))
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, WhiteoutPrefix) {
		return makeWhiteout(in, base)
	}
	if header.Typeflag == tar.TypeDir {
		return u.makeDir(in, base, name, header)
	}
	if err := u.removeExisting(in, base); err != nil {
		return err
	}
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return u.makeFile(in, base, header, content)
	case tar.TypeLink:
		return u.makeHardLink(in, base, header)
	case tar.TypeSymlink:
		if header.Linkname == "" {
			return fmt.Errorf("%w: the symbolic link has no target", errdefs.ErrInvalidArgument)
		}
		if err := in.symlink(header.Linkname, base); err != nil {
			return err
		}
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		device, err := deviceOf(header)
		if err != nil {
			return err
		}
		if header.Typeflag == tar.TypeChar && device == 0 {
			// overlayfs would take the device for a whiteout. Whiteouts of an image have other names.
			return nil
		}
		if err := in.mknod(base, deviceTypes[header.Typeflag]|0o600, device); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%w: unknown entry type %q", errdefs.ErrInvalidArgument, header.Typeflag)
	}
	made, err := in.entry(base)
	if err != nil {
		return err
	}
	return setAllAttributes(made, header)
}

// deviceTypes maps tar entry types to file types of the kernel.
var deviceTypes = map[byte]uint32{tar.TypeChar: syscall.S_IFCHR, tar.TypeBlock: syscall.S_IFBLK, tar.TypeFifo: syscall.S_IFIFO}

// deviceOf returns the number of a device, which is 0 for a FIFO. mknod(2) has 12 bits for the major and 20 for the minor number
// (MKDEV in include/linux/kdev_t.h), and cuts others off.
func deviceOf(header *tar.Header) (uint64, error) {
	if header.Typeflag == tar.TypeFifo {
		return 0, nil
	}
	major, minor := header.Devmajor, header.Devminor
	if major < 0 || major >= 1<<12 || minor < 0 || minor >= 1<<20 {
		return 0, fmt.Errorf("%w: Linux has no device %d:%d; the largest is 4095:1048575", errdefs.ErrInvalidArgument, major, minor)
	}
	return linux.Mkdev(uint32(major), uint32(minor)), nil
}

// makeFile creates a regular file. Runs of zeros become holes, because the tars of many images contain sparse files in full.
func (u *unpacker) makeFile(in dir, base string, header *tar.Header, content io.Reader) error {
	made, err := in.create(base, header.Size)
	if err != nil {
		return err
	}
	defer made.close()
	if err := u.copyContent(made, header.Size, content); err != nil {
		return err
	}
	if err := made.finish(); err != nil {
		return err
	}
	if err := setAttributes(made, header); err != nil {
		return err
	}
	return made.setTimes(timesOf(header))
}

// makeDir creates a directory. If an earlier entry created it, makeDir only changes its attributes.
func (u *unpacker) makeDir(in dir, base, name string, header *tar.Header) error {
	err := in.mkdir(base, 0o700)
	hidden := false
	if errors.Is(err, syscall.EEXIST) {
		var was kind
		if was, err = in.stat(base); err != nil {
			return err
		}
		if was != isDirectory {
			// A whiteout of the same name hides the directory in lower layers. The new directory must hide it too.
			hidden = was == isWhiteout
			if err := u.removeExisting(in, base); err != nil {
				return err
			}
			err = in.mkdir(base, 0o700)
		}
	}
	if err != nil {
		return err
	}
	made, err := in.open(base)
	if err != nil {
		return err
	}
	defer made.close()
	if hidden {
		if err := setOpaque(made); err != nil {
			return err
		}
	}
	return u.setDirAttributes(made, name, header)
}

// setDirAttributes sets the attributes of a directory, which has an entry now, except for its times. It records these for setDirTimes.
func (u *unpacker) setDirAttributes(of dir, name string, header *tar.Header) error {
	if name == "" || u.hasImplied {
		if err := clearImplied(of); err != nil {
			return err
		}
	}
	if err := setAttributes(of, header); err != nil {
		return err
	}
	return u.timesEncoder.Encode(dirTime{name, header.ModTime.Unix(), header.ModTime.Nanosecond()})
}

// makeHardLink creates a hard link to a file of the same layer. Layers are unpacked alone: one that links to a file of a lower layer
// is refused, as by containerd's overlayfs snapshotter.
func (u *unpacker) makeHardLink(in dir, base string, header *tar.Header) error {
	targetDir, target := path.Split(path.Clean("/" + header.Linkname))
	if target == "" {
		return fmt.Errorf("%w: the hard link points to the root", errdefs.ErrInvalidArgument)
	}
	named := shorten(header.Linkname)
	from, err := u.tree.open(strings.Trim(targetDir, "/"), openPath)
	was := isOther
	if err == nil {
		defer from.close()
		was, err = from.stat(target)
	}
	switch {
	case isAbsent(err):
		return fmt.Errorf("%w: the target %q of the hard link is not in this layer; rebuild the image so that the layer has the file",
			errdefs.ErrInvalidArgument, named)
	case err != nil:
		return fmt.Errorf("find the target %q of the hard link: %w", named, err)
	case was == isWhiteout:
		return fmt.Errorf("%w: the layer removed the target %q of the hard link", errdefs.ErrInvalidArgument, named)
	case was == isDirectory:
		return fmt.Errorf("%w: the target %q of the hard link is a directory", errdefs.ErrInvalidArgument, named)
	}
	return in.link(from, target, base)
}

// countEntry counts an entry of the tar, or a directory that is made without one.
func (u *unpacker) countEntry() error {
	u.entries++
	if u.limits.MaxEntries > 0 && u.entries > u.limits.MaxEntries {
		return fmt.Errorf("%w: the layer has more than %d entries; raise --max-layer-entries",
			errdefs.ErrResourceExhausted, u.limits.MaxEntries)
	}
	return nil
}
