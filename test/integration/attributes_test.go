package integration

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestDirectoryWithoutAnEntry publishes an image whose upper layer has a file in a directory of 1000, and no entry for the directory.
func TestDirectoryWithoutAnEntry(t *testing.T) {
	layer := func(entries ...registrytest.Entry) v1.Layer {
		l, err := registrytest.Layer(entries...)
		must(t, err)
		return l
	}
	owned := registrytest.Dir("lib")
	owned.Mode, owned.Uid, owned.Gid = 0o700, 1000, 1001
	bottom := layer(owned, registrytest.File("lib/a", "a"))
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		r := startRegistry(t, node, registrytest.Options{})
		pod := newPod(t, node, "pod")
		publishImage := func(name string, lowers int, layers ...v1.Layer) (drivertest.Volume, string) {
			t.Helper()
			image, err := registrytest.Image(layers...)
			must(t, err)
			v := claim(name, readWriteOnce, "layers", pushAny(t, r, name+":1", image))
			target := publish(t, pod, v)
			described, err := node.Admin().Volume(timeout(t), name)
			must(t, err)
			if got := strings.Split(described.Publications[0].Data.LowerDir, ":"); len(got) != lowers || len(described.Layers) != lowers {
				t.Errorf("%s has the layers %q on %q, want %d", name, described.Layers, got, lowers)
			}
			return v, target
		}
		usual, target := publishImage("usual", 2, bottom, layer(owned, registrytest.File("lib/b", "b")))
		wantOwner(t, filepath.Join(target, "lib"), 1000, 1001, 0o700)
		v, target := publishImage("without", 4, bottom, layer(registrytest.File("lib/b", "b")), layer(registrytest.File("lib/c", "c")))
		want := func() {
			t.Helper()
			wantOwner(t, filepath.Join(target, "lib"), 1000, 1001, 0o700)
			for _, file := range []string{"a", "b", "c"} {
				wantFile(t, filepath.Join(target, "lib", file), file)
			}
		}
		want()
		write(t, filepath.Join(target, "lib/mine"), "mine")
		unpublish(t, pod, v)
		// Without the registry, and with its layers in use, the volume is as it was.
		r.Close()
		must(t, node.Kill())
		node.AddArgs("--layer-gc-min-age=0s")
		start(t, node)
		collected, err := node.Admin().GC(timeout(t), false, true)
		must(t, err)
		if len(collected.Layers) != 0 {
			t.Errorf("a layer that a claim needs was collected: %+v", collected)
		}
		publish(t, pod, v)
		want()
		wantFile(t, filepath.Join(target, "lib/mine"), "mine")
		images, err := node.Admin().Images(timeout(t))
		must(t, err)
		var layers []int
		for _, image := range images {
			layers = append(layers, len(image.Layers))
		}
		if slices.Sort(layers); !slices.Equal(layers, []int{2, 4}) {
			t.Errorf("the images have %d layers", layers)
		}
		unpublish(t, pod, v)
		unpublish(t, pod, usual)
		deleteVolume(t, node, v)
		deleteVolume(t, node, usual)
		if collected, err = node.Admin().GC(timeout(t), false, true); err != nil || len(collected.Layers) != 5 {
			t.Errorf("%d layers are collected: %v", len(collected.Layers), err)
		}
		wantNothingLeft(t, node)
	})
}
