package erofs

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

const (
	// MaxEntries is the maximum number of names and of inodes of an image, those that were removed again included.
	MaxEntries = 1 << 20
	// MaxTextBytes is the maximum total size in bytes of names, link targets, extended attributes and lists of holes.
	MaxTextBytes = 32 << 20
	// BytesPerEntry is the memory in bytes that an entry takes beside its name: an inode, a directory entry, and its share of the index.
	BytesPerEntry = 90
)

// ErrCannotHold is wrapped by the error for a tree that an image cannot hold: one that is too large, or that EROFS has no form for. A
// directory on a disk can hold it.
var ErrCannotHold = errors.New("an EROFS image cannot hold it")

// Inode is a file of an [Image].
type Inode uint32

// Image is an image that is being built.
type Image struct {
	// data is the data file, of which blocks are taken.
	data   *os.File
	blocks uint32

	inodes  table[inode]
	entries table[entry]
	texts   texts
	index   nameIndex
	extents table[extent]
	// otherText are the bytes in attributes and extents, which count against MaxTextBytes too.
	otherText  int
	attributes attributes
}

// inode is a file. It has no pointers.
type inode struct {
	// size is the length of the content in bytes, of a directory's entries from plan on.
	size    int64
	seconds int64
	nanos   uint32
	uid     uint32
	gid     uint32
	links   uint32
	// set are the extended attributes (attributes.sets).
	set uint32
	// content depends on the type: the first extent of a regular file, or its block if it is one chunk; the target of a link in texts; the
	// number of a device; the first entry of a directory, from plan on.
	content uint32
	// extents is the number of extents of a regular file, or oneChunk. Of a directory, it is the entry in its parent.
	extents uint32
	// nid is the position in the metadata file in units of 32 bytes, from plan on.
	nid  uint32
	mode uint16
	// chunkBits is the binary logarithm of the chunk size of a regular file, 0 of an empty one.
	chunkBits uint8
}

// entry is a name in a directory. It has no pointers.
type entry struct {
	inode, parent Inode
	// name is in texts.
	name uint32
	// next is the next entry of the directory, from plan on. It is noEntry at the end, and removedEntry for one that is in no directory.
	next uint32
}

const (
	oneChunk     = 1<<32 - 1
	noEntry      = 1<<32 - 1
	removedEntry = 1<<32 - 2
)

// root is the inode of the root directory.
const root Inode = 0

// New returns an image with an empty root directory of mode 0755. The contents of files are written to data, which must be empty.
func New(data *os.File) *Image {
	i := &Image{data: data, index: newNameIndex(), attributes: newAttributes()}
	i.inodes.add(inode{mode: syscall.S_IFDIR | 0o755, links: 2, extents: noEntry})
	return i
}

// Root returns the root directory.
func (i *Image) Root() Inode { return root }

// Stat is what an [Inode] is.
type Stat struct {
	// Mode is the type and the permissions (st_mode).
	Mode uint32
	// Device is the number of a device (st_rdev).
	Device uint32
	Links  uint32
	Size   int64
}

// Stat returns what an inode is. The size of a directory is 0.
func (i *Image) Stat(of Inode) Stat {
	at := i.inode(of)
	stat := Stat{Mode: uint32(at.mode), Links: at.links, Size: at.size}
	if isDevice(at.mode) {
		stat.Device = at.content
	}
	return stat
}

func (i *Image) inode(of Inode) *inode { return i.inodes.at(uint32(of)) }

func isType(mode uint16, fileType uint16) bool { return mode&syscall.S_IFMT == fileType }

func isDevice(mode uint16) bool {
	return isType(mode, syscall.S_IFCHR) || isType(mode, syscall.S_IFBLK)
}

// Lookup returns the entry of a directory, without following a link. The error is ENOENT if there is none.
func (i *Image) Lookup(dir Inode, name string) (Inode, error) {
	if err := i.checkName(dir, name); err != nil {
		return 0, i.failed("lookup", dir, name, err)
	}
	slot, found := i.find(dir, name)
	if !found {
		return 0, i.failed("lookup", dir, name, syscall.ENOENT)
	}
	return i.entries.at(i.index.slots[slot] - slotUsed).inode, nil
}

func (i *Image) find(dir Inode, name string) (slot int, found bool) {
	return i.index.find(dir, []byte(name), func(at uint32) bool {
		e := i.entries.at(at)
		return e.parent == dir && string(i.texts.at(e.name)) == name
	})
}

// checkName returns ENOTDIR if there are no names in what is taken for a directory, and ENAMETOOLONG if the name has more than 255 bytes.
func (i *Image) checkName(dir Inode, name string) error {
	switch {
	case !isType(i.inode(dir).mode, syscall.S_IFDIR):
		return syscall.ENOTDIR
	case len(name) > maxName:
		return syscall.ENAMETOOLONG
	case name == "" || name == "." || name == "..":
		return syscall.EINVAL
	}
	return nil
}

// add adds a name to a directory for an inode, or for a new one if made is not nil.
func (i *Image) add(op string, dir Inode, name string, of Inode, made *inode) (Inode, error) {
	if err := i.checkName(dir, name); err != nil {
		return 0, i.failed(op, dir, name, err)
	}
	slot, found := i.find(dir, name)
	if found {
		return 0, i.failed(op, dir, name, syscall.EEXIST)
	}
	if i.entries.count >= MaxEntries {
		return 0, fmt.Errorf("%w: it has more than %d entries", ErrCannotHold, MaxEntries)
	}
	if err := i.checkText(len(name)); err != nil {
		return 0, err
	}
	at := i.entries.add(entry{inode: of, parent: dir, name: i.texts.add(name), next: noEntry})
	if made != nil {
		// What is made in a directory that sets the group has the group of the directory (inode_init_owner in fs/inode.c).
		above := i.inode(dir)
		if above.mode&syscall.S_ISGID != 0 {
			made.gid = above.gid
		}
		if isType(made.mode, syscall.S_IFDIR) {
			made.extents = at
			made.mode |= above.mode & syscall.S_ISGID
		}
		of = Inode(i.inodes.add(*made))
		i.entries.at(at).inode = of
	}
	i.index.add(slot, at, func(at uint32) (Inode, []byte) {
		e := i.entries.at(at)
		return e.parent, i.texts.at(e.name)
	})
	return of, nil
}

// checkText returns ErrCannotHold if there is no room for so many bytes more.
func (i *Image) checkText(bytes int) error {
	if i.texts.bytes+i.otherText+bytes > MaxTextBytes {
		return fmt.Errorf("%w: its names, links, attributes and holes take more than %d bytes", ErrCannotHold, MaxTextBytes)
	}
	return nil
}

// failed returns an error like that of a system call on an entry of a directory.
func (i *Image) failed(op string, dir Inode, name string, err error) error {
	path := "?"
	if isType(i.inode(dir).mode, syscall.S_IFDIR) {
		path = i.Path(dir)
	}
	return &os.PathError{Op: op, Path: path + "/" + name, Err: err}
}

// Mkdir makes a directory (mkdirat(2)).
func (i *Image) Mkdir(dir Inode, name string, mode uint32) (Inode, error) {
	return i.add("mkdirat", dir, name, 0, &inode{mode: syscall.S_IFDIR | uint16(mode&0o7777), links: 2})
}

// Mknod makes a device or a FIFO. mode has its type, and device its number as in st_rdev (mknodat(2)).
func (i *Image) Mknod(dir Inode, name string, mode, device uint32) (Inode, error) {
	return i.add("mknodat", dir, name, 0, &inode{mode: uint16(mode), links: 1, content: device})
}

// Symlink makes a symbolic link (symlinkat(2)).
func (i *Image) Symlink(target string, dir Inode, name string) (Inode, error) {
	switch {
	case target == "":
		return 0, i.failed("symlinkat", dir, name, syscall.ENOENT)
	case len(target) > maxPath:
		return 0, i.failed("symlinkat", dir, name, syscall.ENAMETOOLONG)
	}
	if err := i.checkText(len(target)); err != nil {
		return 0, err
	}
	made := inode{mode: syscall.S_IFLNK | 0o777, links: 1, size: int64(len(target)), content: i.texts.add(target)}
	return i.add("symlinkat", dir, name, 0, &made)
}

// Link makes another name for a file that is no directory (linkat(2)).
func (i *Image) Link(of, dir Inode, name string) error {
	at := i.inode(of)
	if isType(at.mode, syscall.S_IFDIR) {
		return i.failed("linkat", dir, name, syscall.EPERM)
	}
	if _, err := i.add("linkat", dir, name, of, nil); err != nil {
		return err
	}
	at.links++
	return nil
}

// Remove removes an entry of a directory, and all that is in it if it is a directory itself. Its memory is not freed, and nor are its
// blocks in the data file.
func (i *Image) Remove(dir Inode, name string) error {
	if err := i.checkName(dir, name); err != nil {
		return i.failed("unlinkat", dir, name, err)
	}
	slot, found := i.find(dir, name)
	if !found {
		return i.failed("unlinkat", dir, name, syscall.ENOENT)
	}
	at := i.entries.at(i.index.slots[slot] - slotUsed)
	at.next = removedEntry
	i.index.remove(slot)
	if of := i.inode(at.inode); !isType(of.mode, syscall.S_IFDIR) {
		of.links--
	}
	return nil
}

// Chown sets the owner.
func (i *Image) Chown(of Inode, uid, gid uint32) {
	at := i.inode(of)
	at.uid, at.gid = uid, gid
}

// Chmod sets the permission bits, with set-user-ID, set-group-ID and sticky (fchmodat(2)). An access control list follows them.
func (i *Image) Chmod(of Inode, mode uint32) error {
	at := i.inode(of)
	at.mode = at.mode&^0o7777 | uint16(mode&0o7777)
	if list, found := i.value(of, aclAccessName); found {
		return i.SetXattr(of, aclAccessName, chmodACL([]byte(list), mode))
	}
	return nil
}

// SetTime sets the time of the last modification. EROFS has no other time.
func (i *Image) SetTime(of Inode, modified time.Time) {
	at := i.inode(of)
	at.seconds, at.nanos = modified.Unix(), uint32(modified.Nanosecond())
}
