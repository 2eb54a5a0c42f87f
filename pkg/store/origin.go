package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store/access"
)

// origin is the source of an image.
type origin interface {
	// describe returns the image without its layers, and the blobs of its layers.
	describe(ctx context.Context) (Image, []image.LayerBlob, error)
	// source returns where the blobs come from.
	source() source
	// fetch adds the layer of one of the blobs to the store, and acquires a reference on it. dirName is the name of the work
	// directory.
	fetch(ctx context.Context, blob image.LayerBlob, dirName string, progress *progressCounter) (Layer, error)
	// mayUse reports whether the origin's image may have a layer that is on the node.
	mayUse(layer Layer) bool
	// holders returns who may have a layer that the origin has just given whole.
	holders() []access.ID
	// imageHolders returns who may have something that was made of the layers of an image, which the origin has just given.
	imageHolders(img *Image) []access.ID
	// accept remembers that the origin gave an image.
	accept(img *Image) error
	// close frees the resources of the origin.
	close() error
}

// progressCounter counts the bytes of a blob that are received, and those that are unpacked.
type progressCounter struct {
	registry.Progress
	unpacked atomic.Int64
}

func (p *progressCounter) load() int64 { return p.Received.Load() }

// reader returns a reader that counts the bytes that are read from from as received and unpacked.
func (p *progressCounter) reader(from io.Reader) io.Reader {
	p.Received.Store(0)
	unpacking := p.unpackingReader(from)
	return readerFunc(func(buffer []byte) (int, error) {
		n, err := unpacking.Read(buffer)
		p.Received.Add(int64(n))
		return n, err
	})
}

// unpackingReader returns a reader that counts the bytes that are read from from as unpacked.
func (p *progressCounter) unpackingReader(from io.Reader) io.Reader {
	p.unpacked.Store(0)
	return readerFunc(func(buffer []byte) (int, error) {
		n, err := from.Read(buffer)
		p.unpacked.Add(int64(n))
		return n, err
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(buffer []byte) (int, error) { return f(buffer) }

// registryOrigin is an image in a registry.
type registryOrigin struct {
	repository *registry.Repository
	platform   platforms.MatchComparer
	documents  *image.Documents
	builder    *builder
	workDirs   *workDirs
	access     *access.Verifier
}

func (o *registryOrigin) mayUse(layer Layer) bool {
	return o.access.MayUseLayer(layer.Holders, tenantOf(o.repository))
}

func (o *registryOrigin) holders() []access.ID {
	return o.access.LayerHolders(tenantOf(o.repository), o.login())
}

func (o *registryOrigin) imageHolders(img *Image) []access.ID {
	var holders []access.ID
	for _, login := range o.acceptedLogins(img) {
		holders = access.AddHolders(holders, o.access.LayerHolders(tenantOf(o.repository), login))
	}
	return holders
}

// acceptedLogins returns the login that the registry accepted for an image. If it asked for none, but a layer was used that is not public,
// the image is not public either: the layer was there, and was not asked for.
func (o *registryOrigin) acceptedLogins(img *Image) []string {
	login := o.login()
	if login == access.Anonymous && !o.isPublic(img) {
		return o.repository.Logins()
	}
	return []string{login}
}

// accept remembers the login that the registry accepted for an image.
func (o *registryOrigin) accept(img *Image) error {
	var failed error
	for _, login := range o.acceptedLogins(img) {
		failed = errors.Join(failed, o.access.AcceptImage(img.Digest, o.repository.Named().Name(), login))
	}
	return failed
}

// isPublic reports whether everybody may use all layers of an image.
func (o *registryOrigin) isPublic(img *Image) bool {
	mayUse := func(layer Layer) bool { return o.access.MayUseLayer(layer.Holders, access.Tenant{}) }
	return !slices.ContainsFunc(img.Layers, func(layer ImageLayer) bool { return !o.builder.catalogue.mayUse(layer.DiffID, mayUse) })
}

// login returns the login that the registry has accepted.
func (o *registryOrigin) login() string {
	if login, ok := o.repository.SentLogin(); ok {
		return login
	}
	return access.Anonymous
}

func tenantOf(repository *registry.Repository) access.Tenant {
	named := repository.Named()
	return access.Tenant{Host: reference.Domain(named), Repository: named.Name(), Logins: repository.Logins()}
}

func (o *registryOrigin) close() error { return nil }

func (o *registryOrigin) source() source {
	named := o.repository.Named()
	return source{reference.Domain(named), reference.Path(named), o.repository.CredentialsID()}
}

func (o *registryOrigin) describe(ctx context.Context) (Image, []image.LayerBlob, error) {
	descriptor, err := o.repository.Resolve(ctx)
	if err != nil {
		return Image{}, nil, err
	}
	named := o.repository.Named()
	description, err := image.Describe(ctx, descriptor, o.platform, o.documents, o.repository.Fetch)
	if err != nil {
		return Image{}, nil, fmt.Errorf("image %s: %w", named, err)
	}
	return newImage(description, registry.DisplayName(named)), description.Layers, nil
}

// newImage returns an image without its layers.
func newImage(description image.Description, name string) Image {
	return Image{Digest: description.Digest, Manifest: description.Manifest, Platform: description.Platform, Names: []string{name}}
}

// fetch downloads and unpacks a layer. After a transient error it leaves the partial download for the next attempt. After
// any other error it removes everything.
func (o *registryOrigin) fetch(ctx context.Context, blob image.LayerBlob, dirName string, progress *progressCounter) (Layer, error) {
	dir, err := o.workDirs.acquire(dirName)
	if err != nil {
		return Layer{}, err
	}
	defer dir.release()
	layer, resumed, err := o.fetchInto(ctx, dir, blob, progress)
	if resumed && errors.Is(err, image.ErrContentMismatch) {
		// The partial download of an earlier attempt may be corrupt.
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

// fetchInto downloads and unpacks a layer in dir. resumed reports whether a part of the blob was already downloaded.
func (o *registryOrigin) fetchInto(
	ctx context.Context, dir *workDir, blob image.LayerBlob, progress *progressCounter,
) (_ Layer, resumed bool, _ error) {
	if err := dir.clear(); err != nil {
		return Layer{}, false, err
	}
	held, err := dir.openHolders(o.access)
	if err != nil {
		return Layer{}, false, err
	}
	spool, err := registry.OpenSpool(dir.join(blobName))
	if err != nil {
		return Layer{}, false, fmt.Errorf("open the download of layer %s: %w", blob.Descriptor.Digest, err)
	}
	defer spool.Close()
	spool.Check = o.builder.checkFreeSpace
	// The registry may ask for a login at any request.
	spool.BeforeWrite = func() error { return held.narrow(o.holders()) }
	if spool.Len() > blob.Descriptor.Size {
		if err := spool.Reset(); err != nil {
			return Layer{}, false, fmt.Errorf("reset the download of layer %s: %w", blob.Descriptor.Digest, err)
		}
	}
	resumed = spool.Len() > 0
	ctx, cancel := context.WithCancel(ctx)
	group, downloadCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		err := o.repository.Download(downloadCtx, blob.Descriptor, spool, &progress.Progress)
		spool.Finish(err)
		return err
	})
	open := func() (io.ReadCloser, error) { return io.NopCloser(progress.unpackingReader(spool.Reader())), nil }
	layer, err := o.builder.build(ctx, dir, blob, open, func() []access.ID {
		if held.current == nil {
			return o.holders()
		}
		return held.current
	})
	cancel()
	if failed := group.Wait(); failed != nil && err != nil && !errors.Is(failed, context.Canceled) {
		// The failed download is the reason why unpacking failed.
		err = failed
	}
	return layer, resumed, err
}

// archiveOrigin is an archive of an image, or the tar of a root file system.
type archiveOrigin struct {
	identity  image.ArchiveFile
	file      *os.File
	platform  platforms.MatchComparer
	documents *image.Documents
	builder   *builder
	workDirs  *workDirs
	collector *collector
	access    *access.Verifier
	// imports bounds how many archives are open at the same time: their indexes and decompressors take memory.
	imports  *semaphore.Weighted
	isOpened bool
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
	if o.isOpened {
		o.imports.Release(1)
	}
	return errors.Join(err, o.file.Close())
}

// mayUse reports whether a layer is public, as all layers of archives are: every pod may name an archive.
func (o *archiveOrigin) mayUse(layer Layer) bool {
	return o.access.MayUseLayer(layer.Holders, access.Tenant{})
}

func (o *archiveOrigin) holders() []access.ID {
	return o.access.LayerHolders(access.Tenant{}, access.Anonymous)
}

func (o *archiveOrigin) imageHolders(*Image) []access.ID { return o.holders() }

func (o *archiveOrigin) accept(*Image) error { return nil }

func (o *archiveOrigin) source() source { return source{repository: o.identity.Key().String()} }

func (o *archiveOrigin) describe(ctx context.Context) (Image, []image.LayerBlob, error) {
	err := o.imports.Acquire(ctx, 1)
	if err != nil {
		return Image{}, nil, fmt.Errorf("wait until other archives are imported: %w", context.Cause(ctx))
	}
	o.isOpened = true
	if o.dir, err = o.workDirs.acquire(archiveWorkDirName(o.identity)); err != nil {
		return Image{}, nil, err
	}
	err = o.collector.withRoom(ctx, o.identity.Size, func() (err error) {
		o.archive, err = image.OpenArchive(ctx, o.file, o.dir.path(), o.platform, o.documents, o.builder.limits)
		if isNoRoom(err) {
			// What is decompressed is in the way.
			err = errors.Join(err, o.dir.recreate())
		}
		return err
	})
	if errors.Is(err, image.ErrNoImage) {
		// The digest of the image is the diff ID of the layer, which is known after unpacking.
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
func (o *archiveOrigin) fetch(ctx context.Context, blob image.LayerBlob, dirName string, progress *progressCounter) (Layer, error) {
	dir, err := o.workDirs.acquireEmpty(dirName)
	if err != nil {
		return Layer{}, err
	}
	defer dir.release()
	layer, err := o.builder.build(ctx, dir, blob, func() (io.ReadCloser, error) { return o.open(blob, progress) }, o.holders)
	if err != nil {
		return Layer{}, errors.Join(o.builder.explainDiskFull(blob, err), dir.discard())
	}
	return layer, nil
}

// open opens the blob of a layer. Reading it fails at its end if the archive has changed.
func (o *archiveOrigin) open(blob image.LayerBlob, progress *progressCounter) (io.ReadCloser, error) {
	content, err := o.openBlob(blob)
	if err != nil {
		return nil, err
	}
	counted := progress.reader(content)
	unchanged := readerFunc(func(buffer []byte) (int, error) {
		n, err := counted.Read(buffer)
		if err == io.EOF {
			// Before the layer is committed, and may be used.
			if changed := o.checkUnchanged(); changed != nil {
				return n, changed
			}
		}
		return n, err
	})
	return struct {
		io.Reader
		io.Closer
	}{unchanged, content}, nil
}

// openBlob opens the blob of a layer. The blob is the whole file if it is the tar of a root file system.
func (o *archiveOrigin) openBlob(blob image.LayerBlob) (io.ReadCloser, error) {
	if o.archive == nil {
		return io.NopCloser(io.NewSectionReader(o.file, 0, o.identity.Size)), nil
	}
	return o.archive.OpenBlob(blob)
}

// checkUnchanged returns ErrUnavailable if the tar of a root file system changed while it was read. Images need no check,
// because their blobs have digests.
func (o *archiveOrigin) checkUnchanged() error {
	if o.archive != nil {
		return nil
	}
	after, err := image.IdentifyArchive(o.identity.Reference, o.file)
	if err == nil && after != o.identity {
		return fmt.Errorf("%w: archive %s changed while it was read; retry", errdefs.ErrUnavailable, o.identity.Reference)
	}
	return nil
}
