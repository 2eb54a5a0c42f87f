package diff

import (
	"io/fs"
	"os"
	"syscall"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Tree is what one or more uppers make of the layers below them. All directories are open for reading, and stay open with the caller.
type Tree struct {
	// Uppers are the directories of the uppers, the topmost first.
	Uppers []*os.File
	// View is the root of an overlay of the uppers and the layers, and Base that of one of the layers alone, nil for no layers.
	View, Base *os.File
	// Owner returns the owner that a layer has for a file that the view shows with this owner. It may be nil: they are the same.
	Owner func(uid, gid uint32) (layerUID, layerGID uint32)
	// MaxBytes is how many bytes the files of a layer may have together, holes included, 0 for any number.
	MaxBytes int64
}

// Kind is what became of an entry.
type Kind byte

// The kinds of changes, as docker diff(1) prints them.
const (
	Added   Kind = 'A'
	Changed Kind = 'C'
	Deleted Kind = 'D'
)

// String returns the letter.
func (k Kind) String() string { return string(rune(k)) }

// Change is one entry that differs between the layers and the view.
type Change struct {
	// Path is relative to the root of the view, "." for the root.
	Path string
	Kind Kind
	// Type has the type and the permission bits: those that the view shows, or of a deleted entry those in the layers.
	Type fs.FileMode
	// Size is that of a regular file in bytes, as the view shows it.
	Size int64
}

// modeOf returns the type and the permission bits of a file.
func modeOf(stat linux.Stat) fs.FileMode {
	mode := fs.FileMode(stat.Perm() & 0o777)
	switch stat.Mode & syscall.S_IFMT {
	case syscall.S_IFDIR:
		mode |= fs.ModeDir
	case syscall.S_IFLNK:
		mode |= fs.ModeSymlink
	case syscall.S_IFIFO:
		mode |= fs.ModeNamedPipe
	case syscall.S_IFSOCK:
		mode |= fs.ModeSocket
	case syscall.S_IFBLK:
		mode |= fs.ModeDevice
	case syscall.S_IFCHR:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	}
	for bit, flag := range map[uint32]fs.FileMode{
		syscall.S_ISUID: fs.ModeSetuid, syscall.S_ISGID: fs.ModeSetgid, syscall.S_ISVTX: fs.ModeSticky,
	} {
		if stat.Mode&bit != 0 {
			mode |= flag
		}
	}
	return mode
}
