package erofs

import (
	"fmt"
	"math/bits"
	"os"
	"syscall"
)

const (
	blockBits = 12
	blockSize = 1 << blockBits
	// minChunkBits makes chunks of 64 KiB. A file has holes of whole chunks: smaller ones would take more metadata, and reading the file
	// more lookups, than they save.
	minChunkBits = 16
	// maxChunksBits has at most 65536 chunks in a file with holes. Larger files have larger chunks.
	maxChunksBits = 16
	// maxChunkBits is what EROFS has for the size of a chunk: 5 bits, added to those of a block.
	maxChunkBits = blockBits + 1<<5 - 1
	// maxBlocks is the maximum number of blocks of each file of an image (16 TiB). Block numbers have 32 bits, and all ones is a hole.
	maxBlocks = 1<<32 - 1
)

// extent is a run of chunks of a file with holes that follow one another in the data file.
type extent struct {
	// chunk is the first chunk, block its first block in the data file, and count the number of chunks.
	chunk, block, count uint32
}

// extentBytes is the size of an extent.
const extentBytes = 12

// File is a regular file whose content is being written.
type File struct {
	image *Image
	inode Inode
	size  int64
	// chunkBits is the binary logarithm of the chunk size.
	chunkBits int
	// first is the first extent, count the number of extents.
	first, count uint32
	// start is the position of the last chunk in the data file.
	start int64
}

// Create makes a regular file with a size in bytes. Its content is zeros until it is written, and the file must be closed before another
// one is created.
func (i *Image) Create(dir Inode, name string, mode uint32, size int64) (*File, error) {
	made, err := i.add("openat2", dir, name, 0, &inode{mode: syscall.S_IFREG | uint16(mode&0o7777), links: 1, size: size})
	if err != nil {
		return nil, err
	}
	chunkBits := max(minChunkBits, bits.Len64(uint64(max(size-1, 0)))-maxChunksBits)
	if chunkBits > maxChunkBits {
		return nil, fmt.Errorf("%w: a file has %d bytes", ErrCannotHold, size)
	}
	return &File{image: i, inode: made, size: size, chunkBits: chunkBits, first: i.extents.count}, nil
}

// Inode returns the file's inode.
func (f *File) Inode() Inode { return f.inode }

// WriteAt writes a part of the content. Parts must come in the order of their offsets, which must be multiples of 4096. What is between
// them, and after the last, is zeros.
func (f *File) WriteAt(data []byte, offset int64) (int, error) {
	if offset%blockSize != 0 || offset < 0 || offset+int64(len(data)) > f.size {
		return 0, fmt.Errorf("write %d bytes at %d of a file of %d: %w", len(data), offset, f.size, os.ErrInvalid)
	}
	if len(data) == 0 {
		return 0, nil
	}
	first := offset >> f.chunkBits
	if err := f.take(first); err != nil {
		return 0, err
	}
	start := f.start
	// The chunks that follow are new, and so they follow in the data file too.
	for chunk := first + 1; chunk<<f.chunkBits < offset+int64(len(data)); chunk++ {
		if err := f.take(chunk); err != nil {
			return 0, err
		}
	}
	return f.image.data.WriteAt(data, start+offset-first<<f.chunkBits)
}

// take reserves the blocks of a chunk in the data file, unless it is the last chunk that was reserved.
func (f *File) take(chunk int64) error {
	i := f.image
	if f.count > 0 {
		last := i.extents.at(f.first + f.count - 1)
		if chunk == int64(last.chunk+last.count-1) {
			return nil
		}
	}
	size := min(int64(1)<<f.chunkBits, f.size-chunk<<f.chunkBits)
	blocks := (size + blockSize - 1) / blockSize
	if int64(i.blocks)+blocks > maxBlocks {
		return fmt.Errorf("%w: its files have more than %d bytes", ErrCannotHold, int64(maxBlocks)*blockSize)
	}
	block := i.blocks
	i.blocks += uint32(blocks)
	f.start = int64(block) * blockSize
	if f.count > 0 {
		last := i.extents.at(f.first + f.count - 1)
		if int64(last.chunk+last.count) == chunk {
			last.count++
			return nil
		}
	}
	if err := i.checkText(extentBytes); err != nil {
		return err
	}
	i.otherText += extentBytes
	i.extents.add(extent{chunk: uint32(chunk), block: block, count: 1})
	f.count++
	return nil
}

// Close ends the file.
func (f *File) Close() {
	i := f.image
	at := i.inode(f.inode)
	if f.size == 0 {
		return
	}
	at.content, at.extents, at.chunkBits = f.first, f.count, uint8(f.chunkBits)
	chunks := uint32((f.size + int64(1)<<f.chunkBits - 1) >> f.chunkBits)
	isWhole := f.count == 1 && i.extents.at(f.first).count == chunks
	if isWhole || f.count == 0 {
		// All of it is one chunk, or one hole.
		at.chunkBits = uint8(min(max(bits.Len64(uint64(f.size-1)), blockBits), maxChunkBits))
	}
	if isWhole {
		// The extent is the last one, and its bytes serve the next file.
		at.content, at.extents = i.extents.at(f.first).block, oneChunk
		i.extents.removeLast()
		i.otherText -= extentBytes
	}
}

// extendData gives the data file its whole size: the last file may end with a hole, or within a block.
func (i *Image) extendData() error { return i.data.Truncate(int64(i.blocks) * blockSize) }
