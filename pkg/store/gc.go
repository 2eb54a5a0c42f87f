package store

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// GCConfig configures the removal of unused layers. It has the meaning of kubelet's image garbage collection.
type GCConfig struct {
	// HighThreshold is the percentage of disk usage that starts garbage collection.
	HighThreshold int
	// LowThreshold is the percentage of disk usage that garbage collection stops at.
	LowThreshold int
	// MinAge is the minimum time since the last use of a removed layer.
	MinAge time.Duration
	// Interval is the time between two checks of the disk usage.
	Interval time.Duration
}

// GCRequest is a request for garbage collection. If All, Bytes and Inodes are zero, the request removes layers only if disk usage is
// above the high threshold, and stops at the low threshold.
type GCRequest struct {
	// DryRun reports the layers without removing them.
	DryRun bool
	// All removes every unused layer that is older than GCConfig.MinAge.
	All bool
	// Bytes is the number of bytes to remove.
	Bytes int64
	// Inodes is the number of files to remove.
	Inodes int64
}

// amount is an amount of disk space.
type amount struct{ bytes, inodes int64 }

// GCResult has the layers that garbage collection removed or, with GCRequest.DryRun, would remove.
type GCResult struct {
	Layers []LayerStatus `json:"layers"`
	// Bytes is the total size of the layers.
	Bytes int64 `json:"bytes"`
	// Downloads is the total size of the unfinished downloads that were removed, in bytes.
	Downloads int64 `json:"downloads"`
	// Caches is the total size of the caches that were removed, in bytes.
	Caches int64 `json:"caches"`
}

// collector is the garbage collection of the store.
type collector struct {
	config     GCConfig
	catalogue  *catalogue
	workDirs   *workDirs
	prefetcher *prefetcher
	records    records
	trash      dataRoot
	// reclaim removes other data of the node that may be lost, before layers are removed that would have to be pulled again. It may be nil.
	reclaim  func(ctx context.Context, bytes int64, dryRun bool) (int64, error)
	observer Observer
	// mu serializes collections.
	mu sync.Mutex
}

// run collects garbage at the configured interval until ctx is done.
func (c *collector) run(ctx context.Context) {
	ticker := time.NewTicker(c.config.Interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if _, err := c.collect(ctx, GCRequest{}); err != nil {
			klog.FromContext(ctx).Error(err, "Could not remove unused layers; will retry")
		}
	}
}

// collect removes what was left of unfinished downloads, then unused layers, the least recently used first, and the images that
// contain them.
func (c *collector) collect(ctx context.Context, request GCRequest) (GCResult, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	result, err := c.collectOnce(ctx, request)
	if !request.DryRun {
		c.observer.Collected(result, err)
	}
	return result, err
}

func (c *collector) collectOnce(ctx context.Context, request GCRequest) (GCResult, error) {
	c.catalogue.beginGC()
	defer c.catalogue.endGC()
	// This comes after beginGC: a volume saves its record before it releases the lease on its layers.
	used, err := c.records.LayersInUse()
	if err != nil {
		return GCResult{}, fmt.Errorf("find the layers in use: %w", err)
	}
	target, err := c.target(request)
	if err != nil {
		return GCResult{}, err
	}
	c.catalogue.markUsed(used)
	age := maxBlobAge
	if target != (amount{}) {
		age = 0
	}
	downloads, err := c.workDirs.removeAbandoned(age, request.DryRun)
	if err != nil {
		return GCResult{}, err
	}
	target.bytes -= downloads
	var reclaimed int64
	if c.reclaim != nil && target.bytes > 0 && !request.All {
		if reclaimed, err = c.reclaim(ctx, target.bytes, request.DryRun); err != nil {
			klog.FromContext(ctx).Error(err, "Could not remove caches; unused layers are removed instead")
		}
		target.bytes -= reclaimed
	}
	result, err := c.sweep(ctx, used, target, request.DryRun)
	result.Downloads, result.Caches = downloads, reclaimed
	return result, err
}

// target returns how much to remove.
func (c *collector) target(request GCRequest) (amount, error) {
	if request.All {
		return amount{math.MaxInt64, math.MaxInt64}, nil
	}
	if request.Bytes > 0 || request.Inodes > 0 {
		return amount{request.Bytes, request.Inodes}, nil
	}
	usage, err := linux.FileSystemUsage(c.catalogue.root)
	return amount{c.above(usage.Bytes), c.above(usage.Inodes)}, err
}

// above returns how much is used above the low threshold, or 0 if the high threshold is not reached.
func (c *collector) above(space linux.Space) int64 {
	used, usable := space.Used, space.Usable()
	if usable == 0 || used*100 < usable*int64(c.config.HighThreshold) {
		return 0
	}
	return used - usable*int64(c.config.LowThreshold)/100
}

// sweep removes unused layers until it has removed the target.
func (c *collector) sweep(ctx context.Context, used map[digest.Digest][]string, target amount, dryRun bool) (GCResult, error) {
	var result GCResult
	var inodes int64
	prefetched := c.prefetcher.layers()
	candidates := c.catalogue.listLayers()
	slices.SortStableFunc(candidates, func(a, b LayerStatus) int {
		return cmp.Or(a.LastUsed.Compare(b.LastUsed), cmp.Compare(b.Bytes, a.Bytes))
	})
	for _, layer := range candidates {
		if result.Bytes >= target.bytes && inodes >= target.inodes || ctx.Err() != nil {
			break
		}
		if len(used[layer.DiffID]) > 0 || prefetched[layer.DiffID] || time.Since(layer.LastUsed) < c.config.MinAge {
			continue
		}
		removed, err := c.catalogue.remove(layer.DiffID, dryRun)
		if err != nil {
			return result, err
		}
		if removed {
			result.Layers = append(result.Layers, layer)
			result.Bytes += layer.Bytes
			inodes += layer.Entries
		}
	}
	if len(result.Layers) > 0 && !dryRun {
		klog.FromContext(ctx).Info("Unused layers removed",
			keyLayers, len(result.Layers), keyBytes, humanize.IBytes(uint64(result.Bytes)))
	}
	return result, ctx.Err()
}
