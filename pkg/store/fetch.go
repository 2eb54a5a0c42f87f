package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// fetch is a layer on its way here.
type fetch struct {
	done     chan struct{}
	received atomic.Int64
	err      error
}

// idLocked is the diff ID of a layer, "" where that is only known when it was unpacked.
func (s *Store) idLocked(src source) digest.Digest {
	if src.diffID != "" {
		return src.diffID
	}
	return s.blobs[src.key()]
}

// layer gets a layer from the store or, where it is not there yet, from get, once for all who ask. It is held for the
// caller.
func (s *Store) layer(ctx context.Context, src source, get func(context.Context, *fetch) (Layer, error)) (digest.Digest, error) {
	for tries := 0; ; tries++ {
		s.mu.Lock()
		id := s.idLocked(src)
		if s.layers[id] != nil && s.holdLocked([]digest.Digest{id}) {
			s.mu.Unlock()
			return id, nil
		}
		f, joined := s.fetches[src.key()]
		if !joined {
			f = &fetch{done: make(chan struct{})}
			s.fetches[src.key()] = f
		}
		s.mu.Unlock()
		if !joined {
			return s.begin(ctx, src, f, get)
		}
		select {
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-f.done:
		}
		// Another one's try may have failed for its own reasons, such as its credentials.
		if f.err != nil && tries > 0 {
			return "", f.err
		}
	}
}

// begin gets a layer for all who ask for it meanwhile.
func (s *Store) begin(ctx context.Context, src source, f *fetch, get func(context.Context, *fetch) (Layer, error)) (digest.Digest, error) {
	var layer Layer
	err := s.slots.Acquire(ctx, 1)
	if err == nil {
		layer, err = get(ctx, f)
		s.slots.Release(1)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.fetches, src.key())
	f.err = err
	close(f.done)
	if err != nil {
		return "", err
	}
	if s.layers[layer.DiffID] == nil {
		s.add(layer, time.Now())
	}
	s.blobs[src.key()] = layer.DiffID
	s.holdLocked([]digest.Digest{layer.DiffID})
	return layer.DiffID, nil
}

// fetchLayer downloads and unpacks a layer. After an error that may pass, what was downloaded stays for the next try, and
// nothing else.
func (s *Store) fetchLayer(ctx context.Context, repo *repository, src source, f *fetch) (Layer, error) {
	dir := s.incomingDir(buildName(src.key()))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Layer{}, fmt.Errorf("make a directory for layer %s: %w", src.descriptor.Digest, err)
	}
	layer, resumed, err := s.fetchInto(ctx, dir, repo, src, f)
	if resumed && errors.Is(err, errLied) {
		// What an earlier try had left may be what is wrong.
		if err = errors.Join(s.discardIncoming(dir, false), os.MkdirAll(dir, 0o700)); err == nil {
			layer, _, err = s.fetchInto(ctx, dir, repo, src, f)
		}
	}
	if err == nil {
		return layer, nil
	}
	if errors.Is(err, errLied) && !strings.Contains(err.Error(), "registry "+repo.registry) {
		err = repo.explain("unpack", err)
	}
	full := s.explainFull(src, err)
	keep := full == err && (ctx.Err() != nil || errdefs.IsUnavailable(err))
	return Layer{}, errors.Join(full, s.discardIncoming(dir, keep))
}

// explainFull says which disk it is that is full.
func (s *Store) explainFull(src source, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("layer %s: the disk of %s is full: %w", src.descriptor.Digest, s.path, err)
	}
	return err
}

// discardIncoming throws away what is in a directory of incoming, or all but the blob.
func (s *Store) discardIncoming(dir string, keepBlob bool) error {
	if !keepBlob {
		return s.config.Discard(dir)
	}
	names, err := dirNames(dir)
	for _, name := range names {
		if name != blobName {
			err = errors.Join(err, s.config.Discard(filepath.Join(dir, name)))
		}
	}
	return err
}

// fetchInto downloads and unpacks a layer in dir. resumed says that a part of the blob was there already.
func (s *Store) fetchInto(ctx context.Context, dir string, repo *repository, src source, f *fetch) (layer Layer, resumed bool, err error) {
	if err := s.discardIncoming(dir, true); err != nil {
		return Layer{}, false, err
	}
	into, err := openSpool(filepath.Join(dir, blobName))
	if err != nil {
		return Layer{}, false, fmt.Errorf("open the download: %w", err)
	}
	defer into.file.Close()
	if into.length() > src.descriptor.Size {
		if err := into.empty(); err != nil {
			return Layer{}, false, fmt.Errorf("empty the download: %w", err)
		}
	}
	resumed = into.length() > 0
	f.received.Store(into.length())
	ctx, cancel := context.WithCancel(ctx)
	group, downloadCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		err := s.download(downloadCtx, repo, src, into, &f.received)
		into.finish(err)
		return err
	})
	layer, err = s.buildLayer(ctx, dir, src, into.reader())
	cancel()
	if failed := group.Wait(); failed != nil && err != nil && !errors.Is(failed, context.Canceled) {
		// Why the download ended is why the unpacking did.
		err = failed
	}
	return layer, resumed, err
}

// buildName is the directory in which a layer is made.
func buildName(key blobKey) string {
	if key.title == "" {
		return key.digest.Encoded()
	}
	return key.digest.Encoded() + "-" + digest.FromString(key.title).Encoded()[:16]
}
