package unpack

import (
	"archive/tar"
	"errors"
	"slices"
	"strings"
	"syscall"
)

// xattrRecord begins the PAX records that extended attributes are in.
const xattrRecord = "SCHILY.xattr."

// ignoredXattrs are not set. Those of overlayfs would redirect lookups into other layers. Labels and signatures belong to
// the machine that the image was made on.
var ignoredXattrs = []string{"trusted.overlay.", "user.overlay.", "security.selinux", "security.ima", "security.evm", "system.nfs4_acl"}

// setXattrs sets the extended attributes of an entry. It leaves out those that the file system does not support, as tar
// does.
func setXattrs(header *tar.Header, set func(name string, value []byte) error) error {
	for record, value := range header.PAXRecords {
		name, ok := strings.CutPrefix(record, xattrRecord)
		if !ok || slices.ContainsFunc(ignoredXattrs, func(ignored string) bool { return strings.HasPrefix(name, ignored) }) {
			continue
		}
		if err := set(name, []byte(value)); err != nil && !errors.Is(err, syscall.ENOTSUP) {
			return err
		}
	}
	return nil
}
