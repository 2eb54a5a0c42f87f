package unpack

import (
	"bytes"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// write copies a file's content. Zeros at the end, and blocks of zeros elsewhere, are left out.
func (u *unpacker) write(fd int, size int64, content io.Reader) error {
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
				if _, err := pwrite(fd, u.buffer[from:from+length], offset+int64(from)); err != nil {
					return fmt.Errorf("write: %w", err)
				}
				end = offset + int64(from+length)
			}
			from += length
		}
		offset += int64(n)
	}
	if end < size {
		if err := unix.Ftruncate(fd, size); err != nil {
			return fmt.Errorf("ftruncate: %w", err)
		}
	}
	return nil
}

var zeros [blockSize]byte

// run is how many bytes at the beginning of the data are alike: whole blocks of zeros, or blocks that are not.
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

func pwrite(fd int, data []byte, offset int64) (int, error) {
	written := 0
	for written < len(data) {
		n, err := unix.Pwrite(fd, data[written:], offset+int64(written))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return written, err
		}
		written += n
	}
	return written, nil
}

// room accounts for bytes that are going to be written, and now and then sees whether the disk still has its reserve.
func (u *unpacker) room(bytes int64) error {
	u.disk += bytes
	u.unchecked += bytes
	if u.unchecked < reserveStep || u.limits.MinFreePercent <= 0 {
		return nil
	}
	u.unchecked = 0
	return checkReserve(u.root, u.limits.MinFreePercent)
}

// checkReserve refuses to take more of a disk than what leaves the reserve.
func checkReserve(dir *os.File, percent int) error {
	var stat unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &stat); err != nil {
		return fmt.Errorf("fstatfs %s: %w", dir.Name(), err)
	}
	if stat.Bavail*100 < stat.Blocks*uint64(percent) {
		return fmt.Errorf("%[1]w: less than %[3]d %% of the disk of %[2]s are free, which stay free for the volumes (--min-free-disk-percent); make room there", errdefs.ErrResourceExhausted, dir.Name(), percent)
	}
	return nil
}
