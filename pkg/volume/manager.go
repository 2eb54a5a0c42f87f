// Package volume is the life of volumes on one node: it creates, publishes, expands, unpublishes and deletes them, reports
// their usage and health, and reconciles what a crash left.
//
// [Manager] has one method for each of these. Operations on one volume exclude each other; operations on different volumes
// do not wait for each other. [Manager.Publish] is a list of steps, each with its undo.
package volume

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/cache"
	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume/lock"
)

// Keys of log messages.
const (
	keyVolume   = "volume"
	keyTarget   = "target"
	keyPod      = "pod"
	keyBytes    = "bytes"
	keyBackend  = "backend"
	keyReason   = "reason"
	keyStep     = "step"
	keyDigests  = "digests"
	keyLayers   = "layers"
	keyDir      = "directory"
	keySnapshot = "snapshot"
	keyFrozen   = "frozen"
	keyCount    = "count"
	keyReplaced = "replaced"
	keyCache    = "cache"
)

// dataRoot is where the volumes are.
type dataRoot interface {
	Path() string
	VolumesDir() string
	Discard(path string) error
}

// mounter mounts and unmounts views. The cost of a method does not depend on the number of mounts.
type mounter interface {
	Overlay(view overlay.Spec, target *os.File) error
	Detached(view overlay.Spec) (*os.File, error)
	OpenDetached(view overlay.Spec) (*os.File, error)
	Attach(view, target *os.File, attributes overlay.Attributes) error
	Bind(source, target *os.File, attributes overlay.Attributes) error
	Unmount(target string) error
	At(path string) (overlay.Mounted, error)
	UpperInUse(upper *os.File) (bool, error)
	MapsGroups(upper *os.File, swaps []overlay.Swap) (bool, error)
}

// layers resolves layer references into open directories.
type layers interface {
	Resolve(ctx context.Context, refs []reference.Reference, req layer.Request) (*layer.ResolvedLayers, error)
	ResolveTags(
		ctx context.Context, refs []reference.Reference, secrets map[string]string, namespace string,
	) ([]reference.Reference, error)
	Check(refs []reference.Reference) error
	CheckPresent(ctx context.Context, refs []reference.Reference) error
	CheckRoots(ctx context.Context) []error
}

// podVolumes opens the root of another volume of a pod.
type podVolumes interface {
	Root(ctx context.Context, ref reference.Reference, pod kubelet.Pod) (*os.File, error)
}

// backends chooses backends and opens uppers.
type backends interface {
	Choose(need upper.Requirements) (upper.Backend, error)
	Open(at upper.Location) upper.Upper
	OpenUnrecorded(base string) upper.Upper
	FindPodVolumes(dir string, holder upper.LockHolder) (upper.FoundPodVolumes, error)
	frozenBackends
}

// frozenBackends freeze uppers, and open and discard frozen ones.
type frozenBackends interface {
	PrepareFreeze(ctx context.Context, at upper.Location, id string) error
	Freeze(at upper.Location, id string) error
	WrittenBytes(ctx context.Context, at upper.Location) (int64, error)
	CopyInUse(ctx context.Context, at upper.Location, id string) error
	MeasureInUse(ctx context.Context, at upper.Location) (bytes, inodes int64, err error)
	CopyFiles(ctx context.Context, at upper.Location, id string, bytes, inodes int64) error
	OpenFrozen(ctx context.Context, backend upper.Backend, id string) (*os.File, error)
	CheckFrozen(backend upper.Backend, id string) error
	MeasureFrozen(ctx context.Context, backend upper.Backend, ids []string) (bytes, inodes int64, err error)
	MergeFrozen(ctx context.Context, backend upper.Backend, ids []string, into string, isApart bool) error
	MakeFrozen(id, scratch string, fill func(into, scratch *os.File) error) error
	ListFrozen() ([]string, error)
	DiscardFrozen(id string) error
	Thaw() error
}

// pods knows which pods are on the node.
type pods interface {
	// PodUID returns the UID of the pod that a target path belongs to, "" if the path does not have it.
	PodUID(target string) string
	// PodGone reports whether the pod is certainly gone.
	PodGone(uid string) bool
}

// podPhases knows whether a pod has succeeded.
type podPhases interface {
	PodPhase(ctx context.Context, pod kubelet.Pod) (corev1.PodPhase, error)
}

// Config configures a Manager. All fields but Ballast are required.
type Config struct {
	// Node is the name of the node, BootID identifies its current boot.
	Node, BootID string
	// ReconcileInterval is the time between two reconciliations.
	ReconcileInterval time.Duration
	// Overcommit is how many times the disk may be reserved for volumes.
	Overcommit float64
	// MaxCacheBytes is how much caches may take of the disk.
	MaxCacheBytes int64

	Root dataRoot
	// Ballast is what is set aside in the data root for a full disk. It may be nil.
	Ballast    *dataroot.Ballast
	Records    *record.Store
	Mounter    mounter
	Layers     layers
	PodVolumes podVolumes
	Pods       pods
	PodPhases  podPhases
	Backends   backends
	// Portable are the snapshots in registries.
	Portable Portable
}

// Manager manages the volumes of one node.
type Manager struct {
	config  Config
	records *record.Store
	views   views
	uppers  uppers
	// unrecorded is for volumes whose records cannot be read.
	unrecorded unrecorded
	*snapshots
	caches  *cache.Store
	ledger  *ledger
	usage   usageCache
	locks   *lock.Locks
	checker *checker
	ready   atomic.Bool
}

// NewManager returns a manager of the volumes in a data root.
func NewManager(config Config) *Manager {
	uppers := uppers{config.Backends, config.Pods, config.Root.Path(), config.Node}
	views := views{config.Mounter}
	ledger := newLedger(config, uppers)
	locks := lock.NewLocks()
	unrecorded := unrecorded{config.Records, uppers, views, ledger}
	snapshots := &snapshots{
		node: config.Node, root: config.Root, volumes: config.Records, records: config.Records.Snapshots(), uppers: uppers, views: views,
		ledger: ledger, locks: locks, pins: lock.NewPins(), portable: config.Portable,
	}
	m := &Manager{
		config:     config,
		records:    config.Records,
		views:      views,
		uppers:     uppers,
		unrecorded: unrecorded,
		snapshots:  snapshots,
		caches: cache.NewStore(cache.Config{
			BootID: config.BootID, MaxBytes: config.MaxCacheBytes, Records: config.Records, Uppers: cacheUppers{config.Backends, snapshots},
			Discard: config.Root.Discard, Sync: func() error { return syncFS(config.Root.Path()) },
		}),
		ledger:  ledger,
		locks:   locks,
		checker: &checker{records: config.Records, views: views, uppers: uppers, layers: config.Layers, locks: locks},
	}
	snapshots.send = m.sendSnapshot
	return m
}

// Run reconciles, reports ready, and then reconciles periodically until ctx is done.
func (m *Manager) Run(ctx context.Context) {
	m.reconcile(ctx)
	m.ready.Store(true)
	klog.FromContext(ctx).Info("Ready")
	var flattening sync.WaitGroup
	defer flattening.Wait()
	flattening.Go(func() { m.flattenAll(ctx, m.config.ReconcileInterval) })
	ticker := time.NewTicker(m.config.ReconcileInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			m.reconcile(ctx)
		}
	}
}

// Caches returns the caches of the node.
func (m *Manager) Caches() *cache.Store { return m.caches }

// cacheUppers are the frozen uppers that caches consist of.
type cacheUppers struct {
	backends
	snapshots *snapshots
}

// Hold has the sweep do nothing until release is called.
func (u cacheUppers) Hold() (release func()) {
	u.snapshots.listing.RLock()
	return u.snapshots.listing.RUnlock
}

// Pin keeps frozen uppers from being swept until unpin is called.
func (u cacheUppers) Pin(ids ...string) (unpin func()) { return u.snapshots.pins.Pin(ids...) }

// Sweep discards the frozen uppers that no record lists.
func (u cacheUppers) Sweep(ctx context.Context) error { return u.snapshots.sweep(ctx) }

// syncFS writes the file system of a directory to the disk.
func syncFS(path string) error {
	dir, err := linux.OpenDir(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return linux.SyncFS(dir)
}

// Ready reports whether what an earlier process left has been reconciled.
func (m *Manager) Ready() bool { return m.ready.Load() }

// exists reports whether there is a file at path. It returns true if that is unknown.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
