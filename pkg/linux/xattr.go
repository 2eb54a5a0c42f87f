package linux

import (
	"errors"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// SetXattr sets an extended attribute of an open file (fsetxattr(2)). The handle may be one of [O_PATH].
func SetXattr(file *os.File, name string, value []byte) error {
	return call("setxattr "+name, file, func(fd int) error {
		err := unix.Fsetxattr(fd, name, value, 0)
		if errors.Is(err, unix.EBADF) {
			err = unix.Setxattr(ProcPath(file), name, value, 0)
		}
		return err
	})
}

// RemoveXattr removes an extended attribute of an open file (fremovexattr(2)). The handle may be one of [O_PATH]. The error is ENODATA
// where there is none.
func RemoveXattr(file *os.File, name string) error {
	return call("removexattr "+name, file, func(fd int) error {
		err := unix.Fremovexattr(fd, name)
		if errors.Is(err, unix.EBADF) {
			err = unix.Removexattr(ProcPath(file), name)
		}
		return err
	})
}

// GetXattr returns an extended attribute of an open file (fgetxattr(2)). The handle may be one of [O_PATH]. The error is ENODATA where
// there is none.
func GetXattr(file *os.File, name string) ([]byte, error) {
	return getXattr("getxattr "+name, file, "", func(fd int, value []byte) (int, error) {
		n, err := unix.Fgetxattr(fd, name, value)
		if errors.Is(err, unix.EBADF) {
			n, err = unix.Getxattr(ProcPath(file), name, value)
		}
		return n, err
	})
}

// ListXattr returns the names of the extended attributes of an open file (flistxattr(2)). The handle may be one of [O_PATH].
func ListXattr(file *os.File) ([]string, error) {
	list, err := getXattr("flistxattr", file, "", func(fd int, list []byte) (int, error) {
		n, err := unix.Flistxattr(fd, list)
		if errors.Is(err, unix.EBADF) {
			n, err = unix.Listxattr(ProcPath(file), list)
		}
		return n, err
	})
	return attributeNames(list), err
}

// ListXattrAt returns the names of the extended attributes of an entry of a directory, without following a link (llistxattr(2)).
func ListXattrAt(dir *os.File, path string) ([]string, error) {
	list, err := getXattr("llistxattr", dir, path, func(_ int, list []byte) (int, error) {
		return unix.Llistxattr(entryPath(dir, path), list)
	})
	return attributeNames(list), err
}

func attributeNames(list []byte) []string {
	return strings.FieldsFunc(string(list), func(r rune) bool { return r == 0 })
}

// SetXattrAt sets an extended attribute of an entry of a directory, without following a link (lsetxattr(2)). There is no system call
// for an entry before Linux 6.13: the path goes by /proc.
func SetXattrAt(dir *os.File, path, name string, value []byte) error {
	return callAt("lsetxattr "+name, dir, path, func(int) error { return unix.Lsetxattr(entryPath(dir, path), name, value, 0) })
}

// GetXattrAt returns an extended attribute of an entry of a directory, without following a link (lgetxattr(2)). The error is ENODATA
// where there is none.
func GetXattrAt(dir *os.File, path, name string) ([]byte, error) {
	return getXattr("lgetxattr "+name, dir, path, func(_ int, value []byte) (int, error) {
		return unix.Lgetxattr(entryPath(dir, path), name, value)
	})
}

func entryPath(dir *os.File, path string) string {
	if dir == nil {
		return path
	}
	return ProcPath(dir) + "/" + path
}

// maxXattr is the largest value of an extended attribute (XATTR_SIZE_MAX), and the largest list of their names (XATTR_LIST_MAX).
const maxXattr = 64 << 10

func getXattr(op string, dir *os.File, path string, get func(fd int, value []byte) (int, error)) ([]byte, error) {
	value := make([]byte, 256)
	var n int
	err := callAt(op, dir, path, func(fd int) (err error) {
		n, err = get(fd, value)
		if errors.Is(err, unix.ERANGE) {
			value = make([]byte, maxXattr)
			n, err = get(fd, value)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return value[:n], nil
}
