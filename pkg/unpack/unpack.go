package unpack

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/cyphar/filepath-securejoin/pathrs-lite"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

const (
	// blockSize is the granularity of holes in sparse files, and about what a small file takes on a disk.
	blockSize = 4096
	// copySize is how much of a file is read at once.
	copySize = 256 << 10
	// maxPath is the longest name in bytes (PATH_MAX).
	maxPath = 4096
	// maxParents is how many directories are kept open between entries.
	maxParents = 64
	// reserveStep is how many bytes are written between two looks at the free space.
	reserveStep = 64 << 20
	// maxTrailer is how much may follow the end of a tar, which is padded to its blocking factor.
	maxTrailer = 16 << 20
)

// Limits bound what one layer may take. Zero is no limit.
type Limits struct {
	// MaxBytes is the size of the content of a layer's files, holes included.
	MaxBytes int64
	// MaxEntries is the number of files, directories and links of a layer.
	MaxEntries int64
	// MinFreePercent of the disk stay free: unpacking fails before it takes more.
	MinFreePercent int
}

// Result describes an unpacked tree.
type Result struct {
	// DiskBytes is about what the tree takes on the disk, Entries the number of tar entries.
	DiskBytes, Entries int64
	// Opaque reports that the tree hides all lower layers. overlayfs does not look at the attribute of a layer's root, so
	// whoever stacks layers has to leave out those below.
	Opaque bool
}

// Tar unpacks a tar, and reads it to its end. It makes the directory tree, whose parent exists. In scratch, an existing
// empty directory of the same file system, it puts what it needs only while it works; the caller deletes scratch, and the
// tree after an error.
func Tar(ctx context.Context, from io.Reader, tree, scratch string, limits Limits) (Result, error) {
	u, err := newUnpacker(tree, scratch, limits)
	if err != nil {
		return Result{}, fmt.Errorf("prepare the layer's directory: %w", err)
	}
	defer u.close()
	if err := u.unpack(ctx, from); err != nil {
		return Result{}, err
	}
	if err := drain(from); err != nil {
		return Result{}, err
	}
	opaque, err := IsOpaque(u.root)
	return Result{DiskBytes: u.disk, Entries: u.entries, Opaque: opaque}, err
}

// unpacker is the state of one call of Tar.
type unpacker struct {
	limits Limits
	// root is the open tree.
	root    *os.File
	scratch string

	entries, content, disk, unchecked int64
	parents                           map[string]*os.File
	// stale is set when an entry replaced a directory or a link that a path in parents may have led through.
	stale bool
	// times has the directories' times in the order in which they are set: on disk, since a layer may have millions.
	times        *os.File
	timesOut     *bufio.Writer
	timesEncoder *gob.Encoder
	replaced     int
	buffer       []byte
}

func newUnpacker(tree, scratch string, limits Limits) (*unpacker, error) {
	if err := os.Mkdir(tree, 0o755); err != nil {
		return nil, err
	}
	root, err := os.Open(tree)
	if err != nil {
		return nil, err
	}
	times, err := os.OpenFile(filepath.Join(scratch, "times"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		root.Close()
		return nil, err
	}
	timesOut := bufio.NewWriter(times)
	return &unpacker{
		limits: limits, root: root, scratch: scratch, times: times, timesOut: timesOut, timesEncoder: gob.NewEncoder(timesOut),
		parents: map[string]*os.File{}, buffer: make([]byte, copySize), unchecked: reserveStep,
	}, nil
}

func (u *unpacker) close() {
	u.forgetParents()
	u.times.Close()
	u.root.Close()
}

func (u *unpacker) unpack(ctx context.Context, from io.Reader) error {
	reader := tar.NewReader(from)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		header, err := reader.Next()
		if err == io.EOF {
			return u.setDirTimes()
		}
		if err != nil {
			return fmt.Errorf("read the tar after %d entries: %w", u.entries, invalid(err))
		}
		if err := u.entry(header, reader); err != nil {
			name := header.Name
			if len(name) > 256 {
				name = name[:256] + "…"
			}
			return fmt.Errorf("unpack %q: %w", name, err)
		}
	}
}

// drain reads the padding behind the end of a tar. Whoever hashes the tar needs it too.
func drain(from io.Reader) error {
	n, err := io.Copy(io.Discard, io.LimitReader(from, maxTrailer+1))
	if err == nil && n > maxTrailer {
		return fmt.Errorf("%w: more than %d bytes follow the end of the tar", errdefs.ErrInvalidArgument, maxTrailer)
	}
	return err
}

// invalid marks what is wrong with the tar itself.
func invalid(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	return err
}

func (u *unpacker) entry(header *tar.Header, content io.Reader) error {
	if u.stale {
		u.forgetParents()
	}
	u.entries++
	if u.limits.MaxEntries > 0 && u.entries > u.limits.MaxEntries {
		return fmt.Errorf("%w: the layer has more than %d entries (--max-layer-entries)", errdefs.ErrResourceExhausted, u.limits.MaxEntries)
	}
	if err := u.room(blockSize); err != nil {
		return err
	}
	if len(header.Name) > maxPath || len(header.Linkname) > maxPath {
		return fmt.Errorf("%w: a path of more than %d bytes", errdefs.ErrInvalidArgument, maxPath)
	}
	// As seen from the root of the image: /../x is /x.
	name := strings.TrimPrefix(path.Clean("/"+header.Name), "/")
	if name == "" {
		if header.Typeflag != tar.TypeDir {
			return fmt.Errorf("%w: the root of a layer is a directory", errdefs.ErrInvalidArgument)
		}
		return u.setDirAttributes(u.root, name, header)
	}
	dirName, base := path.Split(name)
	dir, err := u.parent(path.Clean("/" + dirName))
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, WhiteoutPrefix) {
		return u.whiteout(dir, base)
	}
	if header.Typeflag == tar.TypeDir {
		return u.directory(dir, base, name, header)
	}
	if err := u.clear(dir, base); err != nil {
		return err
	}
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return u.file(dir, base, header, content)
	case tar.TypeLink:
		return u.hardLink(dir, base, header)
	case tar.TypeSymlink:
		if err := linux.Symlinkat(header.Linkname, dir, base); err != nil {
			return err
		}
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if isWhiteout(header.Typeflag, header.Devmajor, header.Devminor) {
			// To overlayfs it would be a whiteout, which an image says in another way.
			return nil
		}
		device := linux.Mkdev(uint32(header.Devmajor), uint32(header.Devminor))
		if err := linux.Mknodat(dir, base, deviceTypes[header.Typeflag]|0o600, device); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%w: a tar entry of type %q", errdefs.ErrInvalidArgument, header.Typeflag)
	}
	return setAttributesAt(dir, base, header)
}

var deviceTypes = map[byte]uint32{tar.TypeChar: syscall.S_IFCHR, tar.TypeBlock: syscall.S_IFBLK, tar.TypeFifo: syscall.S_IFIFO}

// parent opens the directory of an entry, and makes what is missing of it. Links on the way are followed within the tree.
func (u *unpacker) parent(name string) (*os.File, error) {
	if name == "/" {
		return u.root, nil
	}
	if dir, ok := u.parents[name]; ok {
		return dir, nil
	}
	dir, err := pathrs.MkdirAllHandle(u.root, name, 0o755)
	if err != nil {
		return nil, fmt.Errorf("%w: the directory %s: %w", errdefs.ErrInvalidArgument, name, err)
	}
	if len(u.parents) >= maxParents {
		u.forgetParents()
	}
	u.parents[name] = dir
	return dir, nil
}

func (u *unpacker) forgetParents() {
	for _, dir := range u.parents {
		dir.Close()
	}
	clear(u.parents)
	u.stale = false
}

// clear removes what an earlier entry of the same name made. A directory is moved to scratch.
func (u *unpacker) clear(dir *os.File, base string) error {
	stat, err := linux.Fstatat(dir, base)
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	if !stat.IsDir() {
		u.stale = stat.IsSymlink()
		return linux.Unlinkat(dir, base)
	}
	u.stale = true
	u.replaced++
	old := filepath.Join(u.scratch, "replaced-"+strconv.Itoa(u.replaced))
	return linux.Renameat(dir, base, nil, old, 0)
}

// file makes a regular file. Runs of zeros become holes: many images have files that were sparse where they were made.
func (u *unpacker) file(dir *os.File, base string, header *tar.Header, content io.Reader) error {
	file, err := linux.OpenFile(dir, base, os.O_WRONLY|os.O_CREATE|os.O_EXCL|linux.O_NOFOLLOW, 0o600, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := u.write(file, header.Size, content); err != nil {
		return err
	}
	if err := setAttributes(file, header); err != nil {
		return err
	}
	accessed, modified := timesOf(header)
	return linux.Futimens(file, accessed, modified)
}

// directory makes a directory, or takes the one that an earlier entry made.
func (u *unpacker) directory(dir *os.File, base, name string, header *tar.Header) error {
	err := linux.Mkdirat(dir, base, 0o700)
	hidden := false
	if errors.Is(err, syscall.EEXIST) {
		var stat linux.Stat
		if stat, err = linux.Fstatat(dir, base); err != nil {
			return err
		}
		if !stat.IsDir() {
			// A whiteout of the same name hides the entries of lower layers. A file does so too, but it is replaced.
			hidden = stat.IsWhiteout()
			if err := u.clear(dir, base); err != nil {
				return err
			}
			err = linux.Mkdirat(dir, base, 0o700)
		}
	}
	if err != nil {
		return err
	}
	made, err := openDir(dir, base)
	if err != nil {
		return err
	}
	defer made.Close()
	if hidden {
		if err := setOpaque(made); err != nil {
			return err
		}
	}
	return u.setDirAttributes(made, name, header)
}

func openDir(dir *os.File, base string) (*os.File, error) {
	return linux.Open(dir, base, os.O_RDONLY|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
}

func (u *unpacker) setDirAttributes(dir *os.File, name string, header *tar.Header) error {
	if err := setAttributes(dir, header); err != nil {
		return err
	}
	return u.timesEncoder.Encode(dirTime{name, header.ModTime.Unix(), header.ModTime.Nanosecond()})
}

// hardLink links to a file of the same layer.
func (u *unpacker) hardLink(dir *os.File, base string, header *tar.Header) error {
	targetDir, target := path.Split(path.Clean("/" + header.Linkname))
	if target == "" {
		return fmt.Errorf("%w: a hard link to the root", errdefs.ErrInvalidArgument)
	}
	from, err := pathrs.OpenatInRoot(u.root, targetDir)
	if err != nil {
		return fmt.Errorf("%w: the hard link's target %q: %w", errdefs.ErrInvalidArgument, header.Linkname, err)
	}
	defer from.Close()
	stat, err := linux.Fstatat(from, target)
	if err != nil {
		return fmt.Errorf("%w: the hard link's target %q: %w", errdefs.ErrInvalidArgument, header.Linkname, err)
	}
	if stat.IsWhiteout() {
		return fmt.Errorf("%w: the hard link's target %q was removed by the layer", errdefs.ErrInvalidArgument, header.Linkname)
	}
	return linux.Linkat(from, target, dir, base)
}

// setAttributes sets owner, mode and extended attributes of an open file or directory, in this order: a new owner takes
// away set-user-ID and file capabilities.
func setAttributes(file *os.File, header *tar.Header) error {
	if err := linux.Fchownat(file, "", uint32(header.Uid), uint32(header.Gid)); err != nil {
		return err
	}
	if err := linux.Fchmodat(file, "", modeOf(header)); err != nil {
		return err
	}
	return setXattrs(header, func(name string, value []byte) error { return linux.SetXattr(file, name, value) })
}

// setAttributesAt sets owner, mode, extended attributes and times of an entry that is neither a file nor a directory. The
// entry was just made.
func setAttributesAt(dir *os.File, base string, header *tar.Header) error {
	if err := linux.Fchownat(dir, base, uint32(header.Uid), uint32(header.Gid)); err != nil {
		return err
	}
	if header.Typeflag != tar.TypeSymlink {
		if err := linux.Fchmodat(dir, base, modeOf(header)); err != nil {
			return err
		}
	}
	if err := setXattrs(header, func(name string, value []byte) error { return linux.SetXattrAt(dir, base, name, value) }); err != nil {
		return err
	}
	accessed, modified := timesOf(header)
	return linux.Utimensat(dir, base, accessed, modified)
}

// modeOf returns the mode's bits, with set-user-ID, set-group-ID and sticky.
func modeOf(header *tar.Header) uint32 { return uint32(header.Mode) & 0o7777 }
