package metrics

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/singleflight"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/store"
)

// usageWait is how long a scrape waits for the file system of the data root. Prometheus gives up after 10 seconds.
const usageWait = 2 * time.Second

// NodeConfig has the parts of the driver of a node. All fields are required.
type NodeConfig struct {
	CensusConfig
	// DataRoot is the path of the data root.
	DataRoot string
	Store    interface{ Statistics() store.Statistics }
	// Discarded returns how many trees are in the trash.
	Discarded func() uint64
	Features  overlay.Features
	// Ready reports whether what an earlier process left has been reconciled.
	Ready func() bool
	// Registered returns an error that says why kubelet does not have the driver.
	Registered func() error
}

// Node reports what there is on a node: what is in memory at each scrape, and the rest as of the last census, which Run takes.
type Node struct {
	config NodeConfig
	census *census
	// usageAt reads how full a file system is, and reads has the one reading under way: where that hangs, scrapes do not pile up.
	usageAt func(path string) (linux.Usage, error)
	reads   singleflight.Group
}

// AddNode adds what there is on a node. The caller calls Run of what AddNode returns.
func (m *Metrics) AddNode(config NodeConfig) *Node {
	n := &Node{config: config, census: newCensus(config.CensusConfig), usageAt: linux.FileSystemUsageAt}
	m.registry.MustRegister(n)
	return n
}

// Run takes a census from time to time, until ctx is done.
func (n *Node) Run(ctx context.Context) { n.census.run(ctx) }

func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, labels, nil)
}

// nodeDescs describe what is read at each scrape.
type nodeDescs struct {
	images, layers, layerBytes, leasedLayers *prometheus.Desc
	pulls, fetches                           *prometheus.Desc
	size, available                          *prometheus.Desc
	inodes, availableInodes                  *prometheus.Desc
	trash, feature, ready, registered        *prometheus.Desc
}

func newNodeDescs() nodeDescs {
	return nodeDescs{
		images:          gauge("images", "Images whose layers are all on the node."),
		layers:          gauge("layers", "Layers on the node."),
		layerBytes:      gauge("layers_bytes", "Bytes that the layers on the node take of the disk."),
		leasedLayers:    gauge("leased_layers", "Layers that a publish, a pull or a commit under way needs."),
		pulls:           gauge("pulls", "Pulls of images that are in progress."),
		fetches:         gauge("layer_fetches", "Layers that are being fetched, or wait for a slot (--max-concurrent-layer-pulls).", "state"),
		size:            gauge("data_root_size_bytes", "Size of the file system of the data root."),
		available:       gauge("data_root_available_bytes", "Bytes of the file system of the data root that can be used."),
		inodes:          gauge("data_root_inodes", "Inodes of the file system of the data root; 0 if it does not count them."),
		availableInodes: gauge("data_root_available_inodes", "Inodes of the file system of the data root that can be used."),
		trash:           gauge("trash_trees", "Directories and files that were discarded, and are not deleted yet."),
		feature:         gauge("kernel_feature", "1 if the driver uses the feature of the kernel, 0 if a fallback stands in.", "feature"),
		ready:           gauge("ready", "1 once what an earlier process left has been reconciled."),
		registered:      gauge("registered", "1 if kubelet has the driver."),
	}
}

// Describe sends nothing: what a collection has depends on what the file system counts.
func (n *Node) Describe(chan<- *prometheus.Desc) {}

// Collect sends what is in memory now, and the last census.
func (n *Node) Collect(metrics chan<- prometheus.Metric) {
	desc := newNodeDescs()
	send := func(desc *prometheus.Desc, value float64, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	now := n.config.Store.Statistics()
	send(desc.images, float64(now.Images))
	send(desc.layers, float64(now.Layers))
	send(desc.layerBytes, float64(now.LayerBytes))
	send(desc.leasedLayers, float64(now.LeasedLayers))
	send(desc.pulls, float64(now.Pulls))
	send(desc.fetches, float64(now.Fetching), "running")
	send(desc.fetches, float64(now.Waiting), "waiting")
	if usage, err := n.usage(); err == nil {
		send(desc.size, float64(usage.Bytes.Total))
		send(desc.available, float64(usage.Bytes.Available))
		send(desc.inodes, float64(usage.Inodes.Total))
		send(desc.availableInodes, float64(usage.Inodes.Available))
	} else {
		klog.Background().Error(err, "Could not read how full the data root is for the metrics")
	}
	send(desc.trash, float64(n.config.Discarded()))
	for _, feature := range overlay.FeatureNames() {
		send(desc.feature, boolean(n.config.Features.Has(feature)), feature)
	}
	send(desc.ready, boolean(n.config.Ready()))
	send(desc.registered, boolean(n.config.Registered() == nil))
	for _, counted := range n.census.counted() {
		metrics <- counted
	}
}

// usage returns how full the file system of the data root is. It returns an error if that does not answer in time.
func (n *Node) usage() (linux.Usage, error) {
	read := n.reads.DoChan("", func() (any, error) { return n.usageAt(n.config.DataRoot) })
	select {
	case result := <-read:
		usage, _ := result.Val.(linux.Usage)
		return usage, result.Err
	case <-time.After(usageWait):
		return linux.Usage{}, fmt.Errorf("the file system of %s does not answer", n.config.DataRoot)
	}
}

func boolean(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
