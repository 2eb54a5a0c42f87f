package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"golang.org/x/sync/errgroup"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
)

// origin is where an image comes from.
type origin interface {
	// describe returns the image, without its layers, and the blobs of its layers.
	describe(ctx context.Context) (Image, []image.LayerBlob, error)
	// fetch makes the layer of one of the blobs.
	fetch(ctx context.Context, blob image.LayerBlob, progress *progressCounter) (Layer, error)
	// close ends the use of the origin, whether or not it was used.
	close() error
}

// progressCounter is how many bytes of a blob were received.
type progressCounter struct{ received atomic.Int64 }

func (p *progressCounter) load() int64 { return p.received.Load() }

// reader counts what is read through it.
func (p *progressCounter) reader(from io.Reader) io.Reader {
	return readerFunc(func(buffer []byte) (int, error) {
		n, err := from.Read(buffer)
		p.received.Add(int64(n))
		return n, err
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(buffer []byte) (int, error) { return f(buffer) }

// registryOrigin is an image in a registry.
type registryOrigin struct {
	repository *registry.Repository
	platform   platforms.MatchComparer
	builder    *builder
	workDirs   *workDirs
}

func (o *registryOrigin) close() error { return nil }

func (o *registryOrigin) describe(ctx context.Context) (Image, []image.LayerBlob, error) {
	descriptor, err := o.repository.Resolve(ctx)
	if err != nil {
		return Image{}, nil, err
	}
	named := o.repository.Named()
	description, err := image.Describe(ctx, descriptor, o.platform, o.repository.Fetch)
	if err != nil {
		return Image{}, nil, fmt.Errorf("image %s: %w", named, err)
	}
	return newImage(description, registry.DisplayName(named)), description.Layers, nil
}

func newImage(description image.Description, name string) Image {
	return Image{Digest: description.Digest, Manifest: description.Manifest, Platform: description.Platform, Names: []string{name}}
}

// fetch downloads and unpacks a layer. After an error that may be gone later the download stays for the next try, and
// nothing else.
func (o *registryOrigin) fetch(ctx context.Context, blob image.LayerBlob, progress *progressCounter) (Layer, error) {
	dir, err := o.workDirs.acquire(layerWorkDirName(blob))
	if err != nil {
		return Layer{}, err
	}
	defer dir.release()
	layer, resumed, err := o.fetchInto(ctx, dir, blob, progress)
	if resumed && errors.Is(err, image.ErrContentMismatch) {
		// What an earlier try has left may be what is wrong.
		if err = dir.recreate(); err == nil {
			layer, _, err = o.fetchInto(ctx, dir, blob, progress)
		}
	}
	if err == nil {
		return layer, nil
	}
	isTransient := ctx.Err() != nil || errdefs.IsUnavailable(err)
	if errors.Is(err, image.ErrContentMismatch) {
		err = o.repository.WrapMismatch(err)
	}
	if isTransient && !isDiskFull(err) {
		return Layer{}, errors.Join(err, dir.clear())
	}
	return Layer{}, errors.Join(o.builder.explainDiskFull(blob, err), dir.discard())
}

// fetchInto downloads and unpacks a layer in dir. resumed says that a part of the blob was there already.
func (o *registryOrigin) fetchInto(ctx context.Context, dir *workDir, blob image.LayerBlob, progress *progressCounter) (_ Layer, resumed bool, _ error) {
	if err := dir.clear(); err != nil {
		return Layer{}, false, err
	}
	spool, err := registry.OpenSpool(dir.join(blobName))
	if err != nil {
		return Layer{}, false, fmt.Errorf("open the download: %w", err)
	}
	defer spool.Close()
	if spool.Len() > blob.Descriptor.Size {
		if err := spool.Reset(); err != nil {
			return Layer{}, false, fmt.Errorf("empty the download: %w", err)
		}
	}
	resumed = spool.Len() > 0
	ctx, cancel := context.WithCancel(ctx)
	group, downloadCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		err := o.repository.Download(downloadCtx, blob.Descriptor, spool, &progress.received)
		spool.Finish(err)
		return err
	})
	layer, err := o.builder.build(ctx, dir, blob, spool.Reader())
	cancel()
	if failed := group.Wait(); failed != nil && err != nil && !errors.Is(failed, context.Canceled) {
		// Why the download ended is why the unpacking did.
		err = failed
	}
	return layer, resumed, err
}

// archiveOrigin is an archive in a file: of an image, or the tar of a root file system.
type archiveOrigin struct {
	identity image.ArchiveFile
	file     *os.File
	platform platforms.MatchComparer
	builder  *builder
	workDirs *workDirs
	// archive is nil for the tar of a root file system. describe sets it.
	archive *image.Archive
	dir     *workDir
}

func (o *archiveOrigin) close() error {
	var err error
	if o.archive != nil {
		o.archive.Close()
	}
	if o.dir != nil {
		err = o.dir.discard()
		o.dir.release()
	}
	return errors.Join(err, o.file.Close())
}

func (o *archiveOrigin) describe(ctx context.Context) (Image, []image.LayerBlob, error) {
	var err error
	if o.dir, err = o.workDirs.acquire(archiveWorkDirName(o.identity)); err != nil {
		return Image{}, nil, err
	}
	o.archive, err = image.OpenArchive(ctx, o.file, o.dir.path(), o.platform)
	if errors.Is(err, image.ErrNoImage) {
		// The image gets its digest, the layer's diff ID, when the layer is there.
		img := newImage(image.Description{}, o.identity.Reference)
		img.Archive = &o.identity
		return img, []image.LayerBlob{o.identity.Blob()}, nil
	}
	if err != nil {
		return Image{}, nil, err
	}
	img := newImage(o.archive.Description, o.identity.Reference)
	img.Archive = &o.identity
	return img, o.archive.Layers, nil
}

// fetch unpacks a layer of the archive.
func (o *archiveOrigin) fetch(ctx context.Context, blob image.LayerBlob, progress *progressCounter) (Layer, error) {
	dir, err := o.workDirs.acquire(layerWorkDirName(blob))
	if err != nil {
		return Layer{}, err
	}
	defer dir.release()
	if err := dir.recreate(); err != nil {
		return Layer{}, err
	}
	content, err := o.openBlob(blob)
	if err != nil {
		return Layer{}, errors.Join(err, dir.discard())
	}
	defer content.Close()
	layer, err := o.builder.build(ctx, dir, blob, progress.reader(content))
	if err != nil {
		return Layer{}, errors.Join(o.builder.explainDiskFull(blob, err), dir.discard())
	}
	return layer, o.checkUnchanged()
}

func (o *archiveOrigin) openBlob(blob image.LayerBlob) (io.ReadCloser, error) {
	if o.archive == nil {
		return io.NopCloser(io.NewSectionReader(o.file, 0, o.identity.Size)), nil
	}
	return o.archive.OpenBlob(blob)
}

// checkUnchanged refuses the tar of a root file system that was written to while it was read. The blobs of an image have
// digests.
func (o *archiveOrigin) checkUnchanged() error {
	if o.archive != nil {
		return nil
	}
	after, err := image.IdentifyArchive(o.identity.Reference, o.file)
	if err == nil && after != o.identity {
		return fmt.Errorf("%w: the archive changed while it was read; it will be read again", errdefs.ErrUnavailable)
	}
	return nil
}
