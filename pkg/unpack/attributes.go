package unpack

import (
	"archive/tar"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// setAttributes sets owner, mode and extended attributes of a regular file or directory. The owner comes first, because
// changing it clears the set-user-ID bit and file capabilities.
func setAttributes(of node, header *tar.Header) error {
	if err := setOwner(of, header); err != nil {
		return err
	}
	if err := of.chmod(modeOf(header)); err != nil {
		return err
	}
	return setXattrs(header, of.setXattr)
}

// setAllAttributes sets owner, mode, extended attributes and times of a link or device.
func setAllAttributes(of node, header *tar.Header) error {
	if err := setOwner(of, header); err != nil {
		return err
	}
	if header.Typeflag != tar.TypeSymlink {
		if err := of.chmod(modeOf(header)); err != nil {
			return err
		}
	}
	err := setXattrs(header, func(name string, value []byte) error {
		if strings.HasPrefix(name, "user.") {
			// Linux has these on regular files and directories alone (xattr(7)). containerd leaves them out too.
			return nil
		}
		return of.setXattr(name, value)
	})
	if err != nil {
		return err
	}
	accessed, modified := timesOf(header)
	return of.setTimes(accessed, modified)
}

// setOwner sets the owner of a file. chown(2) has 32 bits for an ID. Some programs write nobody as -2.
func setOwner(of node, header *tar.Header) error {
	for _, id := range []int{header.Uid, header.Gid} {
		if id < math.MinInt32 || id > math.MaxUint32 {
			return fmt.Errorf("%w: Linux has no owner %d:%d; an ID has 32 bits", errdefs.ErrInvalidArgument, header.Uid, header.Gid)
		}
	}
	return of.chown(uint32(header.Uid), uint32(header.Gid))
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
