package store

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"

	"github.com/overlay-csi/overlay-csi/pkg/image"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store/access"
	"github.com/overlay-csi/overlay-csi/pkg/unpack"
)

// Keys of log messages.
const (
	keyBytes     = "bytes"
	keyDigest    = "digest"
	keyDirectory = "directory"
	keyDuration  = "duration"
	keyFile      = "file"
	keyImage     = "image"
	keyLayer     = "layer"
	keyLayers    = "layers"
	keyProgress  = "progress"
	keyReason    = "reason"
	keyRequired  = "required"
)

// Config is the configuration of a Store.
type Config struct {
	// MaxConcurrentLayerPulls is the maximum number of layers that are downloaded and unpacked at the same time.
	MaxConcurrentLayerPulls int
	// MaxLayerBytes is the maximum total size of the files of one layer in bytes, holes included. Zero is no limit.
	MaxLayerBytes int64
	// MaxLayerEntries is the maximum number of entries of one layer. Zero is no limit.
	MaxLayerEntries int64
	// MinFreeDiskPercent is the percentage of the disk of the data root that pulls must leave free.
	MinFreeDiskPercent int
	// AbandonAfter is the time after which a pull ends that no request waits for. Zero is 10 minutes.
	AbandonAfter time.Duration
	// Gunzip decompresses gzip in another process. Without it, the store does so itself.
	Gunzip image.Gunzip
	// Access says who may use the images on the node.
	Access access.Config
	// GC configures garbage collection.
	GC GCConfig
	// Prefetch are the names of images that are pulled at start. Their layers are not removed.
	Prefetch []string
	// Observer learns of pulls and of garbage collection. It may be nil.
	Observer Observer
}

// maxImports is the maximum number of archives that are open at the same time. The index of one takes up to 30 MiB, and its decompressor
// twice the largest window of zstd.
const maxImports = 2

// Store is the layer store of one node. Only one process may use it at a time.
type Store struct {
	*registry.Tags
	catalogue  *catalogue
	workDirs   *workDirs
	builder    *builder
	puller     *puller
	collector  *collector
	prefetcher *prefetcher
	registries *registry.Client
	access     *access.Verifier
	platform   platforms.MatchComparer
	documents  *image.Documents
	imports    *semaphore.Weighted

	stop context.CancelFunc
	work sync.WaitGroup
}

// dataRoot is the directory of the store. It is a dataroot.Root outside of tests.
type dataRoot interface {
	Dir() *os.File
	// Discard moves a file or directory of the data root to the trash.
	Discard(path string) error
	// AwaitDeleted waits until what was discarded before is deleted, or ctx is done.
	AwaitDeleted(ctx context.Context) error
}

// records provides the layers that volumes use. It is a record.Store outside of tests.
type records interface {
	LayersInUse() (map[digest.Digest][]string, error)
}

// New opens the store in a data root. It removes incomplete layers of an earlier process. The background work of the store
// ends when ctx is done, and Close waits for it.
func New(ctx context.Context, root dataRoot, records records, registries *registry.Client, config Config) (*Store, error) {
	layout := layout{root: root.Dir(), path: root.Dir().Name(), discard: root.Discard}
	if err := layout.create(); err != nil {
		return nil, fmt.Errorf("open the layer store: %w", err)
	}
	verifier := access.NewVerifier(layout.accessPath(), config.Access)
	prefetch, err := parsePrefetchedNames(config.Prefetch)
	if err != nil {
		return nil, fmt.Errorf("open the layer store: %w", err)
	}
	catalogue, err := openCatalogue(ctx, layout, records, prefetch)
	if err != nil {
		return nil, fmt.Errorf("open the layer store: %w", err)
	}
	workDirs, err := openWorkDirs(layout)
	if err != nil {
		return nil, fmt.Errorf("open the layer store: %w", err)
	}
	limits := unpack.Limits{MaxBytes: config.MaxLayerBytes, MaxEntries: config.MaxLayerEntries, MinFreePercent: config.MinFreeDiskPercent}
	ctx, stop := context.WithCancel(ctx)
	if config.Observer == nil {
		config.Observer = unobserved{}
	}
	documents := image.NewDocuments()
	s := &Store{
		Tags:      registry.NewTags(registries, documents),
		catalogue: catalogue, workDirs: workDirs, registries: registries, access: verifier, platform: platforms.Default(),
		documents: documents, imports: semaphore.NewWeighted(maxImports), stop: stop,
		builder: &builder{
			layout: layout, catalogue: catalogue, limits: limits, syncer: newSyncer(root.Dir()), gunzip: config.Gunzip,
		},
		prefetcher: &prefetcher{catalogue: catalogue, names: prefetch, resolved: map[string]digest.Digest{}},
	}
	s.collector = &collector{
		config: config.GC, catalogue: catalogue, workDirs: workDirs, prefetcher: s.prefetcher, records: records, trash: root,
		observer: config.Observer,
	}
	s.puller = &puller{
		catalogue: catalogue, fetcher: newFetcher(s.collector, config.MaxConcurrentLayerPulls, config.Observer), collector: s.collector,
		builder: s.builder, composing: newSlots(1),
		parallel: config.MaxConcurrentLayerPulls, minFreePercent: config.MinFreeDiskPercent, maxLayerBytes: config.MaxLayerBytes,
		abandonAfter: cmp.Or(config.AbandonAfter, abandonAfter), observer: config.Observer,
		ctx: ctx, work: &s.work, pulls: map[pullKey]*pull{},
	}
	return s, nil
}

// Run prefetches images, and runs garbage collection until ctx is done. It returns when both have ended.
func (s *Store) Run(ctx context.Context) {
	var prefetches sync.WaitGroup
	for _, name := range s.prefetcher.names {
		prefetches.Go(func() { s.prefetcher.run(ctx, s, name) })
	}
	s.collector.run(ctx)
	prefetches.Wait()
}

// Close cancels the pulls and waits for them. No call may be under way that can begin another, Run included. A new Store
// resumes their downloads.
func (s *Store) Close() {
	s.stop()
	s.work.Wait()
}

// Acquire leases an image without accessing a registry, and without a look at credentials. path is the path of a directory in the
// image. It is relative and clean, or "" for the whole image. Acquire returns ErrNotFound if the image or one of its layers is not present.
func (s *Store) Acquire(id digest.Digest, path string) (*Lease, error) {
	image, err := s.catalogue.acquireImage(id)
	if err != nil {
		return nil, err
	}
	return openLease(s.catalogue, image, path)
}

// Pull leases an image at path. It pulls it first if it is not present, or if the registry of the name has not accepted the
// credentials for it yet (package access). path is as in Acquire. Concurrent calls share the
// pull of an image and of a layer. If ctx is done, Pull returns ErrUnavailable with the progress. The pull continues, and
// another call joins it.
// A pull that no call has waited for during Config.AbandonAfter ends; the next one resumes its downloads.
func (s *Store) Pull(ctx context.Context, named reference.Canonical, credentials registry.Credentials, path string) (*Lease, error) {
	repository := s.registries.Repository(named, credentials)
	key := pullKey{named.Digest(), named.Name(), repository.CredentialsID()}
	present := func() (*Image, error) {
		if !s.access.MayUseImage(named.Digest(), tenantOf(repository), s.catalogue.isPreloaded(named.Digest(), named.Name())) {
			return nil, fmt.Errorf("%w: accepted credentials for image %s", errdefs.ErrNotFound, named)
		}
		return s.catalogue.acquireManifest(named.Digest())
	}
	image, err := s.puller.acquire(ctx, key, named.String(), present, &registryOrigin{
		repository: repository, platform: s.platform, documents: s.documents,
		builder: s.builder, workDirs: s.workDirs, access: s.access,
	})
	if err != nil {
		return nil, err
	}
	return openLease(s.catalogue, image, path)
}

// Import leases the image in an archive, and unpacks it first if it is not present. file is a docker archive, an OCI archive,
// the directory of an OCI layout, or the tar of a root file system. name is the layer reference of the archive. Import
// returns ErrFailedPrecondition if wanted is not empty and not the digest of the image. As with Pull, the work continues if
// ctx is done. Import closes file.
func (s *Store) Import(ctx context.Context, name string, file *os.File, wanted digest.Digest) (*Lease, error) {
	identity, err := image.IdentifyArchive(name, file)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("identify archive %s: %w", name, err)
	}
	present := func() (*Image, error) { return s.catalogue.acquireArchive(identity) }
	imported, err := s.puller.acquire(ctx, pullKey{image: identity.Key()}, name, present, &archiveOrigin{
		identity: identity, file: file, platform: s.platform, documents: s.documents,
		builder: s.builder, workDirs: s.workDirs, collector: s.collector, access: s.access, imports: s.imports,
	})
	if err != nil {
		return nil, err
	}
	lease, err := openLease(s.catalogue, imported, "")
	if err == nil && wanted != "" && lease.Image.Digest != wanted {
		lease.Release()
		return nil, fmt.Errorf("%w: archive %s was changed: it has digest %s, but the volume needs %s; "+
			"restore the original file or create another volume", errdefs.ErrFailedPrecondition, name, lease.Image.Digest, wanted)
	}
	return lease, err
}

// Progress returns the progress of the pull of an image. It returns ErrNotFound if no pull of it is in progress.
func (s *Store) Progress(id digest.Digest) (Progress, error) {
	current, ok := s.puller.find(id)
	if !ok {
		return Progress{}, fmt.Errorf("%w: no pull of image %s is in progress", errdefs.ErrNotFound, id)
	}
	return s.puller.progress(current), nil
}

// Layers returns the layers of the store, sorted by diff ID.
func (s *Store) Layers() []LayerStatus { return s.catalogue.listLayers() }

// Images returns the images whose layers are all present, sorted by name.
func (s *Store) Images() []Image { return s.catalogue.listImages() }

// ReclaimFirst has garbage collection call a function that removes other data of the node, before it removes layers to make room. The
// function returns how many bytes it removed, or with dryRun would remove. ReclaimFirst is called before layers are pulled.
func (s *Store) ReclaimFirst(reclaim func(ctx context.Context, bytes int64, dryRun bool) (int64, error)) {
	s.collector.reclaim = reclaim
}

// GC removes unused layers, the least recently used first, and the images that contain them.
func (s *Store) GC(ctx context.Context, request GCRequest) (GCResult, error) {
	return s.collector.collect(ctx, request)
}
