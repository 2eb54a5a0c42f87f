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

// GCConfig says when layers that no volume uses are removed. It works as kubelet's image garbage collection.
type GCConfig struct {
	// HighThreshold is the percentage of the disk in use at which garbage collection begins, LowThreshold that at which it
	// ends.
	HighThreshold, LowThreshold int
	// MinAge is how long a layer must have been unused.
	MinAge time.Duration
	// Interval is the time between two checks of the disk.
	Interval time.Duration
}

// GCRequest asks for a garbage collection. Without All and Bytes it removes layers down to the low threshold if the disk
// is above the high threshold.
type GCRequest struct {
	// DryRun removes nothing.
	DryRun bool
	// All removes every unused layer that is old enough, however full the disk is.
	All bool
	// Bytes removes layers until this much is removed.
	Bytes int64
}

// GCResult is what a garbage collection removed, or with DryRun would remove.
type GCResult struct {
	Layers []LayerStatus `json:"layers"`
	Bytes  int64         `json:"bytes"`
}

// collector is the garbage collection of the store.
type collector struct {
	config     GCConfig
	catalogue  *catalogue
	workDirs   *workDirs
	prefetcher *prefetcher
	records    records
	// mu lets one collection at a time work.
	mu sync.Mutex
}

// run collects garbage at intervals until ctx is done.
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

// collect removes layers that no volume uses, the least recently used first, and the images that had them.
func (c *collector) collect(ctx context.Context, request GCRequest) (GCResult, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.catalogue.beginGC()
	defer c.catalogue.endGC()
	// Only now: a volume whose layers have no lease any more has its record on disk.
	used, err := c.records.LayersInUse()
	if err != nil {
		return GCResult{}, fmt.Errorf("find the layers in use: %w", err)
	}
	target, err := c.target(request)
	if err != nil {
		return GCResult{}, err
	}
	c.catalogue.markUsed(used)
	if !request.DryRun {
		if err := c.workDirs.removeAbandoned(); err != nil {
			return GCResult{}, err
		}
	}
	return c.sweep(ctx, used, target, request.DryRun)
}

// target returns how many bytes to remove.
func (c *collector) target(request GCRequest) (int64, error) {
	if request.All {
		return math.MaxInt64, nil
	}
	if request.Bytes > 0 {
		return request.Bytes, nil
	}
	usage, err := linux.FileSystemUsage(c.catalogue.root)
	if err != nil {
		return 0, err
	}
	used, usable := usage.Bytes.Used, usage.Bytes.Usable()
	if usable == 0 || used*100 < usable*int64(c.config.HighThreshold) {
		return 0, nil
	}
	return used - usable*int64(c.config.LowThreshold)/100, nil
}

// sweep removes layers until enough is removed.
func (c *collector) sweep(ctx context.Context, used map[digest.Digest][]string, target int64, dryRun bool) (GCResult, error) {
	var result GCResult
	prefetched := c.prefetcher.layers()
	candidates := c.catalogue.listLayers()
	slices.SortStableFunc(candidates, func(a, b LayerStatus) int {
		return cmp.Or(a.LastUsed.Compare(b.LastUsed), cmp.Compare(b.Bytes, a.Bytes))
	})
	for _, layer := range candidates {
		if result.Bytes >= target || ctx.Err() != nil {
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
		}
	}
	if len(result.Layers) > 0 && !dryRun {
		klog.FromContext(ctx).Info("Unused layers removed", keyLayers, len(result.Layers), keyBytes, humanize.IBytes(uint64(result.Bytes)))
	}
	return result, ctx.Err()
}
