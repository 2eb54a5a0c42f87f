package volume_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
	mount "k8s.io/mount-utils"
	"k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/kubeapi"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// BenchmarkPublishUnpublish is what a view costs without gRPC around it.
func BenchmarkPublishUnpublish(b *testing.B) {
	n := newBenchNode(b)
	spec := n.dirs(3)
	var publish, unpublish time.Duration
	for b.Loop() {
		p, u := n.publish(spec)
		publish += p
		unpublish += u
	}
	b.ReportMetric(float64(publish.Microseconds())/float64(b.N), "µs/publish")
	b.ReportMetric(float64(unpublish.Microseconds())/float64(b.N), "µs/unpublish")
}

// BenchmarkPublishImage compares an image that is on the node with as many directories, in turns.
func BenchmarkPublishImage(b *testing.B) {
	for _, layers := range []int{1, 5, 20, 100} {
		b.Run(fmt.Sprint(layers, "-layers"), func(b *testing.B) {
			n := newBenchNode(b)
			dirs, image := n.dirs(layers), n.image(layers)
			n.publish(image)
			var ofDirs, ofImage []time.Duration
			for b.Loop() {
				p, _ := n.publish(dirs)
				ofDirs = append(ofDirs, p)
				p, _ = n.publish(image)
				ofImage = append(ofImage, p)
			}
			slices.Sort(ofDirs)
			slices.Sort(ofImage)
			middle := len(ofDirs) / 2
			b.ReportMetric(float64(ofDirs[middle].Microseconds()), "µs/dir")
			b.ReportMetric(float64(ofImage[middle].Microseconds()), "µs/image")
			b.ReportMetric(float64(ofImage[middle])/float64(ofDirs[middle]), "image/dir")
		})
	}
}

// BenchmarkReconcile is one round of the loop with so many views, without an upper in another volume and with one.
func BenchmarkReconcile(b *testing.B) {
	for name, counts := range map[string][]int{"data-root": {100, 1000, 5000}, "pod-volume": {100, 500}} {
		for _, count := range counts {
			b.Run(fmt.Sprint(name, "/views=", count), func(b *testing.B) {
				n := newBenchNode(b)
				made := n.dirs(3)
				if name == "pod-volume" {
					made = n.parseKeys(map[string]string{"layers": "dir://r/layer-0", "upper": "volume://scratch"})
				}
				for i := range count {
					n.keep(i, made)
				}
				before := cpuTime(b)
				for b.Loop() {
					n.reconcile()
				}
				each := float64(b.N) * float64(count)
				b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/each, "cpu-µs/view")
			})
		}
	}
}

// BenchmarkSnapshot is a snapshot of a claim at rest, and a clone of that, by what was written to the claim.
func BenchmarkSnapshot(b *testing.B) {
	for _, c := range []struct {
		name  string
		files int
		bytes int64
	}{{"1-file-1MiB", 1, 1 << 20}, {"100000-files-10GiB", 100_000, 10 << 30 / 100_000}} {
		b.Run(c.name, func(b *testing.B) {
			n := newBenchNode(b)
			check := func(err error) {
				if err != nil {
					b.Helper()
					b.Fatal(err)
				}
			}
			made := n.dirs(3)
			made.Upper = spec.UpperClaim
			_, err := n.manager.Create(b.Context(), volume.CreateRequest{Name: "v", Spec: made, Access: spec.ReadWriteOnce})
			check(err)
			target := filepath.Join(n.dir, "target")
			check(n.manager.Publish(b.Context(), volume.PublishRequest{VolumeID: "v", Target: target, Spec: made, Access: spec.ReadWriteOnce}))
			fill(b, target, c.files, c.bytes)
			check(n.manager.Unpublish(b.Context(), "v", target))
			var snapshot, clone time.Duration
			for b.Loop() {
				began := time.Now()
				_, err := n.manager.CreateSnapshot(b.Context(), volume.SnapshotRequest{Name: "s", Volume: "v"})
				snapshot += time.Since(began)
				check(err)
				began = time.Now()
				_, err = n.manager.Create(b.Context(), volume.CreateRequest{
					Name: "c", Spec: made, Access: spec.ReadWriteOnce, Source: volume.Source{Snapshot: "s"},
				})
				clone += time.Since(began)
				check(err)
				// The upper goes back, to be frozen again.
				r, err := n.config.Records.Load("v")
				check(err)
				path := filepath.Join(n.config.Root.Path(), upper.FrozenPath(r.Frozen[0].Backend, r.Frozen[0].ID))
				check(os.Rename(path, filepath.Join(n.config.Records.Dir("v"), "upper")))
				r.Frozen = nil
				check(n.config.Records.Save(r))
				check(n.manager.Delete(b.Context(), "c"))
				check(n.manager.DeleteSnapshot(b.Context(), "s", nil))
			}
			b.ReportMetric(float64(snapshot.Microseconds())/float64(b.N), "µs/snapshot")
			b.ReportMetric(float64(clone.Microseconds())/float64(b.N), "µs/clone")
		})
	}
}

// fill makes files of so many bytes each, a thousand in a directory.
func fill(b *testing.B, dir string, files int, bytes int64) {
	b.Helper()
	for i := range files {
		parent := filepath.Join(dir, fmt.Sprint(i/1000))
		err := os.MkdirAll(parent, 0o755)
		var file *os.File
		if err == nil {
			file, err = os.Create(filepath.Join(parent, fmt.Sprint(i)))
		}
		if err == nil {
			err = errors.Join(linux.Reserve(file, bytes), file.Close())
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

func cpuTime(b *testing.B) time.Duration {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// benchNode is a manager with all that it needs.
type benchNode struct {
	b       testing.TB
	dir     string
	config  volume.Config
	manager *volume.Manager
	certs   string
	count   int
}

func newBenchNode(b *testing.B) *benchNode { return newNodeIn(b, b.TempDir()) }

// newNodeIn is a node with all of its directories in dir.
func newNodeIn(b testing.TB, dir string) *benchNode {
	check := func(err error) {
		if err != nil {
			b.Helper()
			b.Fatal(err)
		}
	}
	lock, err := dataroot.Acquire(filepath.Join(dir, "data"))
	check(err)
	b.Cleanup(func() { lock.Close() })
	if err := upper.Probe(lock.Dir()); err != nil {
		b.Skip(err)
	}
	features, err := overlay.Probe(dir)
	check(err)
	mounter, err := overlay.NewMounter(overlay.Config{
		Dir: filepath.Join(lock.Path(), dataroot.Mounter), Features: features, MountUtils: mount.NewWithoutSystemd(""), Commands: exec.New(),
	})
	check(err)
	b.Cleanup(func() { mounter.Close() })
	detached, err := overlay.NewDetachedRoot(features)
	check(err)
	b.Cleanup(func() { detached.Close() })
	root, err := lock.Open(detached.Reopen)
	check(err)
	b.Cleanup(func() { root.Close() })
	records := record.NewStore(root.VolumesDir(), filepath.Dir(root.Path()), nil)
	protected, err := layer.NewProtectedDir(root.Path())
	check(err)
	check(os.MkdirAll(filepath.Join(dir, "layers"), 0o755))
	roots, err := layer.NewRoots(map[string]layer.Root{"r": {Path: filepath.Join(dir, "layers")}}, protected, detached)
	check(err)
	certs := filepath.Join(dir, "certs.d")
	registries := registry.NewClient(registry.Config{CertsDir: certs, StallTimeout: time.Minute, Backoff: time.Second})
	images, err := store.New(b.Context(), root, records, registries, store.Config{MaxConcurrentLayerPulls: 4})
	check(err)
	b.Cleanup(images.Close)
	kubeletDir := kubelet.Dir(filepath.Join(dir, "kubelet"))
	podVolumes := layer.NewPodVolumes(kubelet.NewPodVolumes(kubeletDir, kubeapi.None{}, 0), protected)
	backends := upper.NewBackends(upper.Config{
		Root: root.Dir(), MountDir: filepath.Join(dir, "mounts"), Discard: root.Discard, Commands: exec.New(),
		Mounter: mounter, InUse: volume.UpperInUse(records),
	})
	klog.SetLogger(logr.Discard())
	config := volume.Config{
		Node: "n", BootID: "b", ReconcileInterval: time.Hour, Overcommit: 1, Root: root, Records: records, Mounter: mounter,
		Layers: layer.NewResolver(roots, podVolumes, images), PodVolumes: podVolumes, Pods: kubeletDir, Backends: backends,
	}
	return &benchNode{b: b, dir: dir, certs: certs, config: config, manager: volume.NewManager(config)}
}

// keep publishes a volume in a pod of its own, which has a tmpfs for another volume, until the benchmark ends.
func (n *benchNode) keep(i int, made spec.Spec) {
	uid := fmt.Sprintf("00000000-0000-0000-0000-%012d", i)
	volumes := filepath.Join(n.dir, "kubelet/pods", uid, "volumes")
	scratch, target := filepath.Join(volumes, "kubernetes.io~empty-dir/scratch"), filepath.Join(volumes, "kubernetes.io~csi/v/mount")
	check := func(err error) {
		if err != nil {
			n.b.Helper()
			n.b.Fatal(err)
		}
	}
	check(os.MkdirAll(filepath.Dir(target), 0o755))
	if made.UpperRef != nil {
		check(os.MkdirAll(scratch, 0o755))
		check(unix.Mount("tmpfs", scratch, "tmpfs", 0, "size=1m"))
		// So kubelet says that it is mounted.
		ready := filepath.Join(n.dir, "kubelet/pods", uid, "plugins/kubernetes.io~empty-dir/scratch")
		check(os.MkdirAll(ready, 0o755))
		check(os.WriteFile(filepath.Join(ready, "ready"), nil, 0o600))
		n.b.Cleanup(func() { check(unix.Unmount(scratch, unix.MNT_DETACH)) })
	}
	id := fmt.Sprint("kept-", i)
	check(n.manager.Publish(n.b.Context(), volume.PublishRequest{
		VolumeID: id, Target: target, Spec: made, Inline: true, Pod: kubelet.Pod{UID: uid},
		Attributes: overlay.Attributes{NoSUID: true, NoDev: true},
	}))
	n.b.Cleanup(func() { check(n.manager.Unpublish(context.Background(), id, target)) })
}

// reconcile has another manager of the node reconcile once.
func (n *benchNode) reconcile() {
	ctx, stop := context.WithCancel(n.b.Context())
	defer stop()
	manager := volume.NewManager(n.config)
	go manager.Run(ctx)
	for !manager.Ready() {
		time.Sleep(time.Millisecond)
	}
}

// dirs is a volume of so many directories.
func (n *benchNode) dirs(count int) spec.Spec {
	var refs []string
	for i := range count {
		name := fmt.Sprint("layer-", i)
		if err := os.MkdirAll(filepath.Join(n.dir, "layers", name), 0o755); err != nil {
			n.b.Fatal(err)
		}
		refs = append(refs, "dir://r/"+name)
	}
	return n.parse(strings.Join(refs, "\n"))
}

// image is a volume of an image with so many layers.
func (n *benchNode) image(count int) spec.Spec {
	registry, err := registrytest.Start(registrytest.Options{})
	if err != nil {
		n.b.Fatal(err)
	}
	n.b.Cleanup(registry.Close)
	if err := registry.Configure(n.certs); err != nil {
		n.b.Fatal(err)
	}
	var layers []v1.Layer
	for i := range count {
		layer, err := registrytest.Layer(registrytest.File("f", fmt.Sprint(i)))
		if err != nil {
			n.b.Fatal(err)
		}
		layers = append(layers, layer)
	}
	image, err := registrytest.Image(layers...)
	if err != nil {
		n.b.Fatal(err)
	}
	pinned, err := registry.Push(n.b.Context(), "bench:1", image)
	if err != nil {
		n.b.Fatal(err)
	}
	return n.parse("oci://" + pinned)
}

func (n *benchNode) parse(layers string) spec.Spec {
	return n.parseKeys(map[string]string{"layers": layers})
}

func (n *benchNode) parseKeys(keys map[string]string) spec.Spec {
	parsed, err := spec.Parse(keys, spec.Scope{Inline: true})
	if err != nil {
		n.b.Fatal(err)
	}
	return parsed
}

// publish publishes and unpublishes a volume of its own.
func (n *benchNode) publish(made spec.Spec) (publish, unpublish time.Duration) {
	n.count++
	id, target := fmt.Sprint("v", n.count), filepath.Join(n.dir, "target")
	begin := time.Now()
	err := n.manager.Publish(n.b.Context(), volume.PublishRequest{
		VolumeID: id, Target: target, Spec: made, Inline: true, Attributes: overlay.Attributes{NoSUID: true, NoDev: true},
	})
	publish = time.Since(begin)
	if err != nil {
		n.b.Fatal(err)
	}
	begin = time.Now()
	if err := n.manager.Unpublish(n.b.Context(), id, target); err != nil {
		n.b.Fatal(err)
	}
	return publish, time.Since(begin)
}
