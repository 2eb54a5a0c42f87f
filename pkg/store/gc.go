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

// GCRequest is a request for garbage collection. If All and Bytes are zero, the request removes layers only if disk usage is
// above the high threshold, and stops at the low threshold.
type GCRequest struct {
	// DryRun reports the layers without removing them.
	DryRun bool
	// All removes every unused layer that is older than GCConfig.MinAge.
	All bool
	// Bytes is the number of bytes to remove.
	Bytes int64
}

// GCResult has the layers that garbage collection removed or, with GCRequest.DryRun, would remove.
type GCResult struct {
	Layers []LayerStatus `json:"layers"`
	// Bytes is the total size of the layers.
	Bytes int64 `json:"bytes"`
}

// collector is the garbage collection of the store.
type collector struct {
	config     GCConfig
	catalogue  *catalogue
	workDirs   *workDirs
	prefetcher *prefetcher
	records    records
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

// collect removes unused layers, the least recently used first, and the images that contain them.
func (c *collector) collect(ctx context.Context, request GCRequest) (GCResult, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
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
	if !request.DryRun {
		if err := c.workDirs.removeAbandoned(); err != nil {
			return GCResult{}, err
		}
	}
	return c.sweep(ctx, used, target, request.DryRun)
}

// target returns the number of bytes to remove.
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

// sweep removes unused layers until it has removed target bytes.
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
		klog.FromContext(ctx).Info("Unused layers removed",
			keyLayers, len(result.Layers), keyBytes, humanize.IBytes(uint64(result.Bytes)))
	}
	return result, ctx.Err()
}
