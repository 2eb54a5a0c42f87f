package linux

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"syscall"
)

// copyPart is what CopyFile copies between two looks at its context.
const copyPart = 8 << 20

// CopyFile copies the content of a file into an empty one, and leaves holes where the file has them. It moves the positions of both
// handles.
func CopyFile(ctx context.Context, from, to *os.File) error {
	return CopyFileUpTo(ctx, from, to, math.MaxInt64)
}

// CopyFileUpTo is CopyFile for a file that somebody may write to meanwhile. It returns EFBIG for more than that many bytes of data, and
// does not copy them: whoever fills holes before the copy, and makes others behind it, needs little room for a file of any size.
func CopyFileUpTo(ctx context.Context, from, to *os.File, most int64) error {
	stat, err := StatFile(from)
	if err != nil {
		return err
	}
	err = Data(from, func(offset, bytes int64) error {
		bytes = max(0, min(bytes, stat.Size-offset))
		if most -= bytes; most < 0 {
			return fmt.Errorf("copy %s: %w", from.Name(), syscall.EFBIG)
		}
		return copyRange(ctx, from, to, offset, bytes)
	})
	if err != nil {
		return err
	}
	return to.Truncate(stat.Size)
}

// copyRange copies bytes from one position to the same one.
func copyRange(ctx context.Context, from, to *os.File, start, bytes int64) error {
	if _, err := from.Seek(start, io.SeekStart); err != nil {
		return err
	}
	if _, err := to.Seek(start, io.SeekStart); err != nil {
		return err
	}
	for bytes > 0 {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n, err := io.CopyN(to, from, min(bytes, copyPart))
		if err != nil {
			return fmt.Errorf("copy %s: %w", from.Name(), err)
		}
		bytes -= n
	}
	return nil
}
