package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/store/access"
	"github.com/overlay-csi/overlay-csi/pkg/store/merged"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// attributesMediaType is the media type of a layer of attributes in the record of an image.
const attributesMediaType = "application/vnd.overlay-csi.layer.attributes.v1.tar"

// addAttributes adds a layer of attributes on top of the other layers of an image, if the image needs one: if one of its layers has a
// directory without an entry, for which a lower layer has an entry (package merged). It is a layer like any other. The pull holds
// references on the layers.
func (p *puller) addAttributes(ctx context.Context, current *pull, img *Image, from origin) error {
	attributes := &attributesOrigin{
		origin: from, image: *img, builder: p.builder, workDirs: p.collector.workDirs, composing: p.composing,
	}
	hash := sha256.New()
	size := &countingWriter{to: hash}
	entries, err := attributes.write(ctx, size)
	if err != nil {
		return fmt.Errorf("find the attributes of the directories of image %s: %w", current.name, err)
	}
	if entries == 0 {
		return nil
	}
	id := digest.NewDigest(digest.SHA256, hash)
	blob := image.LayerBlob{Descriptor: ocispec.Descriptor{MediaType: attributesMediaType, Digest: id, Size: size.bytes}, DiffID: id}
	if id, err = p.fetcher.layer(ctx, blob, attributes, &current.inSlot); err != nil {
		return err
	}
	current.hold(id)
	if err := p.catalogue.addHolders(id, attributes.holders()); err != nil {
		return err
	}
	img.Layers = append(slices.Clone(img.Layers), ImageLayer{DiffID: id, Digest: id, MediaType: attributesMediaType, Size: size.bytes})
	return nil
}

// countingWriter counts what is written.
type countingWriter struct {
	to    io.Writer
	bytes int64
}

func (w *countingWriter) Write(data []byte) (int, error) {
	w.bytes += int64(len(data))
	return w.to.Write(data)
}

// attributesOrigin makes the layer of attributes of an image whose other layers are present.
type attributesOrigin struct {
	// origin is that of the image.
	origin
	image    Image
	builder  *builder
	workDirs *workDirs
	// composing are the turns to read the names of directories.
	composing *slots
}

// holders returns who may have the layer: those who may have the others. What it contains is from these.
func (o *attributesOrigin) holders() []access.ID { return o.imageHolders(&o.image) }

// mayUse reports whether the layer may be used where it is on the node. Its digest is that of what the node has just made of layers that
// the image may have.
func (o *attributesOrigin) mayUse(Layer) bool { return true }

// fetch unpacks the layer.
func (o *attributesOrigin) fetch(ctx context.Context, blob image.LayerBlob, dirName string, progress *progressCounter) (Layer, error) {
	dir, err := o.workDirs.acquireEmpty(dirName)
	if err != nil {
		return Layer{}, err
	}
	defer dir.release()
	ctx, cancel := context.WithCancel(ctx)
	content, to := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		_, err := o.write(ctx, to)
		to.CloseWithError(err)
	}()
	open := func() (io.ReadCloser, error) { return io.NopCloser(progress.reader(content)), nil }
	layer, err := o.builder.build(ctx, dir, blob, open, o.holders)
	cancel()
	content.Close()
	<-written
	if err != nil {
		return Layer{}, errors.Join(o.builder.explainDiskFull(blob, err), dir.discard())
	}
	return layer, nil
}

// write writes the tar of the layer, which is the same each time. It returns the number of entries. It waits for a turn if the image may
// need the layer, and keeps it until it returns. An image without directories that lack an entry, as most are, waits for no other one.
func (o *attributesOrigin) write(ctx context.Context, to io.Writer) (int, error) {
	visible := o.builder.catalogue.visible(o.image.diffIDs())
	if len(visible) == 1 {
		return 0, nil
	}
	if slices.ContainsFunc(visible[:len(visible)-1], o.builder.listsImplied) {
		turn, err := o.composing.acquire(ctx, o.source().host, slotTurn, func() int64 { return 0 }, nil)
		if err != nil {
			return 0, err
		}
		defer turn.release()
	}
	var trees []*os.File
	defer func() { closeAll(trees) }()
	var names []string
	for i, id := range visible {
		tree, err := o.builder.openTree(id)
		if err != nil {
			return 0, err
		}
		trees = append(trees, tree)
		if i == len(visible)-1 {
			// Nothing below it has attributes for its directories.
			break
		}
		implied, err := o.builder.readImplied(id)
		if err != nil {
			return 0, err
		}
		if names, err = mergeNames(names, implied); err != nil {
			return 0, err
		}
	}
	return merged.WriteAttributes(ctx, to, trees, names)
}

// mergeNames adds names to sorted ones, without repeating one. It returns ErrResourceExhausted if there are more than one layer may have.
func mergeNames(names, more []string) ([]string, error) {
	known := names
	for _, name := range more {
		if _, ok := slices.BinarySearch(known, name); !ok {
			// A part of the list of a layer would keep all of it in memory.
			names = append(names, strings.Clone(name))
		}
	}
	if len(names) == len(known) {
		return names, nil
	}
	slices.Sort(names)
	names = slices.Compact(names)
	size := 0
	for _, name := range names {
		size += len(name) + 1
	}
	if len(names) > unpack.MaxImplied || size > unpack.MaxImpliedBytes {
		return nil, fmt.Errorf("%w: the layers have more than %d directories without entries, or their paths have more than %d bytes; "+
			"rebuild the image so that its layers have an entry for each directory",
			errdefs.ErrResourceExhausted, unpack.MaxImplied, unpack.MaxImpliedBytes)
	}
	return names, nil
}

// listsImplied reports whether a layer has implied directories.
func (l layout) listsImplied(id digest.Digest) bool {
	_, err := os.Lstat(filepath.Join(l.layerDir(id), impliedName))
	return !errors.Is(err, fs.ErrNotExist)
}

// readImplied returns the paths of the implied directories of a layer. A layer of an earlier driver has none.
func (l layout) readImplied(id digest.Digest) ([]string, error) {
	names, err := unpack.ReadImplied(filepath.Join(l.layerDir(id), impliedName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the directories of layer %s: %w", id, err)
	}
	return names, nil
}
