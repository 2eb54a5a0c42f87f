package erofs

import (
	"encoding/binary"
	"hash/maphash"
)

// table is a list that grows without being copied. Its elements have no pointers, so that the garbage collector does not scan it.
type table[T any] struct {
	chunks [][]T
	count  uint32
}

const tableChunk = 1 << 12

// add appends an element, and returns its index.
func (t *table[T]) add(element T) uint32 {
	if t.count%tableChunk == 0 {
		t.chunks = append(t.chunks, make([]T, 0, tableChunk))
	}
	last := &t.chunks[len(t.chunks)-1]
	*last = append(*last, element)
	t.count++
	return t.count - 1
}

// removeLast removes the element that was added last.
func (t *table[T]) removeLast() {
	t.count--
	last := &t.chunks[len(t.chunks)-1]
	if *last = (*last)[:len(*last)-1]; len(*last) == 0 {
		t.chunks = t.chunks[:len(t.chunks)-1]
	}
}

// at returns the element at an index. The pointer stays valid.
func (t *table[T]) at(index uint32) *T { return &t.chunks[index/tableChunk][index%tableChunk] }

// texts is a table of strings of at most 65535 bytes.
type texts struct {
	chunks [][]byte
	bytes  int
}

const textChunk = 1 << 20

// add appends a string, and returns its index.
func (t *texts) add(text string) uint32 {
	size := 2 + len(text)
	if len(t.chunks) == 0 || len(t.chunks[len(t.chunks)-1])+size > textChunk {
		t.chunks = append(t.chunks, make([]byte, 0, textChunk))
	}
	last := &t.chunks[len(t.chunks)-1]
	index := (len(t.chunks)-1)*textChunk + len(*last)
	*last = binary.LittleEndian.AppendUint16(*last, uint16(len(text)))
	*last = append(*last, text...)
	t.bytes += size
	return uint32(index)
}

// at returns the bytes of the string at an index, which are not to be changed.
func (t *texts) at(index uint32) []byte {
	from := t.chunks[index/textChunk][index%textChunk:]
	return from[2 : 2+binary.LittleEndian.Uint16(from)]
}

// nameIndex finds the entry of a directory by its name: a hash table with open addressing, of the indexes of entries.
type nameIndex struct {
	seed maphash.Seed
	// slots has an entry's index plus slotUsed, slotFree, or slotRemoved.
	slots []uint32
	// taken counts the slots that are not free, live those with an entry.
	taken, live int
}

const (
	slotFree    = 0
	slotRemoved = 1
	slotUsed    = 2
)

func newNameIndex() nameIndex {
	return nameIndex{seed: maphash.MakeSeed(), slots: make([]uint32, 1<<10)}
}

func (n *nameIndex) hash(dir Inode, name []byte) int {
	// The multiplier spreads the directory over all bits (golden ratio of 2^64).
	return int((maphash.Bytes(n.seed, name) ^ uint64(dir)*0x9e3779b97f4a7c15) & uint64(len(n.slots)-1))
}

// find returns the slot whose entry is the one that is looked for, or a free slot and false.
func (n *nameIndex) find(dir Inode, name []byte, isIt func(entry uint32) bool) (slot int, found bool) {
	for slot = n.hash(dir, name); ; slot = (slot + 1) & (len(n.slots) - 1) {
		switch at := n.slots[slot]; {
		case at == slotFree:
			return slot, false
		case at >= slotUsed && isIt(at-slotUsed):
			return slot, true
		}
	}
}

// remove empties a slot.
func (n *nameIndex) remove(slot int) {
	n.slots[slot] = slotRemoved
	n.live--
}

// add puts an entry into a slot that is free. It makes the table larger if it is three quarters full; keyOf is then asked for each entry.
func (n *nameIndex) add(slot int, entry uint32, keyOf func(entry uint32) (Inode, []byte)) {
	n.slots[slot] = entry + slotUsed
	n.taken++
	n.live++
	if n.taken*4 < len(n.slots)*3 {
		return
	}
	old := n.slots
	size := len(old)
	if n.live*2 >= size {
		size *= 2
	}
	n.slots, n.taken = make([]uint32, size), n.live
	for _, at := range old {
		if at < slotUsed {
			continue
		}
		dir, name := keyOf(at - slotUsed)
		slot, _ := n.find(dir, name, func(uint32) bool { return false })
		n.slots[slot] = at
	}
}
