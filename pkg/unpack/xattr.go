package unpack

import (
	"archive/tar"
	"errors"
	"iter"
	"slices"
	"strings"
	"syscall"
)

// XattrRecord is the prefix of the PAX records of extended attributes.
const XattrRecord = "SCHILY.xattr."

// ignoredXattrs are the prefixes of the attributes that are not set. Attributes of overlayfs would redirect lookups to
// other layers. Labels and signatures are valid only on the machine where the image was built.
var ignoredXattrs = []string{
	"trusted.overlay.", "user.overlay.", "security.selinux", "security.ima", "security.evm", "system.nfs4_acl",
}

// IsIgnoredXattr reports whether Tar leaves out an extended attribute.
func IsIgnoredXattr(name string) bool {
	return slices.ContainsFunc(ignoredXattrs, func(ignored string) bool { return strings.HasPrefix(name, ignored) })
}

// setXattrs calls set for each extended attribute of an entry. It ignores attributes that the file system does not support,
// as tar(1) does.
func setXattrs(header *tar.Header, set func(name string, value []byte) error) error {
	for name, value := range xattrs(header) {
		if err := set(name, []byte(value)); err != nil && !errors.Is(err, syscall.ENOTSUP) {
			return err
		}
	}
	return nil
}

// xattrBytes returns the size of the extended attributes of an entry, names and values.
func xattrBytes(header *tar.Header) int64 {
	var size int64
	for name, value := range xattrs(header) {
		size += int64(len(name) + len(value))
	}
	return size
}

// xattrs returns the extended attributes of an entry that are not ignored, the values by name.
func xattrs(header *tar.Header) iter.Seq2[string, string] {
	return func(yield func(name, value string) bool) {
		for record, value := range header.PAXRecords {
			name, ok := strings.CutPrefix(record, XattrRecord)
			if !ok || IsIgnoredXattr(name) {
				continue
			}
			if !yield(name, value) {
				return
			}
		}
	}
}
