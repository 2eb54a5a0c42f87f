package linux

import (
	"os"

	"golang.org/x/sys/unix"
)

// Mkdirat makes a directory (mkdirat(2)). The mode is less the umask.
func Mkdirat(dir *os.File, path string, mode uint32) error {
	return callAt("mkdirat", dir, path, func(fd int) error { return unix.Mkdirat(fd, path, mode) })
}

// Mknodat makes a file, FIFO or device (mknodat(2)). The mode has its type (syscall.S_IFCHR, …), and is less the umask.
func Mknodat(dir *os.File, path string, mode uint32, device uint64) error {
	return callAt("mknodat", dir, path, func(fd int) error { return unix.Mknodat(fd, path, mode, int(device)) })
}

// Mkdev returns a device number (makedev(3)).
func Mkdev(major, minor uint32) uint64 { return unix.Mkdev(major, minor) }

// Symlinkat makes a symbolic link to target (symlinkat(2)).
func Symlinkat(target string, dir *os.File, path string) error {
	err := retry(func() error { return unix.Symlinkat(target, fdOf(dir), path) })
	if err != nil {
		return &os.LinkError{Op: "symlinkat", Old: target, New: fullPath(dir, path), Err: err}
	}
	return nil
}

// Linkat gives a file another name (linkat(2)). A symbolic link is not followed.
func Linkat(oldDir *os.File, oldPath string, newDir *os.File, newPath string) error {
	return callLink("linkat", oldDir, oldPath, newDir, newPath, func(oldFD, newFD int) error {
		return unix.Linkat(oldFD, oldPath, newFD, newPath, 0)
	})
}

// Unlinkat removes what is no directory (unlinkat(2)).
func Unlinkat(dir *os.File, path string) error {
	return callAt("unlinkat", dir, path, func(fd int) error { return unix.Unlinkat(fd, path, 0) })
}

// Rmdirat removes an empty directory (unlinkat(2), AT_REMOVEDIR).
func Rmdirat(dir *os.File, path string) error {
	return callAt("rmdir", dir, path, func(fd int) error { return unix.Unlinkat(fd, path, unix.AT_REMOVEDIR) })
}

// How renameat2(2) treats the new name (RENAME_*).
const (
	// RenameNoReplace fails with EEXIST where there is something of the new name.
	RenameNoReplace = unix.RENAME_NOREPLACE
	// RenameExchange exchanges the two names.
	RenameExchange = unix.RENAME_EXCHANGE
	// RenameWhiteout leaves a whiteout of overlayfs under the old name.
	RenameWhiteout = unix.RENAME_WHITEOUT
)

// Renameat renames a file or directory (renameat2(2)).
func Renameat(oldDir *os.File, oldPath string, newDir *os.File, newPath string, flags uint) error {
	return callLink("renameat2", oldDir, oldPath, newDir, newPath, func(oldFD, newFD int) error {
		return unix.Renameat2(oldFD, oldPath, newFD, newPath, flags)
	})
}

// Readlinkat returns the target of a symbolic link (readlinkat(2)), of an open one ([O_PATH] and [O_NOFOLLOW]) with an empty path.
func Readlinkat(dir *os.File, path string) (string, error) {
	target := make([]byte, unix.PathMax)
	var n int
	err := callAt("readlinkat", dir, path, func(fd int) (err error) {
		n, err = unix.Readlinkat(fd, path, target)
		return err
	})
	if err != nil {
		return "", err
	}
	return string(target[:n]), nil
}
