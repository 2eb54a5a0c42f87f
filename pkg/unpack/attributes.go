package unpack

import (
	"archive/tar"
	"fmt"
	"math"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// setAttributes sets owner, mode and extended attributes of an open file or directory. The owner comes first, because
// changing it clears the set-user-ID bit and file capabilities.
func setAttributes(file *os.File, header *tar.Header) error {
	if err := setOwner(file, "", header); err != nil {
		return err
	}
	if err := linux.Fchmodat(file, "", modeOf(header)); err != nil {
		return err
	}
	return setXattrs(header, func(name string, value []byte) error { return linux.SetXattr(file, name, value) })
}

// setAttributesAt sets owner, mode, extended attributes and times of the link or device at base.
func setAttributesAt(dir *os.File, base string, header *tar.Header) error {
	if err := setOwner(dir, base, header); err != nil {
		return err
	}
	if header.Typeflag != tar.TypeSymlink {
		if err := linux.Fchmodat(dir, base, modeOf(header)); err != nil {
			return err
		}
	}
	err := setXattrs(header, func(name string, value []byte) error {
		if strings.HasPrefix(name, "user.") {
			// Linux has these on regular files and directories alone (xattr(7)). containerd leaves them out too.
			return nil
		}
		return linux.SetXattrAt(dir, base, name, value)
	})
	if err != nil {
		return err
	}
	accessed, modified := timesOf(header)
	return linux.Utimensat(dir, base, accessed, modified)
}

// setOwner sets the owner of the entry at base, or of dir itself if base is empty. chown(2) has 32 bits for an ID. Some programs write
// nobody as -2.
func setOwner(dir *os.File, base string, header *tar.Header) error {
	for _, id := range []int{header.Uid, header.Gid} {
		if id < math.MinInt32 || id > math.MaxUint32 {
			return fmt.Errorf("%w: Linux has no owner %d:%d; an ID has 32 bits", errdefs.ErrInvalidArgument, header.Uid, header.Gid)
		}
	}
	return linux.Fchownat(dir, base, uint32(header.Uid), uint32(header.Gid))
}

// modeOf returns the permission bits of an entry, with set-user-ID, set-group-ID and sticky.
func modeOf(header *tar.Header) uint32 { return uint32(header.Mode) & 0o7777 }

// timesOf returns the access and modification times of an entry.
func timesOf(header *tar.Header) (accessed, modified time.Time) {
	if header.AccessTime.IsZero() {
		return header.ModTime, header.ModTime
	}
	return header.AccessTime, header.ModTime
}
