package unpack

import (
	"bytes"
	"fmt"
	"io"
)

// blockSize is the granularity of holes in sparse files in bytes. It is also the estimated disk space of a small file.
const blockSize = 4096

// copyContent copies the content of a file with size bytes. It leaves out blocks of zeros.
func (u *unpacker) copyContent(to io.WriterAt, size int64, content io.Reader) error {
	u.contentBytes += size
	if err := u.checkSize(); err != nil {
		return err
	}
	for offset := int64(0); offset < size; {
		n, err := io.ReadFull(content, u.buffer[:min(size-offset, copySize)])
		if err != nil {
			return fmt.Errorf("read the tar: %w", err)
		}
		for from := 0; from < n; {
			length, zero := zeroRun(u.buffer[from:n])
			if !zero {
				if err := u.reserve(int64(length)); err != nil {
					return err
				}
				if _, err := to.WriteAt(u.buffer[from:from+length], offset+int64(from)); err != nil {
					return err
				}
			}
			from += length
		}
		offset += int64(n)
	}
	return nil
}

// zeros is a block of a hole.
var zeros [blockSize]byte

// zeroRun returns the length in bytes of the longest prefix of data whose blocks are either all zero or all not zero. zero
// reports which. data must not be empty.
func zeroRun(data []byte) (length int, zero bool) {
	isZero := func(at int) bool {
		block := data[at:min(at+blockSize, len(data))]
		return bytes.Equal(block, zeros[:len(block)])
	}
	zero = isZero(0)
	for length = blockSize; length < len(data) && isZero(length) == zero; length += blockSize {
	}
	return min(length, len(data)), zero
}
