package erofs

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"syscall"
)

// plan says where everything is in the metadata file:
//
//	0       a free kilobyte, the superblock, and the table of devices with the data file alone
//	1280    the inodes, the root first. Each is followed by its extended attributes, and by the end of a directory, the target of a
//	        link, or the chunks of a file with holes
//	shared  from the next block on: the extended attributes that more than one inode has
//	blocks  from the next block on: the directories as far as they are not with their inodes, and long targets of links
type plan struct {
	image *Image
	// order has the inodes in the order in which they are written: those of a directory together.
	order table[Inode]
	// setBytes is the size of the extended attributes of an inode with a set (attributes.sets).
	setBytes []int64
	// inodesEnd is the end of the inodes in the file.
	inodesEnd int64
	// sharedBlock is the first block of the shared attributes, sharedBytes their size.
	sharedBlock, sharedBytes int64
	// firstBlock is the first of the blocks of directories and links, endBlock the first after them.
	firstBlock, endBlock int64
}

// plan plans the metadata file. The image cannot be changed any more.
func (i *Image) plan() (*plan, error) {
	p := &plan{image: i}
	p.reach()
	if err := p.shareAttributes(); err != nil {
		return nil, err
	}
	blocks := p.place()
	p.sharedBlock = blocksOf(p.inodesEnd)
	p.firstBlock = p.sharedBlock + blocksOf(p.sharedBytes)
	p.endBlock = p.firstBlock + blocks
	if p.endBlock > maxBlocks || p.inodesEnd/nidSize > math.MaxUint32 {
		return nil, fmt.Errorf("%w: its metadata has %d bytes", ErrCannotHold, p.endBlock*blockSize)
	}
	return p, nil
}

func blocksOf(bytes int64) int64 { return (bytes + blockSize - 1) / blockSize }

// reach finds the order of all inodes that have a name, and sorts the directories.
func (p *plan) reach() {
	i := p.image
	for n := range i.inodes.count {
		if at := i.inodes.at(n); isType(at.mode, syscall.S_IFDIR) {
			at.content, at.links = noEntry, 2
		}
	}
	for n := range i.entries.count {
		if e := i.entries.at(n); e.next != removedEntry {
			above := i.inode(e.parent)
			e.next, above.content = above.content, n
		}
	}
	p.order.add(root)
	i.inode(root).nid = reached
	var children []uint32
	for n := uint32(0); n < p.order.count; n++ {
		at := i.inode(*p.order.at(n))
		if !isType(at.mode, syscall.S_IFDIR) {
			continue
		}
		children = i.sortChildren(at, children[:0])
		for _, child := range children {
			of := i.entries.at(child).inode
			below := i.inode(of)
			if isType(below.mode, syscall.S_IFDIR) {
				at.links++
			}
			if below.nid != reached {
				below.nid = reached
				p.order.add(of)
			}
		}
	}
}

// reached is the nid of an inode that is in the order. It is none that an inode can have.
const reached = 1

// sortChildren sorts the list of a directory's entries by their names. It returns them in buffer.
func (i *Image) sortChildren(dir *inode, buffer []uint32) []uint32 {
	for at := dir.content; at != noEntry; at = i.entries.at(at).next {
		buffer = append(buffer, at)
	}
	slices.SortFunc(buffer, func(a, b uint32) int {
		return bytes.Compare(i.texts.at(i.entries.at(a).name), i.texts.at(i.entries.at(b).name))
	})
	next := uint32(noEntry)
	for _, at := range slices.Backward(buffer) {
		i.entries.at(at).next = next
		next = at
	}
	dir.content = next
	return buffer
}

// shareAttributes decides which attributes are shared, and how large the others are.
func (p *plan) shareAttributes() error {
	a := &p.image.attributes
	uses := make([]uint32, len(a.sets))
	for n := range p.order.count {
		uses[p.image.inode(*p.order.at(n)).set]++
	}
	for set, ids := range a.sets {
		for _, id := range ids {
			a.attributes[id].uses += uses[set]
		}
	}
	for n := range a.attributes {
		if at := &a.attributes[n]; at.uses > 1 {
			at.shared = uint32(p.sharedBytes / xattrAlign)
			p.sharedBytes += at.bytes()
		}
	}
	p.setBytes = make([]int64, len(a.sets))
	for set := range a.sets {
		if set == 0 || uses[set] == 0 {
			continue
		}
		shared, own := a.split(uint32(set))
		size := int64(xattrHeaderSize + 4*len(shared))
		for _, id := range own {
			size += a.attributes[id].bytes()
		}
		if (size-xattrHeaderSize)/xattrAlign+1 > math.MaxUint16 {
			return fmt.Errorf("%w: the extended attributes of a file have %d bytes", ErrCannotHold, size)
		}
		p.setBytes[set] = size
	}
	return nil
}

// split returns the attributes of a set that are shared, and those that are with the inode.
func (a *attributes) split(set uint32) (shared, own []uint32) {
	for _, id := range a.sets[set] {
		// The number of shared ones has a byte.
		if a.attributes[id].uses > 1 && len(shared) < math.MaxUint8 {
			shared = append(shared, id)
		} else {
			own = append(own, id)
		}
	}
	return shared, own
}

// bytes returns the size of an attribute in the file.
func (a *attribute) bytes() int64 {
	_, rest, _ := splitName(a.name)
	return roundUp(int64(xattrEntrySize+len(rest)+len(a.value)), xattrAlign)
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// place gives each inode its position. It returns the number of blocks of directories and links.
func (p *plan) place() (blocks int64) {
	position := int64(firstInode)
	for n := range p.order.count {
		at := p.image.inode(*p.order.at(n))
		if isType(at.mode, syscall.S_IFDIR) {
			at.size = p.image.dirSize(at)
		}
		shape := p.shape(at)
		position = roundUp(position, nidSize)
		// What follows an inode in place of a block must be within one block. Of a link, the kernel wants all in one block.
		if within := position % blockSize; shape.inline > 0 && within+shape.head+shape.inline > blockSize {
			position = roundUp(position, blockSize)
		}
		at.nid = uint32(position / nidSize)
		position += shape.head + shape.inline + shape.chunks*chunkSize
		blocks += shape.blocks
	}
	p.inodesEnd = position
	return blocks
}

// shape is how an inode is written.
type shape struct {
	// head is the size of the inode with its attributes.
	head int64
	// inline is the number of bytes of the content that follow it, chunks the number of chunks.
	inline, chunks int64
	// blocks is the number of blocks of the content in the metadata file.
	blocks int64
	layout uint16
}

// shape returns how an inode is written. The size of a directory must be known.
func (p *plan) shape(of *inode) shape {
	s := shape{head: inodeSize + p.setBytes[of.set], layout: layoutPlain}
	switch of.mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		if of.chunkBits > 0 {
			// The chunks begin at a multiple of their size, and so does every inode.
			s.layout, s.head = layoutChunks, roundUp(s.head, chunkSize)
			s.chunks = (of.size + int64(1)<<of.chunkBits - 1) >> of.chunkBits
		}
	case syscall.S_IFDIR, syscall.S_IFLNK:
		end := of.size % blockSize
		if s.head+end <= blockSize && end > 0 {
			s.layout, s.inline, s.blocks = layoutInline, end, of.size/blockSize
		} else {
			s.blocks = blocksOf(of.size)
		}
	}
	return s
}
