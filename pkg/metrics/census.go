package metrics

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/cache"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

const (
	// censusPause is the least time between two censuses, as a multiple of the time that one took.
	censusPause = 20
	// parallelChecks is how many volumes are checked at the same time. One whose file system does not answer takes 5 seconds.
	parallelChecks = 4
)

// volumes are the volumes of a node. They are a volume.Manager outside of tests.
type volumes interface {
	Health(ctx context.Context, id, target string) ([]volume.Condition, error)
	StorageHealth(ctx context.Context) ([]volume.Condition, error)
	Capacity(ctx context.Context) (int64, error)
	Reserved() int64
}

// CensusConfig has what a census counts. All fields are required.
type CensusConfig struct {
	Records *record.Store
	Volumes volumes
	Caches  interface {
		List() ([]cache.Status, error)
	}
	// FrozenUppers returns the IDs of all frozen uppers.
	FrozenUppers func() ([]string, error)
	// Interval is the least time between two censuses.
	Interval time.Duration
}

// census counts from time to time what is on the disk. To read all records and to check all volumes takes too long for a scrape, and a
// file system that does not answer must not make a scrape fail.
type census struct {
	config CensusConfig
	last   atomic.Pointer[[]prometheus.Metric]

	volumes, views              *prometheus.Desc
	unhealthy, storage, damaged *prometheus.Desc
	snapshots, frozen           *prometheus.Desc
	caches, cacheBytes          *prometheus.Desc
	capacity, reserved, taken   *prometheus.Desc
}

func newCensus(config CensusConfig) *census {
	return &census{
		config:     config,
		volumes:    gauge("volumes", "Volumes with a record on the node, by upper policy and backend of their uppers.", "upper", "backend"),
		views:      gauge("views", "Views that are mounted, or are to be, by upper policy and backend of their uppers.", "upper", "backend"),
		unhealthy:  gauge("unhealthy_volumes", "Volumes with a condition, by its severity and reason.", "severity", "reason"),
		storage:    gauge("storage_conditions", "1 for each condition of what all volumes of the node need.", "severity", "reason"),
		damaged:    gauge("damaged_records", "Volumes and snapshots whose records cannot be used."),
		snapshots:  gauge("snapshots", "Snapshots on the node."),
		frozen:     gauge("frozen_uppers", "Frozen uppers on the node."),
		caches:     gauge("caches", "Caches on the node."),
		cacheBytes: gauge("caches_bytes", "Bytes that the caches take of the disk."),
		capacity:   gauge("capacity_bytes", "Bytes that can be reserved for new volumes."),
		reserved:   gauge("reserved_bytes", "Bytes of the disk that are reserved for volumes."),
		taken:      gauge("census_timestamp_seconds", "Time since the epoch of the last count of volumes, conditions, snapshots and caches."),
	}
}

// run takes a census at each interval, or less often if that takes long, until ctx is done.
func (c *census) run(ctx context.Context) {
	for {
		began := time.Now()
		c.take(ctx)
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(c.config.Interval, censusPause*time.Since(began))):
		}
	}
}

// counted returns the last census, nothing before the first.
func (c *census) counted() []prometheus.Metric {
	if last := c.last.Load(); last != nil {
		return *last
	}
	return nil
}

// take takes a census. What cannot be counted is missing from it.
func (c *census) take(ctx context.Context) {
	var counted []prometheus.Metric
	add := func(desc *prometheus.Desc, value float64, labels ...string) {
		counted = append(counted, prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...))
	}
	for _, count := range []func(context.Context, addFunc) error{
		c.countVolumes, c.countDamaged, c.countSnapshots, c.countCaches, c.measure, c.checkStorage,
	} {
		if err := count(ctx, add); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Could not count what is on the node for the metrics")
		}
	}
	add(c.taken, float64(time.Now().Unix()))
	c.last.Store(&counted)
}

// addFunc adds a value of a metric to a census.
type addFunc func(desc *prometheus.Desc, value float64, labels ...string)

func (c *census) countVolumes(ctx context.Context, add addFunc) error {
	ids, err := c.config.Records.List()
	if err != nil {
		return err
	}
	// kind is what volumes and views are counted by.
	type kind struct{ upper, backend string }
	volumes, views := map[kind]int{}, map[kind]int{}
	found := make([][]volume.Condition, len(ids))
	var checks errgroup.Group
	checks.SetLimit(parallelChecks)
	for i, id := range ids {
		r, err := c.config.Records.Load(id)
		if err != nil {
			// countDamaged counts it.
			continue
		}
		of := kind{string(r.Spec.Upper), string(r.Backend)}
		volumes[of]++
		views[of] += len(r.Publications)
		checks.Go(func() error {
			// A volume that is not there any more has no condition.
			found[i], _ = c.config.Volumes.Health(ctx, id, "")
			return nil
		})
	}
	_ = checks.Wait()
	for of, count := range volumes {
		add(c.volumes, float64(count), of.upper, of.backend)
	}
	for of, count := range views {
		add(c.views, float64(count), of.upper, of.backend)
	}
	unhealthy := map[fault]int{}
	for _, conditions := range found {
		for _, condition := range conditions {
			unhealthy[faultOf(condition)]++
		}
	}
	for of, count := range unhealthy {
		add(c.unhealthy, float64(count), of.severity, of.reason)
	}
	return nil
}

// fault is what conditions are counted by.
type fault struct{ severity, reason string }

func faultOf(condition volume.Condition) fault {
	return fault{string(condition.Severity), condition.Reason}
}

func (c *census) countDamaged(_ context.Context, add addFunc) error {
	ids, err := c.config.Records.Unreadable()
	if err != nil {
		return err
	}
	add(c.damaged, float64(len(ids)))
	return nil
}

func (c *census) countSnapshots(_ context.Context, add addFunc) error {
	ids, err := c.config.Records.Snapshots().List()
	if err != nil {
		return err
	}
	add(c.snapshots, float64(len(ids)))
	if ids, err = c.config.FrozenUppers(); err != nil {
		return err
	}
	add(c.frozen, float64(len(ids)))
	return nil
}

func (c *census) countCaches(_ context.Context, add addFunc) error {
	caches, err := c.config.Caches.List()
	if err != nil {
		return err
	}
	var bytes int64
	for _, found := range caches {
		bytes += found.Bytes
	}
	add(c.caches, float64(len(caches)))
	add(c.cacheBytes, float64(bytes))
	return nil
}

// measure measures how much of the disk is reserved, and can be.
func (c *census) measure(ctx context.Context, add addFunc) error {
	capacity, err := c.config.Volumes.Capacity(ctx)
	if err != nil {
		return err
	}
	add(c.capacity, float64(capacity))
	add(c.reserved, float64(c.config.Volumes.Reserved()))
	return nil
}

func (c *census) checkStorage(ctx context.Context, add addFunc) error {
	conditions, err := c.config.Volumes.StorageHealth(ctx)
	if err != nil {
		return err
	}
	found := map[fault]bool{}
	for _, condition := range conditions {
		found[faultOf(condition)] = true
	}
	for of := range found {
		add(c.storage, 1, of.severity, of.reason)
	}
	return nil
}
