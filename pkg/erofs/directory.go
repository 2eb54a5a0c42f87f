package erofs

import (
	"encoding/binary"
	"syscall"
)

// dirEntry is an entry of a directory as it is written.
type dirEntry struct {
	name []byte
	of   Inode
}

// names calls visit for each entry of a directory in the order of their names, "." and ".." included.
func (i *Image) names(dir, parent Inode, visit func(dirEntry)) {
	own := []dirEntry{{[]byte("."), dir}, {[]byte(".."), parent}}
	for at := i.inode(dir).content; at != noEntry; {
		e := i.entries.at(at)
		name := i.texts.at(e.name)
		for len(own) > 0 && string(own[0].name) < string(name) {
			visit(own[0])
			own = own[1:]
		}
		visit(dirEntry{name, e.inode})
		at = e.next
	}
	for _, e := range own {
		visit(e)
	}
}

// dirSize returns the size of a directory: whole blocks, except for the last one.
func (i *Image) dirSize(dir *inode) int64 {
	var whole, used int64
	add := func(name int) {
		size := int64(direntSize + name)
		if used+size > blockSize {
			whole, used = whole+blockSize, 0
		}
		used += size
	}
	// Where "." and ".." are decides where a block ends, but which directories they are does not.
	dots := []string{".", ".."}
	for at := dir.content; at != noEntry; {
		e := i.entries.at(at)
		name := i.texts.at(e.name)
		for len(dots) > 0 && dots[0] < string(name) {
			add(len(dots[0]))
			dots = dots[1:]
		}
		add(len(name))
		at = e.next
	}
	for _, name := range dots {
		add(len(name))
	}
	return whole + used
}

// writeDir calls write for each block of a directory: an entry for each name, then the names. All but the last are 4096 bytes.
func (i *Image) writeDir(dir Inode, write func(block []byte) error) error {
	var pending []dirEntry
	used := 0
	var failed error
	flush := func(size int) {
		if failed != nil {
			return
		}
		block := make([]byte, size)
		name := direntSize * len(pending)
		for n, e := range pending {
			at := block[n*direntSize:]
			binary.LittleEndian.PutUint64(at, uint64(i.inode(e.of).nid))
			binary.LittleEndian.PutUint16(at[8:], uint16(name))
			at[10] = fileType(i.inode(e.of).mode)
			name += copy(block[name:], e.name)
		}
		failed = write(block)
		pending, used = pending[:0], 0
	}
	i.names(dir, i.parent(dir), func(e dirEntry) {
		if size := direntSize + len(e.name); used+size > blockSize {
			flush(blockSize)
		}
		used += direntSize + len(e.name)
		pending = append(pending, e)
	})
	flush(used)
	return failed
}

// fileType returns the type in an entry (FT_* in the kernel's include/linux/fs_types.h).
func fileType(mode uint16) uint8 {
	switch mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		return 1
	case syscall.S_IFDIR:
		return 2
	case syscall.S_IFCHR:
		return 3
	case syscall.S_IFBLK:
		return 4
	case syscall.S_IFIFO:
		return 5
	case syscall.S_IFLNK:
		return 7
	}
	return 0
}
