package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/gunzip"
	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/store/access"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// maxZstdWindow is the largest window that pkg/image takes.
const maxZstdWindow = "32 MiB"

// builder makes layers from blobs.
type builder struct {
	layout
	catalogue *catalogue
	limits    unpack.Limits
	syncer    *syncer
	// gunzip decompresses gzip in another process. It may be nil.
	gunzip image.Gunzip
}

// blobOpener opens a blob at its first byte.
type blobOpener func() (io.ReadCloser, error)

// build unpacks a blob in dir, verifies it, commits the layer to the store, and acquires a reference on it. The caller removes dir
// after an error. holders returns who may have the layer, once its content was read.
//
// If the layer is present, whoever describes it has not shown yet that he has it. build then only verifies the blob.
//
// A blob that another process refuses to decompress is decompressed again here: what is wrong with it must not depend on the node.
func (b *builder) build(
	ctx context.Context, dir *workDir, blob image.LayerBlob, open blobOpener, holders func() []access.ID,
) (Layer, error) {
	layer, err := b.buildWith(ctx, dir, blob, open, b.gunzip, holders)
	if !errors.Is(err, gunzip.ErrRefused) || ctx.Err() != nil {
		return layer, err
	}
	klog.FromContext(ctx).Info("Decompressing layer again", keyLayer, blob.Descriptor.Digest, keyReason, err.Error())
	if err := dir.clear(); err != nil {
		return Layer{}, err
	}
	return b.buildWith(ctx, dir, blob, open, nil, holders)
}

// buildWith is build with one way to decompress gzip.
func (b *builder) buildWith(
	ctx context.Context, dir *workDir, blob image.LayerBlob, open blobOpener, inflate image.Gunzip, holders func() []access.ID,
) (Layer, error) {
	content, err := open()
	if err != nil {
		return Layer{}, err
	}
	defer content.Close()
	if id, err := b.catalogue.acquireBlob(blob, anyLayer); err == nil {
		defer b.catalogue.unref([]digest.Digest{id})
		return b.verify(ctx, dir, blob, content, inflate, holders)
	}
	layer, err := b.unpack(ctx, dir, blob, content, inflate)
	if err != nil {
		return Layer{}, err
	}
	layer.Holders = holders()
	// dir becomes the directory of the layer, which has only tree, layer.json and implied.
	if err := dir.removeExcept(treeName, impliedName); err != nil {
		return Layer{}, err
	}
	if err := writeJSON(dir.join(layerName), layer); err != nil {
		return Layer{}, fmt.Errorf("write %s of layer %s: %w", layerName, layer.DiffID, err)
	}
	if err := b.syncer.sync(); err != nil {
		return Layer{}, err
	}
	isNew, err := b.catalogue.commit(dir.path(), layer, keyOf(blob))
	if err != nil {
		return Layer{}, fmt.Errorf("commit layer %s: %w", layer.DiffID, err)
	}
	if isNew {
		err = b.syncLayersDir()
	} else {
		err = errors.Join(dir.discard(), b.catalogue.addHolders(layer.DiffID, layer.Holders))
	}
	if err != nil {
		b.catalogue.unref([]digest.Digest{layer.DiffID})
		return Layer{}, err
	}
	return layer, nil
}

// verify reads a blob whose layer is present, and verifies its digest and the diff ID. It adds holders to the layer, and acquires a
// reference on it. It discards dir.
func (b *builder) verify(
	ctx context.Context, dir *workDir, blob image.LayerBlob, content io.Reader, inflate image.Gunzip, holders func() []access.ID,
) (Layer, error) {
	compressed := image.NewVerifyingReader(blob, content)
	diffID, err := b.hashTar(ctx, blob, compressed, inflate)
	if err != nil {
		if isNotOfBlob(ctx, err) {
			return Layer{}, fmt.Errorf("verify layer %s: %w", blob.Descriptor.Digest, err)
		}
		return Layer{}, compressed.ExplainUnpackError(err)
	}
	if err := compressed.Verify(); err != nil {
		return Layer{}, err
	}
	if blob.DiffID != "" && blob.DiffID != diffID {
		return Layer{}, errDiffID(blob, diffID)
	}
	if err := b.catalogue.acquire([]digest.Digest{diffID}); err != nil {
		return Layer{}, fmt.Errorf("%w: layer %s was removed while its blob was read; retry", errdefs.ErrUnavailable, diffID)
	}
	if err := errors.Join(b.catalogue.addHolders(diffID, holders()), dir.discard()); err != nil {
		b.catalogue.unref([]digest.Digest{diffID})
		return Layer{}, err
	}
	return Layer{DiffID: diffID}, nil
}

// isNotOfBlob reports whether an error is none for which the rest of the blob has to be looked at.
func isNotOfBlob(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, gunzip.ErrRefused)
}

// hashTar returns the digest of the tar of a blob.
func (b *builder) hashTar(
	ctx context.Context, blob image.LayerBlob, compressed io.Reader, inflate image.Gunzip,
) (digest.Digest, error) {
	source := &blobReader{from: compressed}
	content, err := blob.OpenTar(source, inflate)
	if err != nil {
		return "", err
	}
	defer content.Close()
	tar := decompressedReader{content, source}
	limited := &io.LimitedReader{N: math.MaxInt64, R: readerFunc(func(buffer []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return tar.Read(buffer)
	})}
	if b.limits.MaxBytes > 0 && b.limits.MaxEntries > 0 {
		limited.N = min(b.limits.MaxBytes, math.MaxInt64/2) + min(b.limits.MaxEntries, math.MaxInt32)*maxHeaderBytes
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, limited); err != nil {
		return "", err
	}
	if limited.N == 0 {
		return "", fmt.Errorf("%w: the tar has more bytes than a layer may have; raise --max-layer-size", errdefs.ErrInvalidArgument)
	}
	return digest.NewDigest(digest.SHA256, hash), nil
}

// maxHeaderBytes is what the headers of one entry of a tar have at most on average, in bytes.
const maxHeaderBytes = 64 << 10

func errDiffID(blob image.LayerBlob, diffID digest.Digest) error {
	return fmt.Errorf("%w: layer %s has diff ID %s instead of %s", image.ErrContentMismatch, blob.Descriptor.Digest, diffID, blob.DiffID)
}

// syncLayersDir writes the names of the layers to the disk.
func (b *builder) syncLayersDir() error {
	dir, err := os.Open(b.layersDir())
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("sync the layer store: %w", err)
	}
	return nil
}

// unpack unpacks a blob in dir. It verifies the digest of the blob and the diff ID.
func (b *builder) unpack(
	ctx context.Context, dir *workDir, blob image.LayerBlob, content io.Reader, inflate image.Gunzip,
) (Layer, error) {
	compressed := image.NewVerifyingReader(blob, content)
	uncompressed := &hashingReader{hash: sha256.New()}
	result, err := b.unpackTar(ctx, dir, blob, compressed, uncompressed, inflate)
	if err != nil {
		if isNotOfBlob(ctx, err) {
			return Layer{}, fmt.Errorf("unpack layer %s: %w", blob.Descriptor.Digest, err)
		}
		return Layer{}, compressed.ExplainUnpackError(err)
	}
	if err := compressed.Verify(); err != nil {
		return Layer{}, err
	}
	layer := Layer{
		Version: formatVersion, DiffID: digest.NewDigest(digest.SHA256, uncompressed.hash),
		Digest: blob.Descriptor.Digest, FileName: blob.FileName,
		Bytes: result.DiskBytes, Entries: result.Entries, Opaque: result.Opaque, Created: time.Now().UTC().Truncate(time.Second),
	}
	if blob.DigestUnknown {
		layer.Digest = ""
	}
	if blob.DiffID != "" && blob.DiffID != layer.DiffID {
		return Layer{}, errDiffID(blob, layer.DiffID)
	}
	return layer, nil
}

// unpackTar decompresses and unpacks a blob in dir. It reads the blob from compressed, and the tar through uncompressed. No
// goroutine reads either of them when it returns.
func (b *builder) unpackTar(
	ctx context.Context, dir *workDir, blob image.LayerBlob, compressed io.Reader, uncompressed *hashingReader, inflate image.Gunzip,
) (unpack.Result, error) {
	source := &blobReader{from: compressed}
	content, err := blob.OpenTar(source, inflate)
	if err != nil {
		return unpack.Result{}, err
	}
	defer content.Close()
	uncompressed.from = decompressedReader{content, source}
	if err := os.Mkdir(dir.join(scratchName), 0o700); err != nil {
		return unpack.Result{}, err
	}
	result, err := unpack.Tar(ctx, uncompressed, dir.join(treeName), dir.join(scratchName), b.limits)
	if err != nil || result.Implied == 0 {
		return result, err
	}
	return result, os.Rename(filepath.Join(dir.join(scratchName), unpack.ImpliedName), dir.join(impliedName))
}

// blobReader reads a blob.
type blobReader struct {
	from io.Reader
	// err is why the blob could not be read.
	err error
}

func (r *blobReader) Read(buffer []byte) (int, error) {
	n, err := r.from.Read(buffer)
	// An error that wraps io.EOF, such as one of a connection, is not the end.
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

// decompressedReader reads the decompressed content of a blob. An error wraps errdefs.ErrInvalidArgument if the blob could be read, and the
// decompressor did not fail: the reason is then what the blob has.
type decompressedReader struct {
	from io.Reader
	blob *blobReader
}

func (r decompressedReader) Read(buffer []byte) (int, error) {
	n, err := r.from.Read(buffer)
	if err == nil || errors.Is(err, io.EOF) || r.blob.err != nil || errdefs.IsUnavailable(err) || errors.Is(err, gunzip.ErrRefused) {
		return n, err
	}
	if errors.Is(err, zstd.ErrWindowSizeExceeded) {
		err = fmt.Errorf("%w: windows of zstd are limited to %s; use at most --ultra -20, and not --long", err, maxZstdWindow)
	}
	return n, fmt.Errorf("%w: decompress: %w", errdefs.ErrInvalidArgument, err)
}

// hashingReader is a reader that hashes its content.
type hashingReader struct {
	from io.Reader
	hash hash.Hash
}

func (h *hashingReader) Read(buffer []byte) (int, error) {
	n, err := h.from.Read(buffer)
	h.hash.Write(buffer[:n])
	return n, err
}

// checkFreeSpace returns unpack.ErrNoFreeSpace if the reserve of the disk is taken.
func (b *builder) checkFreeSpace() error {
	return unpack.CheckFreeSpace(b.root, b.limits.MinFreePercent)
}

// isDiskFull reports whether the reason for an error is a full disk or an exhausted quota.
func isDiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// explainDiskFull adds the layer and the disk to an error about a full disk. It returns any other error unchanged.
func (b *builder) explainDiskFull(blob image.LayerBlob, err error) error {
	if isDiskFull(err) {
		return fmt.Errorf("unpack layer %s: the disk of %s is full: %w", blob.Descriptor.Digest, b.path, err)
	}
	return err
}
