package unpack

import (
	"bytes"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// write copies a file's content. Zeros at the end, and blocks of zeros elsewhere, are left out.
func (u *unpacker) write(file *os.File, size int64, content io.Reader) error {
	u.content += size
	if u.limits.MaxBytes > 0 && u.content > u.limits.MaxBytes {
		return fmt.Errorf("%w: the layer's files have more than %d bytes (--max-layer-size)", errdefs.ErrResourceExhausted, u.limits.MaxBytes)
	}
	var offset, end int64
	for offset < size {
		n, err := io.ReadFull(content, u.buffer[:min(size-offset, copySize)])
		if err != nil {
			return fmt.Errorf("read the tar: %w", invalid(err))
		}
		for from := 0; from < n; {
			length, zero := run(u.buffer[from:n])
			if !zero {
				if err := u.room(int64(length)); err != nil {
					return err
				}
				if _, err := file.WriteAt(u.buffer[from:from+length], offset+int64(from)); err != nil {
					return err
				}
				end = offset + int64(from+length)
			}
			from += length
		}
		offset += int64(n)
	}
	if end < size {
		return file.Truncate(size)
	}
	return nil
}

var zeros [blockSize]byte

// run returns how many bytes at the beginning of the data are of one sort: blocks of zeros, or other blocks.
func run(data []byte) (length int, zero bool) {
	isZero := func(at int) bool {
		block := data[at:min(at+blockSize, len(data))]
		return bytes.Equal(block, zeros[:len(block)])
	}
	zero = isZero(0)
	for length = blockSize; length < len(data) && isZero(length) == zero; length += blockSize {
	}
	return min(length, len(data)), zero
}

// room accounts for bytes before they are written, and checks the disk at intervals.
func (u *unpacker) room(bytes int64) error {
	u.disk += bytes
	u.unchecked += bytes
	if u.unchecked < reserveStep || u.limits.MinFreePercent <= 0 {
		return nil
	}
	u.unchecked = 0
	return checkReserve(u.root, u.limits.MinFreePercent)
}

// checkReserve refuses to go on if less than percent of the disk is free.
func checkReserve(dir *os.File, percent int) error {
	usage, err := linux.FileSystemUsage(dir)
	if err != nil {
		return err
	}
	if usage.Bytes.Available*100 < usage.Bytes.Total*int64(percent) {
		return fmt.Errorf("%w: less than %d %% of the disk of %s are free, which stay free for the volumes (--min-free-disk-percent); make room there",
			errdefs.ErrResourceExhausted, percent, dir.Name())
	}
	return nil
}
