package volume_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"k8s.io/klog/v2"
	mount "k8s.io/mount-utils"
	"k8s.io/utils/exec"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/kubeapi"
	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
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

// benchNode is a manager with all that it needs.
type benchNode struct {
	b       *testing.B
	dir     string
	manager *volume.Manager
	certs   string
	count   int
}

func newBenchNode(b *testing.B) *benchNode {
	dir := b.TempDir()
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
	return &benchNode{b: b, dir: dir, certs: certs, manager: volume.NewManager(volume.Config{
		Node: "n", BootID: "b", ReconcileInterval: time.Hour, Overcommit: 1, Root: root, Records: records, Mounter: mounter,
		Layers: layer.NewResolver(roots, podVolumes, images), PodVolumes: podVolumes, Pods: kubeletDir, Backends: backends,
	})}
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
	parsed, err := spec.Parse(map[string]string{"layers": layers}, spec.Scope{Inline: true})
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
