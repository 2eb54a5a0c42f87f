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
	"slices"
	"syscall"

	"github.com/containerd/errdefs"
)

const (
	// copySize is the size in bytes of one read from the tar.
	copySize = 256 << 10
	// maxTrailer is the maximum number of bytes after the end of a tar. Tars are padded to their blocking factor.
	maxTrailer = 16 << 20
	// maxNameInError is the maximum number of bytes of an entry's name in an error.
	maxNameInError = 256
)

// Result describes an unpacked tree.
type Result struct {
	// DiskBytes is an estimate of the disk space that the tree takes.
	DiskBytes int64
	// Entries is the number of entries in the tar.
	Entries int64
	// Opaque reports whether the tree hides all lower layers. overlayfs ignores the attribute on the root of a layer, so
	// the caller must leave out the lower layers itself.
	Opaque bool
	// Implied is the number of directories that the tree has without entries in the tar, except for the root (IsImplied). Their paths are
	// in the file ImpliedName in scratch, and one of them may be there twice. If they are more than can be listed, it is a lower bound.
	Implied int
}

// Tar unpacks a tar into the directory tree. It reads the tar to its end. The parent of tree must exist, and tree must not.
// Tar writes temporary files to scratch, which is an empty directory on the same file system. The caller removes scratch
// afterwards, and tree after an error.
//
// Errors wrap errdefs.ErrInvalidArgument if the tar is invalid, and errdefs.ErrResourceExhausted if it exceeds limits.
func Tar(ctx context.Context, from io.Reader, tree, scratch string, limits Limits) (Result, error) {
	made, err := makeDiskTree(tree, scratch)
	if err != nil {
		return Result{}, fmt.Errorf("prepare the layer's directory: %w", err)
	}
	defer made.close()
	return unpackInto(ctx, made, made.top, from, scratch, limits)
}

// unpackInto unpacks a tar into a tree, whose files take space of the disk of an open file.
func unpackInto(ctx context.Context, tree tree, disk *os.File, from io.Reader, scratch string, limits Limits) (Result, error) {
	u, err := newUnpacker(tree, disk, scratch, limits)
	if err != nil {
		return Result{}, fmt.Errorf("prepare to unpack the layer: %w", err)
	}
	defer u.close()
	if err := u.unpack(ctx, from); err != nil {
		return Result{}, err
	}
	if err := drain(from); err != nil {
		return Result{}, err
	}
	implied, err := u.listImplied(ctx)
	if err != nil {
		return Result{}, err
	}
	opaque, err := isOpaque(u.root.getXattr)
	return Result{DiskBytes: u.diskBytes, Entries: u.entries, Opaque: opaque, Implied: implied}, err
}

// unpacker is the state of one call of Tar.
type unpacker struct {
	limits Limits
	tree   tree
	root   dir
	// disk is a file on the disk of the tree.
	disk    *os.File
	scratch string

	entries      int64
	contentBytes int64
	// attributeBytes are those of extended attributes, names and values.
	attributeBytes int64
	// tarBytes were read of the tar, contentBytes and holes aside those of headers.
	tarBytes  int64
	diskBytes int64
	// uncheckedBytes were accounted for since the last check of the free space.
	uncheckedBytes int64

	// parents caches the open directories of entries by path.
	parents map[string]dir
	// stale is true after an entry replaced a directory or a link. Paths in parents may have led through it.
	stale bool
	// times is a file with the times of the directories, in tar order. It is not in memory because a layer may have
	// millions of directories.
	times        *os.File
	timesOut     *bufio.Writer
	timesEncoder *gob.Encoder
	// made is a file with the paths of the directories that were made without an entry. hasImplied reports whether there was one.
	made       *os.File
	madeOut    *bufio.Writer
	hasImplied bool
	buffer     []byte
}

func newUnpacker(tree tree, disk *os.File, scratch string, limits Limits) (*unpacker, error) {
	times, timesOut, failedTimes := createIn(scratch, "times")
	made, madeOut, failedMade := createIn(scratch, madeName)
	u := &unpacker{
		limits: limits, tree: tree, root: tree.root(), disk: disk, scratch: scratch,
		times: times, timesOut: timesOut, timesEncoder: gob.NewEncoder(timesOut), made: made, madeOut: madeOut,
		parents: map[string]dir{}, buffer: make([]byte, copySize), uncheckedBytes: checkInterval,
	}
	if err := errors.Join(failedTimes, failedMade, setImplied(u.root)); err != nil {
		u.close()
		return nil, err
	}
	return u, nil
}

func (u *unpacker) close() {
	u.closeParents()
	u.times.Close()
	u.made.Close()
}

func (u *unpacker) unpack(ctx context.Context, from io.Reader) error {
	source := &tarSource{ctx: ctx, u: u, from: from}
	reader := tarReader{tar.NewReader(source), source}
	content := ContextReader(ctx, reader)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		header, err := reader.tar.Next()
		if err == io.EOF {
			return u.setDirTimes()
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("read the tar after %d entries: %w", u.entries, reader.markInvalid(err))
		}
		if err := u.unpackEntry(header, content); err != nil {
			if source.err == nil {
				err = markEntryInvalid(err)
			}
			return fmt.Errorf("unpack %q: %w", shorten(header.Name), err)
		}
	}
}

// shorten returns the beginning of a name for an error.
func shorten(name string) string {
	if len(name) > maxNameInError {
		return name[:maxNameInError] + "…"
	}
	return name
}

// ContextReader returns a reader that reads from until ctx is done, and then returns the cause. The holes of a sparse file, which no source
// is read for, can be terabytes, and so can what a few bytes decompress to.
func ContextReader(ctx context.Context, from io.Reader) io.Reader { return contextReader{ctx, from} }

type contextReader struct {
	ctx  context.Context
	from io.Reader
}

func (r contextReader) Read(data []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.from.Read(data)
}

// tarSource reads a tar until ctx is done or its headers are larger than the layer may be. archive/tar takes any number of extended
// headers before it returns an entry.
type tarSource struct {
	ctx  context.Context
	u    *unpacker
	from io.Reader
	// err is why the tar cannot be read.
	err error
}

func (s *tarSource) Read(data []byte) (int, error) {
	limit := s.u.limits.MaxBytes
	switch {
	case s.ctx.Err() != nil:
		s.err = context.Cause(s.ctx)
	case limit > 0 && s.u.tarBytes-s.u.contentBytes > limit:
		s.err = fmt.Errorf("%w: the headers of the layer have more than %d bytes; raise --max-layer-size", errdefs.ErrResourceExhausted, limit)
	}
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.from.Read(data)
	s.u.tarBytes += int64(n)
	// An error that wraps io.EOF, such as one of a connection, is not the end.
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// drain reads the padding after the end of a tar. The digest of a tar includes its padding.
func drain(from io.Reader) error {
	n, err := io.Copy(io.Discard, io.LimitReader(from, maxTrailer+1))
	if err == nil && n > maxTrailer {
		return fmt.Errorf("%w: more than %d bytes follow the end of the tar", errdefs.ErrInvalidArgument, maxTrailer)
	}
	return err
}

// tarReader reads a tar.
type tarReader struct {
	tar    *tar.Reader
	source *tarSource
}

func (r tarReader) Read(data []byte) (int, error) {
	n, err := r.tar.Read(data)
	return n, r.markInvalid(err)
}

// markInvalid wraps errdefs.ErrInvalidArgument around an error. If the source could be read, the reason is what it has.
func (r tarReader) markInvalid(err error) error {
	if err == nil || errors.Is(err, io.EOF) || r.source.err != nil {
		return err
	}
	return fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
}

// entryErrors are errors of system calls whose reason is what an entry asks for, and not the machine.
var entryErrors = []error{
	syscall.ENAMETOOLONG, syscall.ELOOP, syscall.ENOTDIR, syscall.ENOENT, syscall.EINVAL, syscall.ERANGE, syscall.E2BIG, syscall.EFBIG,
	syscall.EMLINK,
}

// markEntryInvalid wraps errdefs.ErrInvalidArgument around an error of an entry that Linux cannot have. It returns any other error
// unchanged.
func markEntryInvalid(err error) error {
	isOfEntry := slices.ContainsFunc(entryErrors, func(target error) bool { return errors.Is(err, target) })
	if !isOfEntry || errdefs.IsInvalidArgument(err) {
		return err
	}
	return fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
}
