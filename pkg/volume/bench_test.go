package volume_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	mount "k8s.io/mount-utils"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

// BenchmarkPublishUnpublish is what a view costs without gRPC around it.
func BenchmarkPublishUnpublish(b *testing.B) {
	dir := b.TempDir()
	root, err := volume.OpenDataRoot(filepath.Join(dir, "data"))
	if err != nil {
		b.Skip(err)
	}
	defer root.Close()
	features, err := overlay.Probe(dir)
	if err != nil {
		b.Fatal(err)
	}
	mounter, err := overlay.NewMounter(filepath.Join(root.Path(), "mounter"), features, mount.NewWithoutSystemd(""))
	if err != nil {
		b.Fatal(err)
	}
	defer mounter.Close()
	opener, err := overlay.NewOpener(features)
	if err != nil {
		b.Fatal(err)
	}
	defer opener.Close()
	if quiet := opener.Quiet(root.Dir()); quiet != nil {
		root.UseMount(quiet)
	}
	forbidden, err := layer.Forbid(root.Path())
	if err != nil {
		b.Fatal(err)
	}
	layers := filepath.Join(dir, "layers")
	for _, name := range []string{"a", "b", "c"} {
		if err := os.MkdirAll(filepath.Join(layers, name), 0o755); err != nil {
			b.Fatal(err)
		}
	}
	roots, err := layer.NewRoots(map[string]layer.Root{"r": {Path: layers}}, forbidden, opener)
	if err != nil {
		b.Fatal(err)
	}
	kubeletDir := kubelet.Dir(filepath.Join(dir, "kubelet"))
	podVolumes := layer.NewPodVolumes(kubelet.NewPodVolumes(kubeletDir, nil, 0), forbidden)
	manager := volume.NewManager(volume.Config{Node: "n", BootID: "b", ReconcileInterval: time.Hour}, root, mounter, layer.NewResolver(roots, podVolumes, nil), podVolumes, kubeletDir)
	ctx := context.Background()
	spec, err := volume.ParseSpec(map[string]string{"layers": "dir://r/a,dir://r/b,dir://r/c"}, volume.Usage{Inline: true})
	if err != nil {
		b.Fatal(err)
	}
	var publish, unpublish time.Duration
	i := 0
	for b.Loop() {
		i++
		id := fmt.Sprint("v", i)
		begin := time.Now()
		err := manager.Publish(ctx, volume.PublishRequest{VolumeID: id, Target: filepath.Join(dir, "target"), Spec: spec, Inline: true, Attributes: overlay.Attributes{NoSUID: true, NoDev: true}})
		if err != nil {
			b.Fatal(err)
		}
		publish += time.Since(begin)
		begin = time.Now()
		if err := manager.Unpublish(ctx, id, filepath.Join(dir, "target")); err != nil {
			b.Fatal(err)
		}
		unpublish += time.Since(begin)
	}
	b.ReportMetric(float64(publish.Microseconds())/float64(b.N), "µs/publish")
	b.ReportMetric(float64(unpublish.Microseconds())/float64(b.N), "µs/unpublish")
}
