package store

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"
)

func (s *Store) underWay(p *pull) error {
	return fmt.Errorf("%w: image %s is still being pulled (%s): that goes on, and is asked for again", errdefs.ErrUnavailable, p.name, s.progressOf(p))
}

// logEvery is the time between two lines about a pull's progress.
const logEvery = 10 * time.Second

// logged logs what a pull comes to, and now and then how far it is.
func (s *Store) logged(ctx context.Context, p *pull, work func(context.Context, *pull) error) error {
	logger := klog.FromContext(ctx)
	logger.Info("Pulling")
	ended := make(chan struct{})
	s.work.Go(func() {
		ticker := time.NewTicker(logEvery)
		defer ticker.Stop()
		for {
			select {
			case <-ended:
				return
			case <-ticker.C:
				logger.Info("Pulling", "progress", s.progressOf(p).String())
			}
		}
	})
	err := work(ctx, p)
	close(ended)
	after := time.Since(p.began).Round(time.Millisecond).String()
	if err != nil {
		logger.Error(err, "Could not pull", "after", after)
		return err
	}
	logger.Info("Pulled", "digest", p.image.Digest, "layers", len(p.sources), "after", after)
	return nil
}

// Progress is how far a pull is.
type Progress struct {
	Image  string          `json:"image"`
	Layers []LayerProgress `json:"layers"`
}

// LayerProgress is how far a layer is, in bytes of its blob.
type LayerProgress struct {
	Digest digest.Digest `json:"digest"`
	Title  string        `json:"title,omitempty"`
	Size   int64         `json:"size"`
	Done   int64         `json:"done"`
	// Here says that the layer is in the store. One of which all bytes are done is being unpacked and synced.
	Here bool `json:"here"`
}

// String is a line for logs and messages.
func (p Progress) String() string {
	var here int
	var done, size int64
	for _, layer := range p.Layers {
		if layer.Here {
			here++
		}
		done += layer.Done
		size += layer.Size
	}
	if len(p.Layers) == 0 {
		return "reading the manifest"
	}
	return fmt.Sprintf("%d of %d layers, %s of %s", here, len(p.Layers), humanize.IBytes(uint64(done)), humanize.IBytes(uint64(size)))
}

// Progress tells how far the pulls of an image are, and whether there is one.
func (s *Store) Progress(id digest.Digest) (Progress, bool) {
	s.mu.Lock()
	var found *pull
	for key, p := range s.pulls {
		if key.image == id {
			found = p
		}
	}
	s.mu.Unlock()
	if found == nil {
		return Progress{}, false
	}
	return s.progressOf(found), true
}

func (s *Store) progressOf(p *pull) Progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	progress := Progress{Image: p.name}
	for _, src := range p.sources {
		layer := LayerProgress{Digest: src.descriptor.Digest, Title: src.title, Size: src.descriptor.Size}
		if s.layers[s.idLocked(src)] != nil {
			layer.Here, layer.Done = true, layer.Size
		} else if f := s.fetches[src.key()]; f != nil {
			layer.Done = f.received.Load()
		}
		progress.Layers = append(progress.Layers, layer)
	}
	return progress
}
