package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// fakeNode is a node whose kernel, kubelet and layers are fakes. Records, targets and the directories of uppers are real, in a
// temporary directory, so that no test needs root.
type fakeNode struct {
	t       *testing.T
	dir     string
	records *record.Store
	manager *Manager

	// mounts are the mounts by target.
	mounts map[string]overlay.Mounted
	// views are the specs of the overlays by target.
	views map[string]overlay.Spec
	// inUse are the uppers by base that were prepared and not released. held and yielded count calls of Hold and Yield.
	inUse map[string]bool
	// mu guards held.
	mu      sync.Mutex
	held    int
	yielded int
	limits  map[string]upper.Limit
	// busyUpper is set while an overlay that has no target is mounted on every upper.
	busyUpper bool
	// gone are the UIDs of the pods that are gone.
	gone map[string]bool
	// fail are errors of calls by name, for as long as they are there.
	fail map[string]error
	// whileGrowing is called while an upper grows, and whileCopying while one in use is copied, if it is set.
	whileGrowing, whileCopying func()
	// Those of these that are set are called by Hold, while layers are resolved, while a mount is looked up, while an upper is checked, and
	// while what it takes is counted.
	onHold      func()
	onResolve   func()
	onAt        func()
	onCheck     func() error
	onDiskUsage func() int64
	// found is what is found in other volumes of a pod.
	found upper.FoundPodVolumes
	// measured is what frozen uppers take of the disk. mergedApart is set if they were copied when they were merged last.
	measured    int64
	mergedApart bool
	// phase is that of each pod, and onPhase is called when somebody asks for it, if it is set.
	phase   corev1.PodPhase
	onPhase func()
	// copyUntilRevoked has a copy of files end when somebody wants the volume, and not before.
	copyUntilRevoked bool
	// layerDir is the one layer that each reference resolves to.
	layerDir *os.File
}

const testBoot = "boot-1"

func newFakeNode(t *testing.T) *fakeNode {
	t.Helper()
	n := &fakeNode{
		t: t, dir: t.TempDir(), mounts: map[string]overlay.Mounted{}, views: map[string]overlay.Spec{}, inUse: map[string]bool{},
		limits: map[string]upper.Limit{}, gone: map[string]bool{}, fail: map[string]error{},
	}
	for _, name := range []string{
		"data/" + dataroot.Volumes, "data/" + dataroot.Snapshots, "data/" + dataroot.Trash, "pods", "other", "layer",
	} {
		check(t, os.MkdirAll(filepath.Join(n.dir, name), 0o755))
	}
	layerDir, err := linux.OpenDir(filepath.Join(n.dir, "layer"))
	check(t, err)
	n.layerDir = layerDir
	t.Cleanup(func() { layerDir.Close() })
	n.records = record.NewStore(fakeRoot{n}.VolumesDir(), n.dir, nil)
	n.boot(testBoot)
	return n
}

// boot starts a new manager, as after a restart of the driver, or a reboot if the boot ID is another one.
func (n *fakeNode) boot(id string) {
	n.manager = NewManager(Config{
		Node: "node-1", BootID: id, ReconcileInterval: time.Hour, Overcommit: 1, Root: fakeRoot{n}, Records: n.records, Mounter: fakeMounter{n},
		Layers: fakeLayers{n}, PodVolumes: fakePodVolumes{n}, Pods: fakePods{n}, PodPhases: fakePhases{n},
		MaxCacheBytes: 1 << 30, Backends: fakeBackends{n},
	})
}

// target returns the target path of a pod, whose parent directory exists as kubelet makes it.
func (n *fakeNode) target(pod string) string {
	dir := filepath.Join(n.dir, "pods", pod)
	check(n.t, os.MkdirAll(dir, 0o755))
	return filepath.Join(dir, "mount")
}

// failing returns the error of a call that a test has fail, nil for none.
func (n *fakeNode) failing(call string) error {
	if err := n.fail[call]; err != nil {
		return fmt.Errorf("%s: %w", call, err)
	}
	return nil
}

// state describes what an operation must leave as it was if it fails: records, targets, mounts and open files.
func (n *fakeNode) state() string {
	var lines []string
	ids, err := n.records.List()
	check(n.t, err)
	for _, id := range ids {
		data, err := os.ReadFile(filepath.Join(n.records.Dir(id), dataroot.Record))
		if errors.Is(err, fs.ErrNotExist) {
			data = []byte("no record")
		} else {
			check(n.t, err)
		}
		lines = append(lines, "record "+id+": "+string(data))
	}
	targets, err := filepath.Glob(filepath.Join(n.dir, "pods", "*", "mount"))
	check(n.t, err)
	for _, target := range targets {
		lines = append(lines, fmt.Sprintf("target %s: %v", target, n.mounts[target]))
	}
	for _, target := range slices.Sorted(maps.Keys(n.mounts)) {
		lines = append(lines, fmt.Sprintf("mount %s: %v", target, n.mounts[target]))
	}
	open, err := os.ReadDir("/proc/self/fd")
	check(n.t, err)
	for _, file := range open {
		if path, err := os.Readlink("/proc/self/fd/" + file.Name()); err == nil && strings.HasPrefix(path, n.dir) {
			lines = append(lines, "open: "+path)
		}
	}
	return strings.Join(lines, "\n")
}

// wantAsBefore fails the test if the node differs from an earlier state, or if an upper is in use that was not. An upper that was
// in use may have been released: nothing is mounted on it.
func (n *fakeNode) wantAsBefore(state string, inUse map[string]bool) {
	n.t.Helper()
	if after := n.state(); after != state {
		n.t.Errorf("what failed left\n%s\nwant\n%s", after, state)
	}
	for base := range n.inUse {
		if !inUse[base] {
			n.t.Errorf("the upper in %s is in use, and was not", base)
		}
	}
}

// fakeRoot is the data root.
type fakeRoot struct{ n *fakeNode }

func (r fakeRoot) Path() string       { return filepath.Join(r.n.dir, "data") }
func (r fakeRoot) VolumesDir() string { return filepath.Join(r.Path(), dataroot.Volumes) }

func (r fakeRoot) Discard(path string) error {
	if err := r.n.failing("discard"); err != nil {
		return err
	}
	return os.RemoveAll(path)
}

// fakeMounter is the kernel.
type fakeMounter struct{ n *fakeNode }

func (m fakeMounter) Overlay(view overlay.Spec, target *os.File) error {
	if err := m.n.failing("overlay"); err != nil {
		return err
	}
	m.n.mounts[target.Name()], m.n.views[target.Name()] = overlay.Overlay, view
	return nil
}

func (m fakeMounter) Detached(view overlay.Spec) (*os.File, error) {
	if err := m.n.failing("detached"); err != nil {
		return nil, err
	}
	return linux.Open(view.Upper, ".", linux.O_PATH|linux.O_DIRECTORY, 0)
}

func (m fakeMounter) OpenDetached(overlay.Spec) (*os.File, error) {
	return os.Open(m.n.layerDir.Name())
}

func (m fakeMounter) Attach(view, target *os.File, _ overlay.Attributes) error {
	defer view.Close()
	if err := m.n.failing("attach"); err != nil {
		return err
	}
	m.n.mounts[target.Name()] = overlay.Overlay
	return nil
}

func (m fakeMounter) Bind(source, target *os.File, _ overlay.Attributes) error {
	if err := m.n.failing("bind"); err != nil {
		return err
	}
	m.n.mounts[target.Name()], m.n.views[target.Name()] = overlay.Overlay, m.n.views[source.Name()]
	return nil
}

func (m fakeMounter) Unmount(target string) error {
	if err := m.n.failing("unmount"); err != nil {
		return err
	}
	delete(m.n.mounts, target)
	delete(m.n.views, target)
	return nil
}

func (m fakeMounter) At(path string) (overlay.Mounted, error) {
	mounted := m.n.mounts[path]
	if m.n.onAt != nil {
		m.n.onAt()
	}
	return mounted, m.n.failing("at")
}

func (m fakeMounter) UpperInUse(*os.File) (bool, error) {
	return m.n.busyUpper, m.n.failing("upper in use")
}

func (m fakeMounter) MapsGroups(*os.File, []overlay.Swap) (bool, error) {
	return true, m.n.failing("maps groups")
}

// fakeLayers resolves every reference to the one layer.
type fakeLayers struct{ n *fakeNode }

func (l fakeLayers) Resolve(_ context.Context, refs []reference.Reference, _ layer.Request) (*layer.ResolvedLayers, error) {
	if err := l.n.failing("resolve"); err != nil {
		return nil, err
	}
	if l.n.onResolve != nil {
		l.n.onResolve()
	}
	resolved := &layer.ResolvedLayers{}
	for _, ref := range refs {
		if ref.Scheme() == reference.Cache {
			resolved.Caches = append(resolved.Caches, layer.CacheLayer{Name: ref.Name(), Under: len(resolved.Dirs)})
			continue
		}
		resolved.Dirs = append(resolved.Dirs, l.n.layerDir)
		resolved.Fingerprints = append(resolved.Fingerprints, "")
	}
	return resolved, nil
}

func (l fakeLayers) ResolveTags(
	_ context.Context, refs []reference.Reference, _ map[string]string, _ string,
) ([]reference.Reference, error) {
	return refs, l.n.failing("resolve tags")
}

func (l fakeLayers) Check([]reference.Reference) error { return l.n.failing("check layers") }
func (l fakeLayers) CheckPresent(context.Context, []reference.Reference) error {
	return l.n.failing("check present")
}

func (l fakeLayers) CheckRoots(context.Context) []error {
	if err := l.n.failing("check roots"); err != nil {
		return []error{err}
	}
	return nil
}

// fakePodVolumes has one other volume of every pod.
type fakePodVolumes struct{ n *fakeNode }

func (v fakePodVolumes) Root(context.Context, reference.Reference, kubelet.Pod) (*os.File, error) {
	if err := v.n.failing("pod volume"); err != nil {
		return nil, err
	}
	return linux.OpenDir(filepath.Join(v.n.dir, "other"))
}

// fakePods takes the name of a target's directory for the pod's UID.
type fakePods struct{ n *fakeNode }

func (p fakePods) PodUID(target string) string { return filepath.Base(filepath.Dir(target)) }
func (p fakePods) PodGone(uid string) bool     { return p.n.gone[uid] }

type fakePhases struct{ n *fakeNode }

func (f fakePhases) PodPhase(context.Context, kubelet.Pod) (corev1.PodPhase, error) {
	if f.n.onPhase != nil {
		f.n.onPhase()
	}
	return f.n.phase, nil
}

// fakeBackends has every upper in a directory.
type fakeBackends struct{ n *fakeNode }

func (b fakeBackends) Choose(upper.Requirements) (upper.Backend, error) {
	return upper.ProjectQuota, b.n.failing("choose")
}

func (b fakeBackends) Open(at upper.Location) upper.Upper {
	base := filepath.Join(b.n.dir, "data", at.Base)
	if at.Backend == upper.PodVolume {
		base = filepath.Join(at.PodVolume.Volume, at.PodVolume.Path)
	}
	return fakeUpper{b.n, base, at.Limit}
}

func (b fakeBackends) OpenUnrecorded(base string) upper.Upper {
	return fakeUpper{b.n, filepath.Join(b.n.dir, "data", base), upper.Limit{}}
}

func (b fakeBackends) FindPodVolumes(string, upper.LockHolder) (upper.FoundPodVolumes, error) {
	return b.n.found, b.n.failing("find pod volumes")
}

// frozenDir is where a frozen upper is.
func (b fakeBackends) frozenDir(id string) string {
	return filepath.Join(b.n.dir, "data", dataroot.Frozen, id)
}

func (b fakeBackends) PrepareFreeze(_ context.Context, _ upper.Location, id string) error {
	if err := b.n.failing("prepare freeze"); err != nil {
		return err
	}
	return os.MkdirAll(b.frozenDir(id), 0o700)
}

func (b fakeBackends) Freeze(at upper.Location, id string) error {
	if err := b.n.failing("freeze"); err != nil {
		return err
	}
	base := filepath.Join(b.n.dir, "data", at.Base)
	if exists(filepath.Join(b.frozenDir(id), "upper")) {
		return nil
	}
	check(b.n.t, os.MkdirAll(b.frozenDir(id), 0o700))
	err := os.Rename(filepath.Join(base, "upper"), filepath.Join(b.frozenDir(id), "upper"))
	if errors.Is(err, fs.ErrNotExist) {
		return errdefs.ErrDataLoss
	}
	return err
}

func (b fakeBackends) WrittenBytes(ctx context.Context, at upper.Location) (int64, error) {
	return b.Open(at).DiskUsage(ctx)
}

func (b fakeBackends) Thaw() error { return b.n.failing("thaw") }

func (b fakeBackends) CopyInUse(_ context.Context, at upper.Location, id string) error {
	if err := b.n.failing("copy in use"); err != nil {
		return err
	}
	if b.n.whileCopying != nil {
		b.n.whileCopying()
	}
	return b.copyUpper(at, id)
}

func (b fakeBackends) MeasureInUse(context.Context, upper.Location) (bytes, inodes int64, err error) {
	return b.n.measured, 1, b.n.failing("measure in use")
}

func (b fakeBackends) CopyFiles(ctx context.Context, at upper.Location, id string, _, _ int64) error {
	if b.n.whileCopying != nil {
		b.n.whileCopying()
	}
	if b.n.copyUntilRevoked {
		check(b.n.t, os.MkdirAll(b.frozenDir(id), 0o700))
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return b.copyUpper(at, id)
}

func (b fakeBackends) copyUpper(at upper.Location, id string) error {
	check(b.n.t, os.MkdirAll(b.frozenDir(id), 0o700))
	if err := b.n.failing("copy files"); err != nil {
		return err
	}
	return os.CopyFS(filepath.Join(b.frozenDir(id), "upper"), os.DirFS(filepath.Join(b.n.dir, "data", at.Base, "upper")))
}

func (b fakeBackends) OpenFrozen(_ context.Context, _ upper.Backend, id string) (*os.File, error) {
	dir, err := linux.OpenDir(filepath.Join(b.frozenDir(id), "upper"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.ErrDataLoss
	}
	return dir, errors.Join(err, b.n.failing("open frozen"))
}

func (b fakeBackends) CheckFrozen(_ upper.Backend, id string) error {
	if !exists(b.frozenDir(id)) {
		return errdefs.ErrNotFound
	}
	return nil
}

func (b fakeBackends) MeasureFrozen(context.Context, upper.Backend, []string) (bytes, inodes int64, err error) {
	return b.n.measured, 1, b.n.failing("measure frozen")
}

func (b fakeBackends) MakeFrozen(string, string, func(into, scratch *os.File) error) error {
	return b.n.failing("make frozen")
}

func (b fakeBackends) MergeFrozen(_ context.Context, _ upper.Backend, ids []string, into string, isApart bool) error {
	check(b.n.t, os.MkdirAll(filepath.Join(b.frozenDir(into), "upper"), 0o700))
	if err := b.n.failing("merge frozen"); err != nil {
		return err
	}
	b.n.mergedApart = isApart
	for _, id := range ids {
		if err := os.CopyFS(filepath.Join(b.frozenDir(into), "upper"), os.DirFS(filepath.Join(b.frozenDir(id), "upper"))); err != nil {
			return err
		}
	}
	return nil
}

func (b fakeBackends) ListFrozen() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(b.n.dir, "data", dataroot.Frozen))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var ids []string
	for _, entry := range entries {
		ids = append(ids, entry.Name())
	}
	return ids, err
}

func (b fakeBackends) DiscardFrozen(id string) error { return fakeRoot(b).Discard(b.frozenDir(id)) }

// fakeUpper keeps to the life cycle of upper.Upper.
type fakeUpper struct {
	n     *fakeNode
	base  string
	limit upper.Limit
}

var _ upper.Upper = fakeUpper{}

func (u fakeUpper) Prepare(context.Context, upper.RootAttr) (upper.Dirs, error) {
	if err := u.n.failing("prepare"); err != nil {
		return upper.Dirs{}, err
	}
	existed, _ := u.Exists()
	upperPath, workPath := u.Paths()
	check(u.n.t, errors.Join(os.MkdirAll(upperPath, 0o755), os.MkdirAll(workPath, 0o755)))
	upperDir, err := linux.OpenDir(upperPath)
	check(u.n.t, err)
	workDir, err := linux.OpenDir(workPath)
	check(u.n.t, err)
	u.n.inUse[u.base], u.n.limits[u.base] = true, u.limit
	return upper.Dirs{Upper: upperDir, Work: workDir, Existed: existed}, nil
}

func (u fakeUpper) ClearWork() error { return u.n.failing("clear work") }

func (u fakeUpper) Hold() error {
	u.n.mu.Lock()
	u.n.held++
	u.n.mu.Unlock()
	if u.n.onHold != nil {
		u.n.onHold()
	}
	return u.n.failing("hold")
}

func (u fakeUpper) Yield() error {
	u.n.yielded++
	return u.n.failing("yield")
}

func (u fakeUpper) Release(context.Context) error {
	if err := u.n.failing("release"); err != nil {
		return err
	}
	delete(u.n.inUse, u.base)
	return nil
}

func (u fakeUpper) Discard(ctx context.Context) error {
	upperPath, workPath := u.Paths()
	return errors.Join(u.Release(ctx), fakeRoot{u.n}.Discard(workPath), fakeRoot{u.n}.Discard(upperPath))
}

func (u fakeUpper) Grow(_ context.Context, limit upper.Limit) error {
	if u.n.whileGrowing != nil {
		u.n.whileGrowing()
	}
	if err := u.n.failing("grow"); err != nil {
		return err
	}
	u.n.limits[u.base] = limit
	return nil
}

func (u fakeUpper) Usage(context.Context) (upper.Usage, error) {
	return upper.Usage{}, u.n.failing("usage")
}

func (u fakeUpper) DiskUsage(context.Context) (int64, error) {
	if u.n.onDiskUsage != nil {
		return u.n.onDiskUsage(), nil
	}
	return 0, u.n.failing("disk usage")
}

func (u fakeUpper) Free(context.Context) (upper.Usage, error) {
	return upper.Usage{}, u.n.failing("free")
}

func (u fakeUpper) Check() error {
	if u.n.onCheck != nil {
		return u.n.onCheck()
	}
	return u.n.failing("check upper")
}

func (u fakeUpper) Paths() (upper, work string) { return u.base + "/upper", u.base + "/work" }

func (u fakeUpper) Exists() (bool, error) {
	_, err := os.Lstat(u.base + "/upper")
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// parsed returns the spec of a volume of the one layer.
func parsed(t *testing.T, scope spec.Scope, keys ...string) spec.Spec {
	t.Helper()
	parameters := map[string]string{spec.KeyLayers: "dir://root/layer"}
	for i := 0; i < len(keys); i += 2 {
		parameters[keys[i]] = keys[i+1]
	}
	parsed, err := spec.Parse(parameters, scope)
	check(t, err)
	return parsed
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantKind fails the test if an error is not of a kind, nil being one.
func wantKind(t *testing.T, err, kind error) {
	t.Helper()
	if (kind == nil && err != nil) || !errors.Is(err, kind) {
		t.Fatalf("error %v, want %v", err, kind)
	}
}

var errForced = fmt.Errorf("%w: forced by the test", errdefs.ErrInternal)
