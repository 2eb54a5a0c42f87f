package store

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// pullKey tells pulls apart: one with other credentials is none of a volume's.
type pullKey struct {
	image       digest.Digest
	repository  string
	credentials string
}

// pull is an image on its way here.
type pull struct {
	name    string
	began   time.Time
	done    chan struct{}
	waiters int
	// Until done they are guarded by the store, then they do not change.
	sources []source
	held    []digest.Digest
	image   *Image
	err     error
}

// Resolve asks the registry which image a reference stands for at the moment. The error says which registry it was and
// what it said.
func (s *Store) Resolve(ctx context.Context, named reference.Named, credentials Credentials) (digest.Digest, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.config.StallTimeout, errStalled)
	defer cancel()
	repo := s.config.Registries.open(named, credentials)
	descriptor, err := repo.resolve(ctx)
	if err != nil {
		return "", stalled(ctx, repo, err)
	}
	return descriptor.Digest, nil
}

// answerBefore is how long before its deadline a request is answered: the caller then learns what there is to wait for.
const answerBefore = 2 * time.Second

// Pull brings an image here, and opens its layers at path in it. However many ask for an image or a layer at the same
// time, it is downloaded once. A pull goes on when ctx is done: the error is then Unavailable and says how far it is, and
// who asks again finds it further on.
func (s *Store) Pull(ctx context.Context, named reference.Canonical, credentials Credentials, path string) (*Use, error) {
	s.mu.Lock()
	if image := s.images[named.Digest()]; image != nil && s.holdLocked(image.diffIDs()) {
		s.mu.Unlock()
		return s.use(image, path)
	}
	repo := s.config.Registries.open(named, credentials)
	p := s.startLocked(pullKey{named.Digest(), named.Name(), credentials.id}, named.String(), nil, func(ctx context.Context, p *pull) error {
		return s.pullImage(ctx, p, repo)
	})
	return s.wait(ctx, p, path)
}

// wait waits for a pull that was joined, and opens the layers.
func (s *Store) wait(ctx context.Context, p *pull, path string) (*Use, error) {
	timeout := make(<-chan time.Time)
	if deadline, ok := ctx.Deadline(); ok {
		timeout = time.After(time.Until(deadline) - min(answerBefore, time.Until(deadline)/4))
	}
	var err error
	select {
	case <-p.done:
		err = p.err
	case <-timeout:
		err = s.underWay(p)
	case <-ctx.Done():
		err = s.underWay(p)
	}
	s.mu.Lock()
	held := err == nil && s.holdLocked(p.image.diffIDs())
	s.leaveLocked(p)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if !held {
		return nil, fmt.Errorf("%w: image %s is gone again: ask again", errdefs.ErrUnavailable, p.name)
	}
	return s.use(p.image, path)
}

// startLocked joins a pull, or begins one, and lets go of the store. release, which may be nil, is called when the work is
// done, or at once where somebody else does it.
func (s *Store) startLocked(key pullKey, name string, release func() error, work func(context.Context, *pull) error) *pull {
	defer s.mu.Unlock()
	if release == nil {
		release = func() error { return nil }
	}
	if p := s.pulls[key]; p != nil {
		p.waiters++
		// It was only opened for reading.
		_ = release()
		return p
	}
	p := &pull{name: name, began: time.Now(), done: make(chan struct{}), waiters: 1}
	s.pulls[key] = p
	s.work.Go(func() {
		ctx := klog.NewContext(s.ctx, klog.FromContext(s.ctx).WithValues("image", name))
		err := s.logged(ctx, p, work)
		_ = release()
		s.mu.Lock()
		defer s.mu.Unlock()
		p.err = err
		delete(s.pulls, key)
		close(p.done)
		// The layers stay held until everybody who waits has a hold of their own.
		if p.waiters == 0 {
			s.letGoLocked(p)
		}
	})
	return p
}

func (s *Store) leaveLocked(p *pull) {
	p.waiters--
	select {
	case <-p.done:
		if p.waiters == 0 {
			s.letGoLocked(p)
		}
	default:
	}
}

func (s *Store) letGoLocked(p *pull) {
	for _, id := range p.held {
		s.layers[id].users--
	}
	p.held = nil
}

// pullImage brings all layers of an image here and writes it down.
func (s *Store) pullImage(ctx context.Context, p *pull, repo *repository) error {
	image, sources, err := s.fetchManifest(ctx, repo)
	if err != nil {
		return err
	}
	return s.pullLayers(ctx, p, image, sources, func(ctx context.Context, src source) (digest.Digest, error) {
		return s.layer(ctx, src, func(ctx context.Context, f *fetch) (Layer, error) { return s.fetchLayer(ctx, repo, src, f) })
	})
}

// pullLayers gets each layer, and enters the image with them.
func (s *Store) pullLayers(ctx context.Context, p *pull, image Image, sources []source, get func(context.Context, source) (digest.Digest, error)) error {
	s.mu.Lock()
	p.sources = sources
	s.mu.Unlock()
	if err := s.makeRoom(ctx, sources); err != nil {
		return err
	}
	image.Layers = make([]ImageLayer, len(sources))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(max(s.config.Parallel, 1))
	for i, src := range sources {
		group.Go(func() error {
			id, err := get(ctx, src)
			if err != nil {
				return err
			}
			image.Layers[i] = ImageLayer{DiffID: id, Digest: src.descriptor.Digest, MediaType: src.descriptor.MediaType, Size: src.descriptor.Size, Title: src.title}
			s.mu.Lock()
			p.held = append(p.held, id)
			s.mu.Unlock()
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if image.Digest == "" {
		// A tar of a root file system: it is its layer.
		image.Digest = image.Layers[0].DiffID
	}
	entered, err := s.enter(image)
	p.image = entered
	return err
}

// fetchManifest fetches what describes an image for this platform.
func (s *Store) fetchManifest(ctx context.Context, repo *repository) (Image, []source, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 4*s.config.StallTimeout, errStalled)
	defer cancel()
	descriptor, err := repo.resolve(ctx)
	if err != nil {
		return Image{}, nil, stalled(ctx, repo, err)
	}
	image := Image{Digest: descriptor.Digest, Names: []string{displayName(repo.named)}}
	fetch := func(ctx context.Context, descriptor ocispec.Descriptor) ([]byte, error) {
		data, err := repo.document(ctx, descriptor)
		return data, stalled(ctx, repo, err)
	}
	sources, err := s.describe(ctx, &image, descriptor, fetch)
	if err != nil {
		return Image{}, nil, fmt.Errorf("image %s: %w", repo.named, err)
	}
	return image, sources, nil
}

// maxIndexes is how many indexes may name one another.
const maxIndexes = 4

// describe goes from the descriptor of an image to the layers for this platform. fetch gives verified content.
func (s *Store) describe(ctx context.Context, image *Image, descriptor ocispec.Descriptor, fetch func(context.Context, ocispec.Descriptor) ([]byte, error)) ([]source, error) {
	for range maxIndexes {
		data, err := fetch(ctx, descriptor)
		if err != nil {
			return nil, err
		}
		document, err := parseDocument(data)
		if err != nil {
			return nil, err
		}
		if len(document.Manifests) > 0 {
			if descriptor, err = document.choose(s.platform); err != nil {
				return nil, err
			}
			if descriptor.Platform != nil {
				image.Platform = platformName(*descriptor.Platform)
			}
			continue
		}
		image.Manifest = descriptor.Digest
		var config []byte
		if document.isImage() {
			if config, err = fetch(ctx, *document.Config); err != nil {
				return nil, err
			}
		}
		return document.sources(config)
	}
	return nil, fmt.Errorf("%w: more than %d indexes name one another", errdefs.ErrInvalidArgument, maxIndexes)
}

// makeRoom collects layers where the blobs that are still to come would not fit, and refuses what cannot.
func (s *Store) makeRoom(ctx context.Context, sources []source) error {
	var wanted int64
	s.mu.Lock()
	for _, src := range sources {
		if s.layers[s.idLocked(src)] == nil {
			wanted += src.descriptor.Size
		}
	}
	s.mu.Unlock()
	if wanted == 0 {
		return nil
	}
	var free int64
	for _, collected := range []bool{false, true} {
		var stat unix.Statfs_t
		if err := unix.Fstatfs(int(s.config.Root.Fd()), &stat); err != nil {
			return fmt.Errorf("fstatfs %s: %w", s.path, err)
		}
		free = (int64(stat.Bavail) - int64(stat.Blocks)*int64(s.config.Limits.ReservePercent)/100) * stat.Bsize
		if wanted <= free {
			return nil
		}
		if !collected {
			klog.FromContext(ctx).Info("Collecting layers for a pull", "wanted", wanted, "free", free)
			s.collectFor(ctx, wanted-free)
		}
	}
	return fmt.Errorf("%w: the layers have %s to download, and the disk of %s has %s that pulls may take (%d %% are kept for the volumes: --min-free-disk-percent)",
		errdefs.ErrResourceExhausted, humanize.IBytes(uint64(wanted)), s.path, humanize.IBytes(uint64(max(free, 0))), s.config.Limits.ReservePercent)
}
