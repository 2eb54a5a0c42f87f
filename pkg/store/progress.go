package store

import (
	"fmt"
	"slices"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/image"
)

// Progress is the progress of a pull.
type Progress struct {
	Image  string          `json:"image"`
	Layers []LayerProgress `json:"layers"`
}

// LayerProgress is the progress of a layer. Sizes are in bytes of its blob.
type LayerProgress struct {
	Digest   digest.Digest `json:"digest"`
	FileName string        `json:"fileName,omitempty"`
	Size     int64         `json:"size"`
	Done     int64         `json:"done"`
	// Present reports whether the layer is in the store. A layer with all bytes done is not present before it is unpacked
	// and synced.
	Present bool `json:"present"`
}

// String returns the progress in one line for logs and errors.
func (p Progress) String() string {
	var present int
	var done, size int64
	for _, layer := range p.Layers {
		if layer.Present {
			present++
		}
		done += layer.Done
		size += layer.Size
	}
	if len(p.Layers) == 0 {
		return "reading the manifest"
	}
	return fmt.Sprintf("%d of %d layers, %s of %s", present, len(p.Layers), humanize.IBytes(uint64(done)), humanize.IBytes(uint64(size)))
}

// find returns a pull of an image in progress.
func (p *puller) find(id digest.Digest) (*pull, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, current := range p.pulls {
		if key.image == id {
			return current, true
		}
	}
	return nil, false
}

func (p *puller) progress(current *pull) Progress {
	progress := Progress{Image: current.name}
	for _, blob := range p.blobs(current) {
		layer := LayerProgress{Digest: blob.Descriptor.Digest, FileName: blob.FileName, Size: blob.Descriptor.Size}
		if p.catalogue.has(blob, current.mayUse) {
			layer.Present, layer.Done = true, layer.Size
		} else {
			layer.Done, _ = p.fetcher.progress(blob, current.from)
		}
		progress.Layers = append(progress.Layers, layer)
	}
	return progress
}

func (p *puller) blobs(current *pull) []image.LayerBlob {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(current.blobs)
}

// progressInterval is the time between two log messages about the progress of a pull.
const progressInterval = 10 * time.Second

// logProgress logs the progress of a pull until the returned function is called.
func (p *puller) logProgress(logger klog.Logger, current *pull) (stop func()) {
	ended := make(chan struct{})
	p.work.Go(func() {
		ticker := time.NewTicker(progressInterval)
		defer ticker.Stop()
		for {
			select {
			case <-ended:
				return
			case <-ticker.C:
				logger.Info("Pulling image", keyProgress, p.progress(current).String())
			}
		}
	})
	return func() { close(ended) }
}
