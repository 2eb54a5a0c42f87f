package unpack

import (
	"archive/tar"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// xattrRecord begins the PAX records that extended attributes are in.
const xattrRecord = "SCHILY.xattr."

// ignoredXattrs are not an image's to set. Those of overlayfs would redirect lookups into other layers. Labels and
// signatures are of the machine that the image was made on.
var ignoredXattrs = []string{"trusted.overlay.", "user.overlay.", "security.selinux", "security.ima", "security.evm", "system.nfs4_acl"}

// setXattrs sets the extended attributes of an entry. Attributes of a kind that the file system does not have are left
// out, as tar does.
func setXattrs(header *tar.Header, set func(name string, value []byte) error) error {
	for record, value := range header.PAXRecords {
		name, ok := strings.CutPrefix(record, xattrRecord)
		if !ok || slices.ContainsFunc(ignoredXattrs, func(ignored string) bool { return strings.HasPrefix(name, ignored) }) {
			continue
		}
		if err := set(name, []byte(value)); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("setxattr %q: %w", name, err)
		}
	}
	return nil
}
