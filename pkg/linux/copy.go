package linux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// CloneFile has an empty file share the blocks of another one until either is written to (ioctl_ficlone(2)). The error is EOPNOTSUPP,
// EINVAL, ENOTTY or EXDEV where the file system cannot do that.
func CloneFile(from, to *os.File) error {
	return call("FICLONE", to, func(fd int) error { return unix.IoctlFileClone(fd, int(from.Fd())) })
}

// copyPart is what CopyFile copies between two looks at its context.
const copyPart = 8 << 20

// CopyFile copies the content of a file into an empty one, and leaves holes where the file has them (lseek(2), SEEK_DATA). It moves the
// positions of both handles.
func CopyFile(ctx context.Context, from, to *os.File) error {
	stat, err := StatFile(from)
	if err != nil {
		return err
	}
	for next := int64(0); next < stat.Size; {
		data, err := from.Seek(next, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return err
		}
		hole, err := from.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := copyRange(ctx, from, to, data, min(hole, stat.Size)); err != nil {
			return err
		}
		next = hole
	}
	return to.Truncate(stat.Size)
}

// copyRange copies the bytes from one position to another.
func copyRange(ctx context.Context, from, to *os.File, start, end int64) error {
	if _, err := from.Seek(start, io.SeekStart); err != nil {
		return err
	}
	if _, err := to.Seek(start, io.SeekStart); err != nil {
		return err
	}
	for start < end {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n, err := io.CopyN(to, from, min(end-start, copyPart))
		if err != nil {
			return fmt.Errorf("copy %s: %w", from.Name(), err)
		}
		start += n
	}
	return nil
}
