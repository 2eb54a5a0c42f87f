package store

import (
	"context"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// Config is what an operator sets.
type Config struct {
	// MaxConcurrentLayerPulls is how many layers are downloaded and unpacked at the same time.
	MaxConcurrentLayerPulls int
	// MaxLayerBytes and MaxLayerEntries bound the content of one layer: the size of its files, holes included, and their
	// number. Zero is no limit.
	MaxLayerBytes, MaxLayerEntries int64
	// MinFreeDiskPercent of the data root's disk stay free: a pull that would take more of it fails.
	MinFreeDiskPercent int
	// GC says when layers that no volume uses are removed.
	GC GCConfig
	// Prefetch are the names of images that are pulled at start and never removed.
	Prefetch []string
}

// Store is the layer store of one node. One process uses it at a time.
type Store struct {
	catalogue  *catalogue
	workDirs   *workDirs
	builder    *builder
	puller     *puller
	collector  *collector
	prefetcher *prefetcher
	registries *registry.Client
	platform   platforms.MatchComparer

	stop context.CancelFunc
	work sync.WaitGroup
}

// dataRoot is the directory that the store is in, a dataroot.Root.
type dataRoot interface {
	Dir() *os.File
	// Discard moves a file or directory of the data root out of the way at once, to be deleted later.
	Discard(path string) error
}

// records are the volumes' records, a record.Store. They say which layers volumes use.
type records interface {
	LayersInUse() (map[digest.Digest][]string, error)
}

// New opens the store in a data root, and removes what a crash left unfinished. ctx ends everything that the store does in
// the background; Close waits for that.
func New(ctx context.Context, root dataRoot, records records, registries *registry.Client, config Config) (*Store, error) {
	layout := layout{root: root.Dir(), path: root.Dir().Name(), discard: root.Discard}
	if err := layout.create(); err != nil {
		return nil, fmt.Errorf("open the layer store: %w", err)
	}
	catalogue, err := openCatalogue(ctx, layout)
	if err != nil {
		return nil, fmt.Errorf("open the layer store: %w", err)
	}
	workDirs, err := openWorkDirs(layout)
	if err != nil {
		return nil, fmt.Errorf("open the layer store: %w", err)
	}
	limits := unpack.Limits{MaxBytes: config.MaxLayerBytes, MaxEntries: config.MaxLayerEntries, MinFreePercent: config.MinFreeDiskPercent}
	ctx, stop := context.WithCancel(ctx)
	s := &Store{
		catalogue: catalogue, workDirs: workDirs, registries: registries, platform: platforms.Default(), stop: stop,
		builder:    &builder{layout: layout, limits: limits, syncer: newSyncer(root.Dir())},
		prefetcher: &prefetcher{catalogue: catalogue, names: config.Prefetch, resolved: map[string]digest.Digest{}},
	}
	s.collector = &collector{config: config.GC, catalogue: catalogue, workDirs: workDirs, prefetcher: s.prefetcher, records: records}
	s.puller = &puller{
		catalogue: catalogue, fetcher: newFetcher(catalogue, config.MaxConcurrentLayerPulls), collector: s.collector,
		parallel: config.MaxConcurrentLayerPulls, minFreePercent: config.MinFreeDiskPercent,
		ctx: ctx, work: &s.work, pulls: map[pullKey]*pull{},
	}
	return s, nil
}

// Run prefetches images, and runs garbage collection until ctx is done.
func (s *Store) Run(ctx context.Context) {
	for _, name := range s.prefetcher.names {
		s.work.Go(func() { s.prefetcher.run(ctx, s, name) })
	}
	s.collector.run(ctx)
}

// Close ends the pulls. A later store finds what they have downloaded.
func (s *Store) Close() {
	s.stop()
	s.work.Wait()
}

// Resolve asks the registry which image a reference stands for at the moment.
func (s *Store) Resolve(ctx context.Context, named reference.Named, credentials registry.Credentials) (digest.Digest, error) {
	descriptor, err := s.registries.Repository(named, credentials).Resolve(ctx)
	return descriptor.Digest, err
}

// Acquire leases an image at path in it (relative and clean, "" for the whole image) without asking any registry. It
// returns ErrNotFound if the image is not present with all of its layers.
func (s *Store) Acquire(id digest.Digest, path string) (*Lease, error) {
	image, err := s.catalogue.acquireImage(id)
	if err != nil {
		return nil, err
	}
	return openLease(s.catalogue, image, path)
}

// Pull leases an image at path in it, and pulls it first if it is not present. Concurrent calls share the pull of an image
// and of a layer. A pull goes on when ctx is done: Pull then returns Unavailable with the progress, and the next call finds
// the pull further on.
func (s *Store) Pull(ctx context.Context, named reference.Canonical, credentials registry.Credentials, path string) (*Lease, error) {
	key := pullKey{named.Digest(), named.Name(), credentials.ID()}
	present := func() (*Image, error) { return s.catalogue.acquireImage(named.Digest()) }
	image, err := s.puller.acquire(ctx, key, named.String(), present, &registryOrigin{
		repository: s.registries.Repository(named, credentials), platform: s.platform, builder: s.builder, workDirs: s.workDirs,
	})
	if err != nil {
		return nil, err
	}
	return openLease(s.catalogue, image, path)
}

// Import leases the image in an archive, which file is opened for reading, and unpacks it first if it is not present: a
// docker archive, an OCI archive, the directory of an OCI layout, or the tar of a root file system. name is the archive's
// in messages. wanted is the digest that the archive had before, or "". As with Pull, the work goes on when ctx is done.
// Import closes the file.
func (s *Store) Import(ctx context.Context, name string, file *os.File, wanted digest.Digest) (*Lease, error) {
	identity, err := image.IdentifyArchive(name, file)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("archive %s: %w", name, err)
	}
	present := func() (*Image, error) { return s.catalogue.acquireArchive(identity) }
	imported, err := s.puller.acquire(ctx, pullKey{image: identity.Key()}, name, present, &archiveOrigin{
		identity: identity, file: file, platform: s.platform, builder: s.builder, workDirs: s.workDirs,
	})
	if err != nil {
		return nil, err
	}
	lease, err := openLease(s.catalogue, imported, "")
	if err == nil && wanted != "" && lease.Image.Digest != wanted {
		lease.Release()
		return nil, fmt.Errorf("%w: archive %s was changed: the volume was made on %s, and the archive is %s now; restore the former file or use another volume",
			errdefs.ErrFailedPrecondition, name, wanted, lease.Image.Digest)
	}
	return lease, err
}

// Progress returns how far the pull of an image is. It returns ErrNotFound if there is none in progress.
func (s *Store) Progress(id digest.Digest) (Progress, error) {
	current, ok := s.puller.find(id)
	if !ok {
		return Progress{}, fmt.Errorf("%w: no pull of image %s is in progress", errdefs.ErrNotFound, id)
	}
	return s.puller.progress(current), nil
}

// Layers returns the layers of the store, by diff ID.
func (s *Store) Layers() []LayerStatus { return s.catalogue.listLayers() }

// Images returns the images whose layers are all present, by name.
func (s *Store) Images() []Image { return s.catalogue.listImages() }

// GC removes layers that no volume uses, the least recently used first, and the images that had them.
func (s *Store) GC(ctx context.Context, request GCRequest) (GCResult, error) {
	return s.collector.collect(ctx, request)
}
