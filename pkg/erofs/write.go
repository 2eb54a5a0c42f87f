package erofs

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"syscall"
)

// The format (fs/erofs/erofs_fs.h). All numbers are little-endian.
const (
	magic        = 0xe0f5e1e2
	superOffset  = 1024
	superSize    = 128
	deviceSize   = 128
	deviceOffset = superOffset + superSize
	firstInode   = deviceOffset + deviceSize
	nidSize      = 32
	inodeSize    = 64
	direntSize   = 12
	chunkSize    = 8

	xattrHeaderSize = 12
	xattrEntrySize  = 4
	xattrAlign      = 4

	// compatChecksum has the superblock's block a checksum, compatMTime says that times are those of modification.
	compatChecksum = 0x1
	compatMTime    = 0x2
	// incompatChunks and incompatDevices say that there are files in chunks, and a table of devices.
	incompatChunks  = 0x4
	incompatDevices = 0x8

	layoutPlain  = 0
	layoutInline = 2
	layoutChunks = 4
	// formatExtended is the version of an inode of 64 bytes.
	formatExtended = 1
	layoutShift    = 1
	// chunkIndexes is the form of chunks that says in which device they are. The data file is the device 1.
	chunkIndexes = 0x20
	dataDevice   = 1
)

// WriteMetadata writes the metadata file, which must be empty, and gives the data file its size. It returns the sizes of the two in
// bytes. The image cannot be used afterwards.
func (i *Image) WriteMetadata(metadata *os.File) (metadataBytes, dataBytes int64, _ error) {
	p, err := i.plan()
	if err != nil {
		return 0, 0, err
	}
	if err := i.extendData(); err != nil {
		return 0, 0, err
	}
	w := &writer{plan: p, to: bufio.NewWriterSize(metadata, 1<<20)}
	w.writeAll()
	if err := w.flush(); err != nil {
		return 0, 0, fmt.Errorf("write the metadata of an EROFS image: %w", err)
	}
	if err := setChecksum(metadata); err != nil {
		return 0, 0, fmt.Errorf("write the checksum of an EROFS image: %w", err)
	}
	return p.endBlock * blockSize, int64(i.blocks) * blockSize, nil
}

// writer writes a metadata file from its beginning to its end.
type writer struct {
	*plan
	to       *bufio.Writer
	position int64
	err      error
}

func (w *writer) flush() error {
	if w.err != nil {
		return w.err
	}
	return w.to.Flush()
}

func (w *writer) write(data []byte) {
	if w.err == nil {
		_, w.err = w.to.Write(data)
	}
	w.position += int64(len(data))
}

// pad writes zeros up to a position.
func (w *writer) pad(position int64) {
	var zeros [blockSize]byte
	for w.position < position {
		w.write(zeros[:min(position-w.position, blockSize)])
	}
}

func (w *writer) writeAll() {
	w.pad(superOffset)
	w.write(w.superblock())
	w.write(w.device())
	block := w.firstBlock
	for n := range w.order.count {
		of := *w.order.at(n)
		w.pad(int64(w.image.inode(of).nid) * nidSize)
		block += w.writeInode(of, block)
	}
	w.pad(w.sharedBlock * blockSize)
	for n := range w.image.attributes.attributes {
		if a := &w.image.attributes.attributes[n]; a.uses > 1 {
			w.write(a.encode())
		}
	}
	w.pad(w.firstBlock * blockSize)
	for n := range w.order.count {
		w.writeBlocks(*w.order.at(n))
	}
	if w.err == nil && w.position != w.endBlock*blockSize {
		w.err = fmt.Errorf("%d bytes were planned, and %d written", w.endBlock*blockSize, w.position)
	}
}

func (w *writer) superblock() []byte {
	b := make([]byte, superSize)
	put32, put16 := binary.LittleEndian.PutUint32, binary.LittleEndian.PutUint16
	put32(b, magic)
	put32(b[8:], compatChecksum|compatMTime)
	b[12] = blockBits
	put16(b[14:], uint16(w.image.inode(root).nid))
	binary.LittleEndian.PutUint64(b[16:], uint64(w.order.count))
	put32(b[36:], uint32(w.endBlock))
	// The inodes are counted from the beginning of the file.
	put32(b[40:], 0)
	put32(b[44:], uint32(w.sharedBlock))
	put32(b[80:], incompatChunks|incompatDevices)
	put16(b[86:], 1)
	put16(b[88:], deviceOffset/deviceSize)
	return b
}

// device returns the entry of the data file in the table of devices.
func (w *writer) device() []byte {
	b := make([]byte, deviceSize)
	binary.LittleEndian.PutUint32(b[64:], w.image.blocks)
	return b
}

// writeInode writes an inode and what follows it. block is the first block of its content in the metadata file, if it has some there.
// It returns their number.
func (w *writer) writeInode(of Inode, block int64) (blocks int64) {
	at := w.image.inode(of)
	s := w.shape(at)
	b := make([]byte, inodeSize)
	put32, put16 := binary.LittleEndian.PutUint32, binary.LittleEndian.PutUint16
	put16(b, formatExtended|s.layout<<layoutShift)
	if size := w.setBytes[at.set]; size > 0 {
		put16(b[2:], uint16((size-xattrHeaderSize)/xattrAlign+1))
	}
	put16(b[4:], at.mode)
	binary.LittleEndian.PutUint64(b[8:], uint64(at.size))
	switch {
	case isDevice(at.mode):
		// The 32 bits of st_rdev are what new_encode_dev makes (include/linux/kdev_t.h).
		put32(b[16:], at.content)
	case s.layout == layoutChunks:
		put16(b[16:], chunkIndexes|uint16(at.chunkBits-blockBits))
	case s.blocks > 0:
		put32(b[16:], uint32(block))
	}
	put32(b[20:], uint32(of)+1)
	put32(b[24:], at.uid)
	put32(b[28:], at.gid)
	binary.LittleEndian.PutUint64(b[32:], uint64(at.seconds))
	put32(b[40:], at.nanos)
	put32(b[44:], at.links)
	w.write(b)
	w.writeXattrs(at.set)
	switch {
	case s.layout == layoutChunks:
		w.pad(int64(at.nid)*nidSize + s.head)
		w.writeChunks(at, s.chunks)
	case s.layout == layoutInline && isType(at.mode, syscall.S_IFLNK):
		w.write(w.image.texts.at(at.content))
	case s.layout == layoutInline:
		w.writeDirPart(of, s.blocks, true)
	}
	return s.blocks
}

// writeDirPart writes the blocks of a directory that are not with its inode, or what is there.
func (w *writer) writeDirPart(dir Inode, blocks int64, tail bool) {
	var n int64
	err := w.image.writeDir(dir, func(block []byte) error {
		if n >= blocks == tail {
			w.write(block)
		}
		n++
		return nil
	})
	if w.err == nil {
		w.err = err
	}
}

// writeXattrs writes the attributes of an inode: how many are shared, which they are, and the others.
func (w *writer) writeXattrs(set uint32) {
	if w.setBytes[set] == 0 {
		return
	}
	a := &w.image.attributes
	shared, own := a.split(set)
	b := make([]byte, xattrHeaderSize)
	b[4] = uint8(len(shared))
	for _, id := range shared {
		b = binary.LittleEndian.AppendUint32(b, a.attributes[id].shared)
	}
	for _, id := range own {
		b = append(b, a.attributes[id].encode()...)
	}
	w.write(b)
}

// encode returns an attribute as it is in the file.
func (a *attribute) encode() []byte {
	index, rest, _ := splitName(a.name)
	b := make([]byte, xattrEntrySize, a.bytes())
	b[0], b[1] = uint8(len(rest)), index
	binary.LittleEndian.PutUint16(b[2:], uint16(len(a.value)))
	b = append(b, rest...)
	b = append(b, a.value...)
	return b[:a.bytes()]
}

// writeChunks writes where each chunk of a regular file is.
func (w *writer) writeChunks(of *inode, chunks int64) {
	const hole = 1<<32 - 1
	var b [chunkSize]byte
	put := func(device uint16, block uint32) {
		binary.LittleEndian.PutUint16(b[2:], device)
		binary.LittleEndian.PutUint32(b[4:], block)
		w.write(b[:])
	}
	if of.extents == oneChunk {
		put(dataDevice, of.content)
		return
	}
	perChunk := uint32(1) << (of.chunkBits - blockBits)
	next := int64(0)
	for n := range of.extents {
		e := w.image.extents.at(of.content + n)
		for ; next < int64(e.chunk); next++ {
			put(0, hole)
		}
		for chunk := range e.count {
			put(dataDevice, e.block+chunk*perChunk)
			next++
		}
	}
	for ; next < chunks; next++ {
		put(0, hole)
	}
}

// writeBlocks writes the content of a directory or link that is not with its inode.
func (w *writer) writeBlocks(of Inode) {
	at := w.image.inode(of)
	s := w.shape(at)
	if s.blocks == 0 {
		return
	}
	end := w.position + s.blocks*blockSize
	if isType(at.mode, syscall.S_IFLNK) {
		w.write(w.image.texts.at(at.content))
	} else {
		w.writeDirPart(of, s.blocks, false)
	}
	w.pad(end)
}

// setChecksum writes the checksum of the first block from the superblock on (erofs_superblock_csum_verify in fs/erofs/super.c). The kernel
// does not invert it at the end.
func setChecksum(file *os.File) error {
	b := make([]byte, blockSize-superOffset)
	if _, err := io.ReadFull(io.NewSectionReader(file, superOffset, int64(len(b))), b); err != nil {
		return err
	}
	checksum := make([]byte, 4)
	binary.LittleEndian.PutUint32(checksum, ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	_, err := file.WriteAt(checksum, superOffset+4)
	return err
}
