package store

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/readahead"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// aheadBuffers of aheadSize bytes are decompressed ahead of what is being written.
	aheadBuffers = 4
	aheadSize    = 256 << 10
	// maxTrailer is how much may follow the end of a tar, which is padded to its blocking factor.
	maxTrailer = 16 << 20
	// sniffSize is enough to decompress the first header of a tar: a block of zstd has at most 128 KiB.
	sniffSize = 256 << 10
)

// buildLayer unpacks one blob in dir, which has room for it alone, verifies all that is known of it, and moves it to its
// place in the store. It does not clean up after an error.
func (s *Store) buildLayer(ctx context.Context, dir string, src source, blob io.Reader) (Layer, error) {
	layer, err := s.unpackLayer(ctx, dir, src, blob)
	if err != nil {
		return layer, err
	}
	// What follows is the end of the build: nothing but tree and layer.json may be in the layer.
	leftovers, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return layer, err
	}
	for _, path := range leftovers {
		if filepath.Base(path) != treeName {
			if err := s.config.Discard(path); err != nil {
				return layer, err
			}
		}
	}
	if err := writeJSON(filepath.Join(dir, layerName), layer); err != nil {
		return layer, fmt.Errorf("write down layer %s: %w", layer.DiffID, err)
	}
	if err := s.syncer.sync(); err != nil {
		return layer, err
	}
	return layer, s.place(dir, layer)
}

// place renames a layer into the store.
func (s *Store) place(dir string, layer Layer) error {
	err := unix.Rename(dir, s.layerDir(layer.DiffID))
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		// Another blob with the same content was faster.
		err = s.config.Discard(dir)
	}
	if err != nil {
		return fmt.Errorf("put layer %s into the store: %w", layer.DiffID, err)
	}
	parent, err := os.Open(s.layersDir())
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := parent.Sync(); err != nil {
		return fmt.Errorf("sync the layer store: %w", err)
	}
	return nil
}

// unpackLayer unpacks and verifies.
func (s *Store) unpackLayer(ctx context.Context, dir string, src source, blob io.Reader) (Layer, error) {
	compressed := &hashing{from: blob, hash: src.descriptor.Digest.Algorithm().Hash()}
	content, closeContent, err := src.open(compressed)
	if err != nil {
		return Layer{}, src.blame(err, compressed)
	}
	uncompressed := &hashing{from: content, hash: sha256.New()}
	u, err := newUnpacker(dir, s.config.Limits)
	if err != nil {
		closeContent()
		return Layer{}, fmt.Errorf("make the layer's directory: %w", err)
	}
	defer u.close()
	err = u.unpack(ctx, uncompressed)
	if err == nil {
		err = drain(uncompressed)
	}
	// From here on nobody else reads the blob.
	closeContent()
	var opaque bool
	if err == nil {
		opaque, err = isOpaque(u.root)
	}
	if err != nil {
		return Layer{}, src.blame(err, compressed)
	}
	if err := src.verify(compressed); err != nil {
		return Layer{}, err
	}
	layer := Layer{
		Version: formatVersion, DiffID: digest.NewDigest(digest.SHA256, uncompressed.hash), Digest: src.descriptor.Digest, Title: src.title,
		Bytes: u.disk, Entries: u.entries, Opaque: opaque, Created: time.Now().UTC().Truncate(time.Second),
	}
	if src.anyBlob {
		layer.Digest = ""
	}
	if src.diffID != "" && src.diffID != layer.DiffID {
		return layer, fmt.Errorf("%w: layer %s unpacks to diff ID %s, and the image's configuration says %s", errLied, src.descriptor.Digest, layer.DiffID, src.diffID)
	}
	return layer, nil
}

// hashing hashes and counts what is read through it.
type hashing struct {
	from io.Reader
	hash hash.Hash
	size int64
}

func (h *hashing) Read(buffer []byte) (int, error) {
	n, err := h.from.Read(buffer)
	h.hash.Write(buffer[:n])
	h.size += int64(n)
	return n, err
}

// drain reads what follows the end of a tar: it is hashed with it.
func drain(from io.Reader) error {
	n, err := io.Copy(io.Discard, io.LimitReader(from, maxTrailer+1))
	if err == nil && n > maxTrailer {
		return fmt.Errorf("%w: more than %d bytes follow the end of the tar", errdefs.ErrInvalidArgument, maxTrailer)
	}
	return err
}

// verify reads the blob to its end and compares it with what the manifest says.
func (s source) verify(blob *hashing) error {
	if s.anyBlob {
		return nil
	}
	// One byte more than there should be is enough to know.
	if _, err := io.Copy(io.Discard, io.LimitReader(blob, s.descriptor.Size-blob.size+1)); err != nil {
		return err
	}
	return verify(s.descriptor, digest.NewDigest(s.descriptor.Digest.Algorithm(), blob.hash), blob.size)
}

// blame says what was wrong: a blob that is not the one that the manifest names, before what that made of it.
func (s source) blame(err error, blob *hashing) error {
	ours := errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, context.Canceled) || errdefs.IsResourceExhausted(err) || errdefs.IsUnavailable(err)
	if !ours {
		if lie := s.verify(blob); lie != nil {
			return lie
		}
	}
	return fmt.Errorf("layer %s: %w", s.descriptor.Digest, err)
}

// open turns a blob into the tar of its layer. It returns how to let go of it.
func (s source) open(blob io.Reader) (io.Reader, func(), error) {
	file := s.title
	if s.form == unknownForm {
		buffered := bufio.NewReaderSize(blob, sniffSize)
		blob = buffered
		prefix, err := buffered.Peek(sniffSize)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, nil, err
		}
		if !looksLikeTar(prefix) {
			file = strings.Replace(s.descriptor.Digest.String(), ":", "-", 1)
		}
	}
	if file != "" {
		tarOfFile, err := wrap(file, s.descriptor.Size, blob)
		return tarOfFile, func() {}, err
	}
	reader, err := decompress(blob)
	if err != nil {
		return nil, nil, err
	}
	ahead, err := readahead.NewReaderSize(reader, aheadBuffers, aheadSize)
	if err != nil {
		return nil, nil, errors.Join(err, reader.Close())
	}
	return ahead, func() { ahead.Close(); reader.Close() }, nil
}

// looksLikeTar reports whether a blob that begins so is a tar, compressed or not.
func looksLikeTar(prefix []byte) bool {
	reader, err := decompress(bytes.NewReader(prefix))
	if err != nil {
		return false
	}
	defer reader.Close()
	_, err = tar.NewReader(reader).Next()
	return err == nil
}

// wrap makes a tar of one file, so that a file is a layer as any other, with the diff ID of that tar.
func wrap(name string, size int64, content io.Reader) (io.Reader, error) {
	var header, trailer bytes.Buffer
	writer := tar.NewWriter(&header)
	err := writer.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatPAX})
	if err != nil {
		return nil, fmt.Errorf("%w: the artifact's file %q: %w", errdefs.ErrInvalidArgument, name, err)
	}
	trailer.Write(make([]byte, (512-size%512)%512+1024))
	return io.MultiReader(&header, io.LimitReader(content, size), &trailer), nil
}
