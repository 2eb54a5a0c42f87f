package diff

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

const (
	// copySize is the size in bytes of one read of a file.
	copySize = 256 << 10
	// maxLinks is how many bytes of names of files with several links are in memory.
	maxLinks = 64 << 20
	// opaqueName is the name of the entry that hides what lower layers have in a directory.
	opaqueName = unpack.WhiteoutPrefix + ".wh..opq"
)

// WriteLayer writes the tar of the image layer that shows the view above the same layers. The files must not change while it runs.
//
// It returns ErrFailedPrecondition, with the name of the file, for what a layer cannot carry, and ErrResourceExhausted if the layer would
// be larger than tree.MaxBytes, or has more files with several links than it can remember.
func WriteLayer(ctx context.Context, tree Tree, to io.Writer) error {
	l := &layerWriter{ctx: ctx, tree: tree, tar: tar.NewWriter(to), links: map[linux.FileID]*link{}, buffer: make([]byte, copySize)}
	w := walker{tree: tree, ctx: ctx, visit: l.visit}
	if err := w.run(); err != nil {
		return err
	}
	return l.tar.Close()
}

// layerWriter writes entries to a tar.
type layerWriter struct {
	ctx  context.Context
	tree Tree
	tar  *tar.Writer
	// bytes are those of the files so far.
	bytes int64
	// links are the files of which other links may follow. linkBytes is about what they take in memory.
	links     map[linux.FileID]*link
	linkBytes int
	buffer    []byte
}

// link is a file that has several links. path is the first of them in the tar, and left the number of those that may follow.
type link struct {
	path string
	left uint64
}

func (l *layerWriter) visit(e entry) error {
	if e.path == "" {
		return pathTooLong(e)
	}
	if err := l.write(e); err != nil {
		return fmt.Errorf("write %s to the layer: %w", quote(e.path), err)
	}
	return nil
}

func (l *layerWriter) write(e entry) error {
	if strings.HasPrefix(e.name, unpack.WhiteoutPrefix) {
		return fmt.Errorf("%w: image layers mark what they delete by names that begin with %s; rename the file",
			errdefs.ErrFailedPrecondition, unpack.WhiteoutPrefix)
	}
	isSocket := e.stat.Mode&syscall.S_IFMT == syscall.S_IFSOCK
	if e.kind == Deleted || isSocket {
		// A socket cannot be in the layer. What it took the place of must not show.
		if e.hidden || !e.wasThere {
			return nil
		}
		return l.writeEmpty(strings.TrimSuffix(e.path, e.name) + unpack.WhiteoutPrefix + e.name)
	}
	header, err := l.header(e)
	if err != nil {
		return err
	}
	if first := l.linkTo(e); first != "" {
		header.Typeflag, header.Linkname, header.Size, header.PAXRecords = tar.TypeLink, first, 0, nil
	}
	if l.linkBytes > maxLinks {
		return fmt.Errorf("%w: there are too many files with several links to remember their names", errdefs.ErrResourceExhausted)
	}
	if header.Typeflag == tar.TypeReg {
		return l.writeFile(header, e)
	}
	if err := l.tar.WriteHeader(header); err != nil {
		return notInTar(err)
	}
	if e.opaque {
		return l.writeEmpty(join(e.path, opaqueName))
	}
	return nil
}

// writeEmpty writes a whiteout.
func (l *layerWriter) writeEmpty(path string) error {
	return notInTar(l.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}))
}

// notInTar marks an error of a header that a tar cannot carry.
func notInTar(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("%w: a tar cannot carry it: %w", errdefs.ErrFailedPrecondition, err)
	}
	return err
}

// header returns the header of an entry.
func (l *layerWriter) header(e entry) (*tar.Header, error) {
	uid, gid := e.stat.Uid, e.stat.Gid
	if l.tree.Owner != nil {
		uid, gid = l.tree.Owner(uid, gid)
	}
	header := &tar.Header{
		Name: e.path, Mode: int64(e.stat.Perm()), Uid: int(uid), Gid: int(gid), ModTime: e.stat.ModTime(), Format: tar.FormatPAX,
	}
	switch e.stat.Mode & syscall.S_IFMT {
	case syscall.S_IFDIR:
		header.Typeflag, header.Name = tar.TypeDir, e.path+"/"
	case syscall.S_IFREG:
		header.Typeflag, header.Size = tar.TypeReg, e.stat.Size
	case syscall.S_IFLNK:
		target, err := linux.Readlinkat(e.parent, e.name)
		if err != nil {
			return nil, err
		}
		header.Typeflag, header.Linkname = tar.TypeSymlink, target
	case syscall.S_IFIFO:
		header.Typeflag = tar.TypeFifo
	case syscall.S_IFCHR:
		header.Typeflag = tar.TypeChar
	case syscall.S_IFBLK:
		header.Typeflag = tar.TypeBlock
	default:
		return nil, fmt.Errorf("%w: it has the unknown type %o", errdefs.ErrFailedPrecondition, e.stat.Mode&syscall.S_IFMT)
	}
	if header.Typeflag == tar.TypeChar || header.Typeflag == tar.TypeBlock {
		major, minor := e.stat.Device()
		header.Devmajor, header.Devminor = int64(major), int64(minor)
	}
	return header, setXattrs(header, e)
}

// linkTo returns the path of an earlier entry of the same file, "" if there is none. It remembers a file that has several links.
func (l *layerWriter) linkTo(e entry) string {
	if e.stat.IsDir() || e.stat.Nlink < 2 {
		return ""
	}
	id := e.stat.ID()
	first := l.links[id]
	if first == nil {
		l.links[id] = &link{e.path, uint64(e.stat.Nlink) - 1}
		l.linkBytes += linkSize(e.path)
		return ""
	}
	if first.left--; first.left == 0 {
		delete(l.links, id)
		l.linkBytes -= linkSize(first.path)
	}
	return first.path
}

// linkSize is about what a link takes in memory.
func linkSize(path string) int { return len(path) + 96 }

// writeFile writes a regular file.
func (l *layerWriter) writeFile(header *tar.Header, e entry) error {
	if l.tree.MaxBytes > 0 && header.Size > l.tree.MaxBytes-l.bytes {
		return fmt.Errorf("%w: with its %d bytes, the files of the layer have more than %d; raise --max-layer-size, or delete what the "+
			"layer need not have", errdefs.ErrResourceExhausted, header.Size, l.tree.MaxBytes)
	}
	l.bytes += header.Size
	file, err := linux.Open(e.parent, e.name, os.O_RDONLY|linux.O_NOFOLLOW|linux.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	stat, err := linux.StatFile(file)
	if err != nil {
		return err
	}
	if !stat.IsRegular() || stat.Size != header.Size {
		return errChanged
	}
	if err := l.tar.WriteHeader(header); err != nil {
		return notInTar(err)
	}
	content := io.LimitReader(unpack.ContextReader(l.ctx, file), header.Size)
	n, err := io.CopyBuffer(onlyWriter{l.tar}, content, l.buffer)
	if err == nil && n < header.Size {
		err = errChanged
	}
	return err
}

// errChanged says that a file is not what it was when its header was written.
var errChanged = fmt.Errorf("%w: the file changed while it was read", errdefs.ErrUnavailable)

// onlyWriter hides the other methods of a writer.
type onlyWriter struct{ io.Writer }
