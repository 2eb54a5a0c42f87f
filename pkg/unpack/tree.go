package unpack

import "time"

// tree is where a layer is unpacked: a directory of a file system, or an EROFS image. What is made in it, and what is refused or left out,
// is decided by the unpacker alone, and so is the same for both. The methods of a tree and its files do what the system calls do that they
// are named for, and return their errors.
type tree interface {
	root() dir
	// open opens the directory at a path. Links on the path are resolved with the tree as their root.
	open(path string, how openHow) (dir, error)
	close()
}

// openHow is how a directory is opened.
type openHow int

const (
	// openPath is for a directory in which entries are made.
	openPath openHow = iota
	// openToSetTimes is for one whose times are set.
	openToSetTimes
	// openNoLinks is for one that there may be a link to, which is then not followed: the error is ELOOP or ENOTDIR.
	openNoLinks
)

// node is a file of a tree whose attributes are set.
type node interface {
	chown(uid, gid uint32) error
	chmod(mode uint32) error
	setXattr(name string, value []byte) error
	setTimes(accessed, modified time.Time) error
}

// dir is an open directory of a tree.
type dir interface {
	node
	// path returns the path from the root, which has no links.
	path() (string, error)
	getXattr(name string) ([]byte, error)
	removeXattr(name string) error
	close()

	// stat returns what an entry is. A link is not followed.
	stat(name string) (kind, error)
	// open opens a directory. A link is not followed: the error is ELOOP or ENOTDIR.
	open(name string) (dir, error)
	// entry returns a file that is not opened: a link or a device.
	entry(name string) (node, error)
	mkdir(name string, mode uint32) error
	// create makes a regular file with a size in bytes, all zeros.
	create(name string, size int64) (file, error)
	symlink(target, name string) error
	mknod(name string, mode uint32, device uint64) error
	// link makes name another name for the entry target of the directory from.
	link(from dir, target, name string) error
	// remove removes an entry of a kind, and all that is in it.
	remove(name string, of kind) error
}

// file is a regular file of a tree that is being written.
type file interface {
	node
	// WriteAt writes a part of the content. Parts come in order, and begin at multiples of blockSize.
	WriteAt(data []byte, offset int64) (int, error)
	// finish comes after the last part.
	finish() error
	close()
}

// kind is what an entry of a directory is.
type kind int

const (
	isOther kind = iota
	isDirectory
	isSymlink
	// isWhiteout is a character device 0/0.
	isWhiteout
)
