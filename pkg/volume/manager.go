package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// mounter mounts views and takes them down. Every method costs the same however many mounts there are.
type mounter interface {
	Overlay(view overlay.Spec, target *os.File) error
	Bind(source, target *os.File, attributes overlay.Attributes) error
	Unmount(target string) error
	At(path string) (overlay.Mounted, error)
	UpperInUse(upper *os.File) (bool, error)
}

// layers resolves layer references into open directories.
type layers interface {
	Resolve(ctx context.Context, refs []reference.Reference, req layer.Request) (*layer.ResolvedLayers, error)
	ResolveTags(ctx context.Context, refs []reference.Reference, secrets map[string]string) ([]reference.Reference, error)
	Check(refs []reference.Reference) error
	CheckPresent(refs []reference.Reference) error
	CheckRoots() error
}

// podVolumes opens the root of another volume of a pod.
type podVolumes interface {
	Root(ctx context.Context, ref reference.Reference, pod kubelet.Pod) (*os.File, error)
}

// uppers chooses backends and opens uppers.
type uppers interface {
	Choose(need upper.Requirements) (upper.Backend, error)
	Open(at upper.Location) upper.Upper
}

// pods knows which pods are on the node.
type pods interface {
	// PodUID is the UID of the pod that a target path belongs to, "" where the path does not tell.
	PodUID(target string) string
	// PodGone reports whether the pod is certainly gone.
	PodGone(uid string) bool
}

// Config is what a manager needs to know of its node.
type Config struct {
	// Node is the name of the node, BootID that of its current boot.
	Node, BootID string
	// ReconcileInterval is the time between two looks at what pods left behind.
	ReconcileInterval time.Duration
	// Overcommit is how many times the disk may be promised to volumes: 1 is what there is.
	Overcommit float64
}

// Manager manages the volumes of one node.
type Manager struct {
	config     Config
	root       *DataRoot
	mounter    mounter
	layers     layers
	podVolumes podVolumes
	pods       pods
	uppers     uppers
	states     states
	trash      *trash
	locks      *locks
	ready      atomic.Bool
	// promises lets one volume at a time be promised its size.
	promises sync.Mutex
	counts   counts
}

// NewManager returns the manager of the volumes in a data root.
func NewManager(config Config, root *DataRoot, mounter mounter, layers layers, podVolumes podVolumes, pods pods, uppers uppers) *Manager {
	return &Manager{
		config:     config,
		root:       root,
		mounter:    mounter,
		layers:     layers,
		podVolumes: podVolumes,
		pods:       pods,
		uppers:     uppers,
		states:     states{filepath.Join(root.Path(), volumesName)},
		trash:      root.trash,
		locks:      newLocks(),
	}
}

// Run makes good what a crash cut off, reports ready, and then keeps the node clean until ctx is done.
func (m *Manager) Run(ctx context.Context) {
	m.reconcile(ctx)
	m.ready.Store(true)
	klog.FromContext(ctx).Info("Ready")
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.trash.run(ctx)
	}()
	defer func() { <-done }()
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

// Ready reports whether the state that an earlier process left has been made good.
func (m *Manager) Ready() bool { return m.ready.Load() }

// baseDir is where the upper of a publication is kept beneath the data root, where that is not in another volume.
func (m *Manager) baseDir(r *record, target string) string {
	dir := filepath.Join(volumesName, r.ID)
	if r.Spec.Upper == spec.UpperPod && !r.Inline {
		return filepath.Join(dir, podUppersName, m.podKey(target))
	}
	return dir
}

// openUpper returns the upper of a publication. p may be nil if all publications of the volume share one upper.
func (m *Manager) openUpper(r *record, p *publication) upper.Upper {
	if p == nil {
		p = &publication{}
	}
	return m.uppers.Open(upper.Location{
		Backend:   r.Kept,
		Base:      m.baseDir(r, p.Target),
		Limit:     r.limit(),
		Ephemeral: r.Spec.Ephemeral(),
		PodVolume: p.PodVolume,
		Holder:    upper.LockHolder{Node: m.config.Node, BootID: p.BootID, VolumeID: r.ID, Target: p.Target},
		Layers:    r.Spec.LayerNames(),
	})
}

// UpperInUse returns a function that reports whether the holder of an upper in another volume still has its publication in
// this data root.
func UpperInUse(root *DataRoot) func(upper.LockHolder) bool {
	states := states{filepath.Join(root.Path(), volumesName)}
	return func(holder upper.LockHolder) bool {
		if CheckID(holder.VolumeID) != nil {
			return false
		}
		r, err := states.load(holder.VolumeID)
		if err != nil {
			// The publication may be in what cannot be read.
			return true
		}
		return r != nil && r.publication(holder.Target) != nil
	}
}

// isLive reports whether the view of a publication is mounted.
func (m *Manager) isLive(p *publication) (bool, error) {
	mounted, err := m.mounter.At(p.Target)
	if err != nil {
		return false, fmt.Errorf("look at the target %s: %w", p.Target, err)
	}
	return mounted == overlay.Overlay, nil
}

// exists reports whether there is something at path, and says so too where that cannot be told.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// bootIDFile is where the kernel shows the identity of the current boot (random(4)).
const bootIDFile = "/proc/sys/kernel/random/boot_id"

// BootID identifies the current boot of the node.
func BootID() (string, error) {
	data, err := os.ReadFile(bootIDFile)
	if err != nil {
		return "", fmt.Errorf("read the boot ID: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}
