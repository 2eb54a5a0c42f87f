package unpack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// A layer may have a file without having an entry for its directory. The directory is then an implied one: the attributes that it gets
// here are made up, and those of the same directory in a lower layer are meant.
const (
	// impliedXattr marks an implied directory. Views do not show attributes of overlayfs, and the kernel does not know this one. A tar
	// cannot set it (ignoredXattrs).
	impliedXattr = "trusted.overlay.implied"
	// MaxImplied is the maximum number of implied directories of a layer.
	MaxImplied = 1 << 16
	// MaxImpliedBytes is the maximum total length of their paths in bytes, each with a byte at its end.
	MaxImpliedBytes = 8 << 20
	// ImpliedName is the file in scratch with the paths of the implied directories (Result.Implied). Each ends with a zero byte. They are
	// not in memory because a layer chooses how many there are. If there are too many to list, the file has tooMany in their place.
	ImpliedName = "implied"
	// tooMany is an empty path.
	tooMany = "\x00"
	// madeName is the file in scratch with the paths of all directories that were made without an entry, in the same format.
	madeName = "made"
)

// errTooMany is the error for more implied directories than a layer, or an image, may have where they matter.
var errTooMany = fmt.Errorf("%w: the layer has more than %d directories without entries, or their paths have more than %d bytes; "+
	"rebuild the image so that the layer has an entry for each directory", errdefs.ErrResourceExhausted, MaxImplied, MaxImpliedBytes)

// ReadImplied returns the paths in a file that Tar wrote as ImpliedName. It returns errdefs.ErrResourceExhausted if there are too many.
func ReadImplied(path string) ([]string, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	var content strings.Builder
	content.Grow(int(min(info.Size(), MaxImpliedBytes)))
	if _, err := io.Copy(&content, io.LimitReader(file, MaxImpliedBytes)); err != nil {
		return nil, err
	}
	if content.String() == tooMany {
		return nil, errTooMany
	}
	names := strings.Split(content.String(), "\x00")
	// Nothing follows the last zero byte.
	return names[:len(names)-1], nil
}

// IsImplied reports whether a directory of a tree is an implied one. dir may be an O_PATH handle.
func IsImplied(dir *os.File) (bool, error) {
	return isImplied(func(name string) ([]byte, error) { return linux.GetXattr(dir, name) })
}

func isImplied(getXattr func(name string) ([]byte, error)) (bool, error) {
	_, err := getXattr(impliedXattr)
	if errors.Is(err, syscall.ENODATA) || errors.Is(err, syscall.ENOTSUP) {
		return false, nil
	}
	return err == nil, err
}

// setImplied marks a directory. On a file system without such attributes, directories keep what was made up.
func setImplied(of node) error {
	if err := of.setXattr(impliedXattr, nil); !errors.Is(err, syscall.ENOTSUP) {
		return err
	}
	return nil
}

// clearImplied removes the mark of a directory, if it has one.
func clearImplied(of dir) error {
	err := of.removeXattr(impliedXattr)
	if errors.Is(err, syscall.ENODATA) || errors.Is(err, syscall.ENOTSUP) {
		return nil
	}
	return err
}

// makeImplied makes the directory base, and returns it open.
func (u *unpacker) makeImplied(in dir, base string) (dir, error) {
	if err := u.countEntry(); err != nil {
		return nil, err
	}
	err := in.mkdir(base, 0o755)
	if errors.Is(err, syscall.EEXIST) {
		return nil, fmt.Errorf("%w: a link on the path leads nowhere", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, err
	}
	made, err := in.open(base)
	if err != nil {
		return nil, err
	}
	if err := u.addImplied(made); err != nil {
		made.close()
		return nil, err
	}
	return made, nil
}

// addImplied marks a directory, and lists its path, which has no links.
func (u *unpacker) addImplied(made dir) error {
	u.hasImplied = true
	if err := setImplied(made); err != nil {
		return err
	}
	name, err := made.path()
	if errors.Is(err, syscall.ENAMETOOLONG) {
		// The path in the layer has almost PATH_MAX bytes. No image that is in earnest has one.
		return nil
	}
	if err != nil {
		return err
	}
	u.attributeBytes += int64(len(name))
	if err := u.checkSize(); err != nil {
		return err
	}
	if err := u.reserve(blockSize + int64(len(name))); err != nil {
		return err
	}
	_, err = u.madeOut.WriteString(name + "\x00")
	return err
}

// listImplied lists the directories that no later entry gave attributes to, or replaced. It returns their number. A path may occur twice.
// More than a list may have are no error: they matter only above other layers.
func (u *unpacker) listImplied(ctx context.Context) (int, error) {
	file, out, err := createIn(u.scratch, ImpliedName)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	count, err := u.writeImplied(ctx, out)
	err = errors.Join(err, out.Flush())
	if errors.Is(err, errTooMany) {
		err = os.WriteFile(file.Name(), []byte(tooMany), 0o600)
	}
	return count, err
}

func (u *unpacker) writeImplied(ctx context.Context, out *bufio.Writer) (count int, _ error) {
	if err := u.madeOut.Flush(); err != nil {
		return 0, err
	}
	if _, err := u.made.Seek(0, io.SeekStart); err != nil {
		return 0, err
	}
	size := 0
	for lines := bufio.NewReader(u.made); ; {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		line, err := lines.ReadString(0)
		if errors.Is(err, io.EOF) {
			return count, nil
		}
		if err != nil {
			return 0, err
		}
		name := line[:len(line)-1]
		isImplied, err := u.isStillImplied(name)
		if err != nil {
			return 0, fmt.Errorf("look at directory %q: %w", shorten(name), err)
		}
		if !isImplied {
			continue
		}
		if _, err := out.WriteString(line); err != nil {
			return 0, err
		}
		count++
		size += len(line)
		if count > MaxImplied || size > MaxImpliedBytes {
			return count, errTooMany
		}
	}
}

func (u *unpacker) isStillImplied(name string) (bool, error) {
	dir, err := u.tree.open(name, openNoLinks)
	if isAbsent(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer dir.close()
	return isImplied(dir.getXattr)
}

// createIn creates a file of the unpacker in scratch.
func createIn(scratch, name string) (*os.File, *bufio.Writer, error) {
	file, err := os.OpenFile(filepath.Join(scratch, name), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	return file, bufio.NewWriter(file), err
}
