package integration

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

func TestManyLayers(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		for _, count := range []int{1, 3, 128, 500} {
			for _, policy := range []string{"pod", "none"} {
				t.Run(fmt.Sprint(count, " ", policy), func(t *testing.T) {
					layers := make([]map[string]string, count)
					for i := range layers {
						layers[i] = map[string]string{"shared": fmt.Sprint(i), fmt.Sprint("only-", i): fmt.Sprint(i)}
					}
					v := inline("layers", layersOf(t, node, layers...), "upper", policy)
					pod := newPod(t, node, "pod")
					target := publish(t, pod, v)
					wantFile(t, filepath.Join(target, "shared"), "0")
					for i := range layers {
						wantFile(t, filepath.Join(target, fmt.Sprint("only-", i)), fmt.Sprint(i))
					}
					unpublish(t, pod, v)
				})
			}
		}
		wantNothingLeft(t, node)
	})
}

func TestLayerPathsWithSpecialCharacters(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		names := []string{"with space", "colon:colon", "comma,comma", `back\slash`, "new\nline", " leading", "trailing ", "per%cent", "quo\"te'",
			"ünïcödé", "\xff\xfe", "a=b?c#d", "-o", "lowerdir+"}
		refs := make([]string, len(names))
		for i, name := range names {
			if _, err := node.Layer(name, map[string]string{fmt.Sprint("in-", i): name}); err != nil {
				t.Fatal(err)
			}
			refs[i] = "dir://layers/" + url.PathEscape(name)
		}
		v := inline("layers", strings.Join(refs, ","))
		pod := newPod(t, node, "pod")
		target := publish(t, pod, v)
		for i, name := range names {
			wantFile(t, filepath.Join(target, fmt.Sprint("in-", i)), name)
		}
		unpublish(t, pod, v)
		wantNothingLeft(t, node)
	})
}

func TestLayersOnEveryFileSystem(t *testing.T) {
	files := map[string]string{"dir/f": "from the layer", "g": "g"}
	node := startNode(t, "--layer-root-allow-submounts=layers")
	content := filepath.Join(node.Dir, "content")
	fill(t, content, files)
	for _, kind := range []string{"tmpfs", "ext4", "xfs", "btrfs", "erofs", "squashfs"} {
		t.Run(kind, func(t *testing.T) {
			layer := filepath.Join(node.LayerDir, kind)
			switch kind {
			case "tmpfs":
				must(t, os.Mkdir(layer, 0o755))
				mountTmpfs(t, layer)
			default:
				mountImage(t, kind, 512<<20, layer, content)
			}
			if kind != "erofs" && kind != "squashfs" {
				fill(t, layer, files)
			}
			v := inline("layers", drivertest.Layers(kind))
			pod := newPod(t, node, "pod")
			target := publish(t, pod, v)
			wantFile(t, filepath.Join(target, "dir/f"), "from the layer")
			write(t, filepath.Join(target, "dir/f"), "from the pod")
			wantFile(t, filepath.Join(target, "dir/f"), "from the pod")
			wantFile(t, filepath.Join(layer, "dir/f"), "from the layer")
			must(t, os.Remove(filepath.Join(target, "g")))
			wantFile(t, filepath.Join(layer, "g"), "g")
			unpublish(t, pod, v)
		})
	}
	wantNothingLeft(t, node)
}

func TestMountsBeneathALayerRootAreNoLayers(t *testing.T) {
	node := startNode(t)
	if _, err := node.Layer("mounted", nil); err != nil {
		t.Fatal(err)
	}
	mountTmpfs(t, filepath.Join(node.LayerDir, "mounted"))
	_, err := newPod(t, node, "pod").Publish(timeout(t), inline("layers", drivertest.Layers("mounted")))
	wantCode(t, err, codes.InvalidArgument, "mount", "--layer-root-allow-submounts=layers")
	wantNothingLeft(t, node)
}

func TestLayerSurvivesWhatPodsDo(t *testing.T) {
	node := startNode(t)
	files := map[string]string{"keep": "keep", "dir/a": "a", "dir/b": "b"}
	v := inline("layers", layersOf(t, node, files))
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	must(t, os.RemoveAll(filepath.Join(target, "dir")))
	must(t, os.Mkdir(filepath.Join(target, "dir"), 0o755))
	write(t, filepath.Join(target, "dir/c"), "c")
	must(t, os.Chmod(filepath.Join(target, "keep"), 0o600))
	must(t, os.Rename(filepath.Join(target, "keep"), filepath.Join(target, "kept")))
	unpublish(t, pod, v)
	for name, content := range files {
		wantFile(t, filepath.Join(node.LayerDir, "layer-0", name), content)
	}
	wantAbsent(t, filepath.Join(node.LayerDir, "layer-0", "dir/c"))
}

// TestRenameRaceLeavesNoLayerRoot swaps a directory of a layer's path with a link out of the layer root, again and
// again, while pods are published: a publish gets the directory, or is refused, and never gets what the link leads to.
func TestRenameRaceLeavesNoLayerRoot(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		if _, err := node.Layer("swapped/sub", map[string]string{"f": "layer"}); err != nil {
			t.Fatal(err)
		}
		outside := filepath.Join(node.Dir, "outside")
		fill(t, outside, map[string]string{"sub/f": "secret"})
		link := filepath.Join(node.LayerDir, "link")
		must(t, os.Symlink(outside, link))
		stop, stopped := make(chan struct{}), make(chan error, 1)
		go func() {
			for {
				select {
				case <-stop:
					stopped <- nil
					return
				default:
				}
				if err := unix.Renameat2(unix.AT_FDCWD, link, unix.AT_FDCWD, filepath.Join(node.LayerDir, "swapped"),
					unix.RENAME_EXCHANGE); err != nil {
					stopped <- err
					return
				}
			}
		}()
		v := inline("layers", drivertest.Layers("swapped/sub"))
		pod := newPod(t, node, "pod")
		var published, refused int
		for range 150 {
			target, err := pod.Publish(timeout(t), v)
			if err != nil {
				refused++
				if code := status.Code(err); code != codes.InvalidArgument && code != codes.Unavailable {
					t.Errorf("refused with %v", err)
				}
				continue
			}
			published++
			wantFile(t, filepath.Join(target, "f"), "layer")
			unpublish(t, pod, v)
		}
		close(stop)
		must(t, <-stopped)
		if published == 0 || refused == 0 {
			t.Errorf("no race: %d published, %d refused", published, refused)
		}
	})
}
