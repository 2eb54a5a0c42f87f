package linux

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Stat is what stat(2) returns.
type Stat struct{ unix.Stat_t }

// IsDir reports whether it is a directory.
func (s Stat) IsDir() bool { return s.Mode&unix.S_IFMT == unix.S_IFDIR }

// IsRegular reports whether it is a regular file.
func (s Stat) IsRegular() bool { return s.Mode&unix.S_IFMT == unix.S_IFREG }

// IsSymlink reports whether it is a symbolic link.
func (s Stat) IsSymlink() bool { return s.Mode&unix.S_IFMT == unix.S_IFLNK }

// IsWhiteout reports whether it is a whiteout of overlayfs, a character device 0/0.
func (s Stat) IsWhiteout() bool { return s.Mode&unix.S_IFMT == unix.S_IFCHR && s.Rdev == 0 }

// Perm returns the permission bits, with set-user-ID, set-group-ID and sticky.
func (s Stat) Perm() uint32 { return s.Mode & 0o7777 }

// DiskBytes is what the file takes on the disk.
func (s Stat) DiskBytes() int64 { return s.Blocks * 512 }

// ModTime returns when the content was last modified.
func (s Stat) ModTime() time.Time { return time.Unix(s.Mtim.Unix()) }

// Device returns the numbers of a device.
func (s Stat) Device() (major, minor uint32) { return unix.Major(s.Rdev), unix.Minor(s.Rdev) }

// ID returns the identity of the file.
func (s Stat) ID() FileID { return FileID{Dev: s.Dev, Ino: s.Ino} }

// FileID is the identity of a file while it exists: the device and the inode.
type FileID struct{ Dev, Ino uint64 }

// StatFile stats an open file (fstat(2)). The handle may be one of [O_PATH].
func StatFile(file *os.File) (Stat, error) {
	var stat Stat
	err := call("fstat", file, func(fd int) error { return unix.Fstat(fd, &stat.Stat_t) })
	return stat, err
}

// Fstatat stats a path in a directory, without following a link at its end, or the directory itself with an empty path
// (fstatat(2)).
func Fstatat(dir *os.File, path string) (Stat, error) {
	var stat Stat
	err := callAt("fstatat", dir, path, func(fd int) error {
		return unix.Fstatat(fd, path, &stat.Stat_t, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH)
	})
	return stat, err
}

// StatPath stats a path, and follows links (stat(2)).
func StatPath(path string) (Stat, error) {
	var stat Stat
	err := callAt("stat", nil, path, func(int) error { return unix.Stat(path, &stat.Stat_t) })
	return stat, err
}

// Revalidate has the file system answer for an open file. One of a server asks the server, whatever it remembers of the file (statx(2),
// AT_STATX_FORCE_SYNC). The fingerprint is that of a directory.
func Revalidate(file *os.File) (FileID, Fingerprint, error) {
	var stat unix.Statx_t
	err := call("statx", file, func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &stat)
	})
	id := FileID{Dev: unix.Mkdev(stat.Dev_major, stat.Dev_minor), Ino: stat.Ino}
	return id, fingerprint(id, stat.Mtime.Sec*int64(time.Second)+int64(stat.Mtime.Nsec)), err
}

// SameFile reports whether two handles are of the same file.
func SameFile(a, b *os.File) (bool, error) {
	ofA, err := StatFile(a)
	if err != nil {
		return false, err
	}
	ofB, err := StatFile(b)
	return err == nil && ofA.ID() == ofB.ID(), err
}

// Fingerprint is what a directory looked like at one time: its device, its inode, and when an entry in it was last made, removed
// or renamed. Changes deeper down leave it as it is. "" is the fingerprint of a directory that may change.
type Fingerprint string

// FingerprintOf returns the fingerprint of an open directory.
func FingerprintOf(dir *os.File) (Fingerprint, error) {
	stat, err := StatFile(dir)
	if err != nil {
		return "", err
	}
	return stat.Fingerprint(), nil
}

// Fingerprint returns the fingerprint of the directory that was stat'ed.
func (s Stat) Fingerprint() Fingerprint { return fingerprint(s.ID(), s.Mtim.Nano()) }

// fingerprint returns the fingerprint of a directory that was changed so many nanoseconds after 1970.
func fingerprint(id FileID, changed int64) Fingerprint {
	return Fingerprint(fmt.Sprintf("%x:%x:%x", id.Dev, id.Ino, changed))
}
