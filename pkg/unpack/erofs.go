package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/overlay-csi/overlay-csi/pkg/erofs"
)

// EROFS unpacks a tar into an EROFS image of two files: erofs.Mount shows what [Tar] makes of the same tar. metadata and data are the paths
// of the files, which must not exist. The rest is as with Tar. The caller removes the files after an error.
//
// An error wraps erofs.ErrCannotHold if the layer is one that a directory can hold and an image cannot.
//
// Other than in a tree, an implied directory has the time 0, and not that of unpacking, so that the same tar makes the same files.
func EROFS(ctx context.Context, from io.Reader, metadata, data, scratch string, limits Limits) (Result, error) {
	dataFile, err := createNew(data)
	if err != nil {
		return Result{}, err
	}
	defer dataFile.Close()
	metadataFile, err := createNew(metadata)
	if err != nil {
		return Result{}, err
	}
	defer metadataFile.Close()
	image := erofs.New(dataFile)
	result, err := unpackInto(ctx, imageTree{image}, dataFile, from, scratch, limits)
	if err != nil {
		return Result{}, err
	}
	metadataBytes, dataBytes, err := image.WriteMetadata(metadataFile)
	if err != nil {
		return Result{}, err
	}
	result.DiskBytes = metadataBytes + dataBytes
	return result, errors.Join(dataFile.Close(), metadataFile.Close())
}

func createNew(path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("prepare the layer's image: %w", err)
	}
	return file, nil
}

// imageTree is a tree in an EROFS image.
type imageTree struct{ image *erofs.Image }

func (t imageTree) root() dir { return imageNode{t.image, t.image.Root()} }

func (t imageTree) close() {}

func (t imageTree) open(path string, how openHow) (dir, error) {
	open := t.image.Open
	if how == openNoLinks {
		open = t.image.OpenNoLinks
	}
	opened, err := open(path)
	if err != nil {
		return nil, err
	}
	return imageNode{t.image, opened}, nil
}

// imageNode is a file in an EROFS image, or a directory.
type imageNode struct {
	image *erofs.Image
	inode erofs.Inode
}

func (n imageNode) chown(uid, gid uint32) error {
	n.image.Chown(n.inode, uid, gid)
	return nil
}

func (n imageNode) chmod(mode uint32) error { return n.image.Chmod(n.inode, mode) }

func (n imageNode) setXattr(name string, value []byte) error {
	return n.image.SetXattr(n.inode, name, value)
}

// setTimes sets the time of modification. EROFS has no other.
func (n imageNode) setTimes(_, modified time.Time) error {
	n.image.SetTime(n.inode, modified)
	return nil
}

func (n imageNode) close() {}

func (n imageNode) path() (string, error) { return n.image.Path(n.inode), nil }

func (n imageNode) getXattr(name string) ([]byte, error) { return n.image.GetXattr(n.inode, name) }

func (n imageNode) removeXattr(name string) error { return n.image.RemoveXattr(n.inode, name) }

func (n imageNode) stat(name string) (kind, error) {
	found, err := n.image.Lookup(n.inode, name)
	if err != nil {
		return isOther, err
	}
	stat := n.image.Stat(found)
	switch fileType := stat.Mode & syscall.S_IFMT; {
	case fileType == syscall.S_IFDIR:
		return isDirectory, nil
	case fileType == syscall.S_IFLNK:
		return isSymlink, nil
	case fileType == syscall.S_IFCHR && stat.Device == 0:
		return isWhiteout, nil
	}
	return isOther, nil
}

func (n imageNode) open(name string) (dir, error) {
	found, err := n.image.Lookup(n.inode, name)
	if err != nil {
		return nil, err
	}
	if n.image.Stat(found).Mode&syscall.S_IFMT != syscall.S_IFDIR {
		return nil, &os.PathError{Op: "open", Path: name, Err: syscall.ENOTDIR}
	}
	return imageNode{n.image, found}, nil
}

func (n imageNode) entry(name string) (node, error) {
	found, err := n.image.Lookup(n.inode, name)
	return imageNode{n.image, found}, err
}

func (n imageNode) mkdir(name string, mode uint32) error {
	_, err := n.image.Mkdir(n.inode, name, mode)
	return err
}

func (n imageNode) create(name string, size int64) (file, error) {
	made, err := n.image.Create(n.inode, name, 0o600, size)
	if err != nil {
		return nil, err
	}
	return imageFile{imageNode{n.image, made.Inode()}, made}, nil
}

func (n imageNode) symlink(target, name string) error {
	_, err := n.image.Symlink(target, n.inode, name)
	return err
}

func (n imageNode) mknod(name string, mode uint32, device uint64) error {
	_, err := n.image.Mknod(n.inode, name, mode, uint32(device))
	return err
}

func (n imageNode) link(from dir, target, name string) error {
	found, err := n.image.Lookup(from.(imageNode).inode, target)
	if err != nil {
		return err
	}
	return n.image.Link(found, n.inode, name)
}

func (n imageNode) remove(name string, _ kind) error { return n.image.Remove(n.inode, name) }

// imageFile is a regular file in an EROFS image.
type imageFile struct {
	imageNode
	file *erofs.File
}

func (f imageFile) WriteAt(data []byte, offset int64) (int, error) {
	return f.file.WriteAt(data, offset)
}

func (f imageFile) finish() error {
	f.file.Close()
	return nil
}
