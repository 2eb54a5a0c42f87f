package metrics

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/overlay-csi/overlay-csi/pkg/cache"
	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// testNode has what the metrics of a node count.
type testNode struct {
	metrics    *Metrics
	node       *Node
	records    *record.Store
	conditions map[string][]volume.Condition
	storage    []volume.Condition
	caches     []cache.Status
	statistics store.Statistics
	registered error
}

func (n *testNode) Health(_ context.Context, id, _ string) ([]volume.Condition, error) {
	return n.conditions[id], nil
}

func (n *testNode) StorageHealth(context.Context) ([]volume.Condition, error) { return n.storage, nil }
func (n *testNode) Capacity(context.Context) (int64, error)                   { return 1 << 30, nil }
func (n *testNode) Reserved() int64                                           { return 1 << 20 }
func (n *testNode) List() ([]cache.Status, error)                             { return n.caches, nil }
func (n *testNode) Statistics() store.Statistics                              { return n.statistics }

func newTestNode(t *testing.T) *testNode {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{dataroot.Volumes, dataroot.Snapshots, dataroot.Caches} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	n := &testNode{metrics: New("1.2.3"), records: record.NewStore(filepath.Join(root, dataroot.Volumes), root, nil)}
	n.metrics.AddStore()
	n.node = n.metrics.AddNode(NodeConfig{
		CensusConfig: CensusConfig{
			Records: n.records, Volumes: n, Caches: n, Interval: time.Hour,
			FrozenUppers: func() ([]string, error) { return []string{"1", "2"}, nil },
		},
		DataRoot: root, Store: n, Discarded: func() uint64 { return 7 }, Features: overlay.Features{MountAPI: true},
		Ready: func() bool { return true }, Registered: func() error { return n.registered },
	})
	return n
}

func (n *testNode) save(t *testing.T, id string, policy spec.Policy, backend upper.Backend, views int) {
	t.Helper()
	r := &record.Record{ID: id, Spec: spec.Spec{Upper: policy}, Backend: backend, Publications: make([]record.Publication, views)}
	if err := n.records.Save(r); err != nil {
		t.Fatal(err)
	}
}

func TestNode(t *testing.T) {
	n := newTestNode(t)
	n.save(t, "a", spec.UpperPod, upper.Directory, 1)
	n.save(t, "b", spec.UpperPod, upper.Directory, 2)
	n.save(t, "c", spec.UpperClaim, upper.DiskImage, 0)
	lost := volume.Condition{Severity: volume.Lost, Reason: "UpperLost", Message: "the upper of pod team/secret is lost"}
	n.conditions = map[string][]volume.Condition{"a": {lost}, "c": {lost}}
	n.storage = []volume.Condition{{Severity: volume.Degraded, Reason: "DataRootFull"}}
	n.caches = []cache.Status{{Bytes: 10}, {Bytes: 5}}
	n.statistics = store.Statistics{Images: 1, Layers: 2, LayerBytes: 3, LeasedLayers: 4, Pulls: 5, Fetching: 6, Waiting: 7}
	n.node.census.take(t.Context())
	wantLines(t, n.metrics,
		`overlay_csi_volumes{backend="directory",upper="pod"} 2`,
		`overlay_csi_volumes{backend="disk-image",upper="claim"} 1`,
		`overlay_csi_views{backend="directory",upper="pod"} 3`,
		`overlay_csi_views{backend="disk-image",upper="claim"} 0`,
		`overlay_csi_unhealthy_volumes{reason="UpperLost",severity="Lost"} 2`,
		`overlay_csi_storage_conditions{reason="DataRootFull",severity="Degraded"} 1`,
		`overlay_csi_damaged_records 0`,
		`overlay_csi_snapshots 0`,
		`overlay_csi_frozen_uppers 2`,
		`overlay_csi_caches 2`,
		`overlay_csi_caches_bytes 15`,
		`overlay_csi_capacity_bytes 1.073741824e+09`,
		`overlay_csi_reserved_bytes 1.048576e+06`,
		`overlay_csi_images 1`,
		`overlay_csi_layers 2`,
		`overlay_csi_layers_bytes 3`,
		`overlay_csi_leased_layers 4`,
		`overlay_csi_pulls 5`,
		`overlay_csi_layer_fetches{state="running"} 6`,
		`overlay_csi_layer_fetches{state="waiting"} 7`,
		`overlay_csi_trash_trees 7`,
		`overlay_csi_kernel_feature{feature="mount-api"} 1`,
		`overlay_csi_kernel_feature{feature="layer-fd"} 0`,
		`overlay_csi_ready 1`,
		`overlay_csi_registered 1`,
	)

	// What is gone is gone from the next census, and a record that cannot be read is counted.
	if err := os.WriteFile(filepath.Join(n.records.Dir("c"), dataroot.Record), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(n.records.Dir("a")); err != nil {
		t.Fatal(err)
	}
	n.registered = errors.New("kubelet has not asked")
	n.node.census.take(t.Context())
	wantLines(t, n.metrics,
		`overlay_csi_volumes{backend="directory",upper="pod"} 1`,
		`overlay_csi_damaged_records 1`,
		`overlay_csi_registered 0`,
	)
}

// TestScrapeOfADataRootThatHangs: the rest is served, and scrapes that hang do not pile up.
func TestScrapeOfADataRootThatHangs(t *testing.T) {
	n := newTestNode(t)
	answer := make(chan struct{})
	var reads atomic.Int64
	n.node.usageAt = func(string) (linux.Usage, error) {
		reads.Add(1)
		<-answer
		return linux.Usage{}, nil
	}
	for range 2 {
		if text := scrape(t, n.metrics); !strings.Contains(text, "overlay_csi_ready 1\n") || strings.Contains(text, "overlay_csi_data_root") {
			t.Errorf("got %s", text)
		}
	}
	if reads.Load() != 1 {
		t.Errorf("%d wait for the file system", reads.Load())
	}
	close(answer)
}
