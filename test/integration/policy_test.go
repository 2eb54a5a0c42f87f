package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

const (
	readWriteOnce    = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	readWriteOncePod = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	readOnlyMany     = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	readWriteMany    = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
)

func inline(attributes ...string) drivertest.Volume {
	return drivertest.Volume{Name: "v", Attributes: pairs(attributes)}
}

func claim(id string, mode csi.VolumeCapability_AccessMode_Mode, attributes ...string) drivertest.Volume {
	return drivertest.Volume{Name: id, ID: id, Claim: true, Mode: mode, Attributes: pairs(attributes)}
}

func pairs(list []string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(list); i += 2 {
		m[list[i]] = list[i+1]
	}
	return m
}

// create has the driver make a claim's volume, as the provisioner does.
func create(t *testing.T, node *drivertest.Node, name string, mode csi.VolumeCapability_AccessMode_Mode,
	attributes ...string) drivertest.Volume {
	t.Helper()
	response, err := node.Controller().CreateVolume(timeout(t), &csi.CreateVolumeRequest{
		Name:               name,
		Parameters:         pairs(attributes),
		VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(mode)},
		CapacityRange:      &csi.CapacityRange{RequiredBytes: 1 << 20},
	})
	if err != nil {
		t.Fatalf("create volume: %v", err)
	}
	v := response.GetVolume()
	return drivertest.Volume{Name: name, ID: v.GetVolumeId(), Claim: true, Mode: mode, Attributes: v.GetVolumeContext()}
}

// deleteVolume deletes a volume, and tries again as a provisioner does where a process keeps a view that was unmounted: a program that
// the driver of another test starts has the mounts of all tests for a moment.
func deleteVolume(t *testing.T, node *drivertest.Node, v drivertest.Volume) {
	t.Helper()
	ctx := timeout(t)
	for {
		_, err := node.Controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.ID})
		if err == nil {
			return
		}
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			t.Fatalf("delete volume: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestInlineVolume(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		v := inline("layers", layersOf(t, node, map[string]string{"f": "top", "t": "t"}, map[string]string{"f": "middle", "m": "m"},
			map[string]string{"f": "bottom", "b": "b"}))
		one, two := newPod(t, node, "one"), newPod(t, node, "two")
		first, second := publish(t, one, v), publish(t, two, v)
		wantFile(t, filepath.Join(first, "f"), "top")
		wantFile(t, filepath.Join(first, "m"), "m")
		wantFile(t, filepath.Join(first, "b"), "b")
		write(t, filepath.Join(first, "mine"), "one")
		wantAbsent(t, filepath.Join(second, "mine"))
		wantMountFlags(t, first, unix.ST_NOSUID|unix.ST_NODEV, unix.ST_RDONLY|unix.ST_NOEXEC)
		unpublish(t, one, v)
		unpublish(t, two, v)
		removePod(t, one)
		removePod(t, two)
		wantNothingLeft(t, node)
	})
}

func TestEphemeralViewsAreVolatile(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "f"})
	pod := newPod(t, node, "pod")
	for _, c := range []struct {
		volume   drivertest.Volume
		volatile bool
	}{
		{inline("layers", layers), true},
		{claim("kept", readWriteOnce, "layers", layers), false},
		{claim("many", readWriteMany, "layers", layers, "upper", "pod"), true},
	} {
		t.Run(c.volume.Name, func(t *testing.T) {
			options, err := drivertest.Options(publish(t, pod, c.volume))
			must(t, err)
			if got := strings.Contains(strings.Join(options, ","), "volatile"); got != c.volatile {
				t.Errorf("volatile is %v: %q", got, options)
			}
			unpublish(t, pod, c.volume)
		})
	}
}

func TestReadOnlyVolume(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		one := layersOf(t, node, map[string]string{"f": "one"})
		for name, v := range map[string]drivertest.Volume{
			"inline none":      inline("layers", one, "upper", "none"),
			"ReadOnlyMany":     claim("rox", readOnlyMany, "layers", one),
			"readOnly request": {Name: "v", ReadOnly: true, Attributes: pairs([]string{"layers", one})},
		} {
			t.Run(name, func(t *testing.T) {
				a, b := newPod(t, node, "a"), newPod(t, node, "b")
				target := publish(t, a, v)
				wantFile(t, filepath.Join(target, "f"), "one")
				wantFile(t, filepath.Join(publish(t, b, v), "f"), "one")
				if err := os.WriteFile(filepath.Join(target, "g"), nil, 0o644); !isErrno(err, unix.EROFS) {
					t.Errorf("writing to a read-only view: %v", err)
				}
				unpublish(t, a, v)
				unpublish(t, b, v)
				wantNothingLeft(t, node)
			})
		}
	})
}

func TestPersistentVolume(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		layers := layersOf(t, node, map[string]string{"f": "layer"})
		for name, v := range map[string]drivertest.Volume{
			"static":      claim("static-pv", readWriteOnce, "layers", layers),
			"provisioned": create(t, node, "pvc-1", readWriteOnce, "layers", layers),
		} {
			t.Run(name, func(t *testing.T) {
				for turn, want := range []string{"layer", "layer+", "layer++"} {
					pod := newPod(t, node, "pod")
					target := publish(t, pod, v)
					wantFile(t, filepath.Join(target, "f"), want)
					write(t, filepath.Join(target, "f"), want+"+")
					unpublish(t, pod, v)
					removePod(t, pod)
					if turn == 1 {
						must(t, node.Stop())
						start(t, node)
					}
				}
				wantFile(t, filepath.Join(node.LayerDir, "layer-0", "f"), "layer")
				deleteVolume(t, node, v)
			})
		}
		wantNothingLeft(t, node)
	})
}

// TestLostVolumeIsNotReplacedByAnEmptyOne: a node that was set up anew has the name of the old one, and none of its data.
func TestLostVolumeIsNotReplacedByAnEmptyOne(t *testing.T) {
	node := startNode(t)
	v := create(t, node, "pvc-lost", readWriteOnce, "layers", layersOf(t, node, map[string]string{"f": "layer"}))
	v.Attributes["storage.kubernetes.io/csiProvisionerIdentity"] = "1-2-overlay-csi.github.io"
	pod := newPod(t, node, "pod")
	publish(t, pod, v)
	unpublish(t, pod, v)
	deleteVolume(t, node, v)
	_, err := pod.Publish(timeout(t), v)
	wantCode(t, err, codes.NotFound, "test-node", "lost")
	wantNothingLeft(t, node)
}

func TestPodsShareOneOverlayOfAClaim(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		v := create(t, node, "shared", readWriteOnce, "layers", layersOf(t, node, map[string]string{"f": "layer"}))
		one, two, reader := newPod(t, node, "one"), newPod(t, node, "two"), newPod(t, node, "reader")
		first, second := publish(t, one, v), publish(t, two, v)
		readOnly := v
		readOnly.ReadOnly = true
		third := publish(t, reader, readOnly)
		if a, b := device(t, first), device(t, second); a != b {
			t.Errorf("two overlays on one upper: devices %d and %d", a, b)
		}
		write(t, filepath.Join(first, "f"), "one")
		wantFile(t, filepath.Join(second, "f"), "one")
		wantFile(t, filepath.Join(third, "f"), "one")
		if err := os.WriteFile(filepath.Join(third, "f"), nil, 0o644); !isErrno(err, unix.EROFS) {
			t.Errorf("writing to the read-only bind: %v", err)
		}
		wantMountFlags(t, second, unix.ST_NOSUID|unix.ST_NODEV, unix.ST_RDONLY)
		// The first one goes: the view of the others stays.
		unpublish(t, one, v)
		write(t, filepath.Join(second, "g"), "two")
		unpublish(t, reader, readOnly)
		unpublish(t, two, v)
		target := publish(t, newPod(t, node, "three"), v)
		wantFile(t, filepath.Join(target, "g"), "two")
		_, err := node.Controller().DeleteVolume(timeout(t), &csi.DeleteVolumeRequest{VolumeId: v.ID})
		wantCode(t, err, codes.FailedPrecondition, "published")
	})
}

func TestSingleWriterClaimRefusesASecondPod(t *testing.T) {
	node := startNode(t)
	v := create(t, node, "one-pod", readWriteOncePod, "layers", layersOf(t, node, map[string]string{"f": "layer"}))
	one, two := newPod(t, node, "one"), newPod(t, node, "two")
	publish(t, one, v)
	_, err := two.Publish(timeout(t), v)
	wantCode(t, err, codes.FailedPrecondition, "one pod", "default/one")
	wantAbsent(t, two.Target(v.Name))
	unpublish(t, one, v)
	publish(t, two, v)
	unpublish(t, two, v)
}

func TestClaimWithAnUpperForEachPod(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		layers := layersOf(t, node, map[string]string{"f": "layer"})
		for _, mode := range []csi.VolumeCapability_AccessMode_Mode{readWriteMany, readWriteOnce} {
			v := create(t, node, "each-"+mode.String(), mode, "layers", layers, "upper", "pod")
			one, two := newPod(t, node, "one"), newPod(t, node, "two")
			first, second := publish(t, one, v), publish(t, two, v)
			write(t, filepath.Join(first, "f"), "one")
			wantFile(t, filepath.Join(second, "f"), "layer")
			unpublish(t, one, v)
			wantFile(t, filepath.Join(second, "f"), "layer")
			again := publish(t, one, v)
			wantFile(t, filepath.Join(again, "f"), "layer")
			unpublish(t, one, v)
			unpublish(t, two, v)
			deleteVolume(t, node, v)
		}
		wantNothingLeft(t, node)
	})
}

func TestRootOfAViewLooksLikeTheTopmostLayer(t *testing.T) {
	node := startNode(t)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
	layer := filepath.Join(node.LayerDir, "layer-0")
	must(t, os.Chown(layer, 1000, 2000))
	must(t, os.Chmod(layer, 0o770|os.ModeSetgid))
	target := publish(t, newPod(t, node, "pod"), v)
	var stat unix.Stat_t
	must(t, unix.Stat(target, &stat))
	if stat.Uid != 1000 || stat.Gid != 2000 || stat.Mode&0o7777 != 0o2770 {
		t.Errorf("the view's root is %d:%d with mode %o", stat.Uid, stat.Gid, stat.Mode&0o7777)
	}
}

func TestMountOptions(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		layers := layersOf(t, node, map[string]string{"f": "f"})
		pod := newPod(t, node, "pod")
		v := claim("options", readWriteOnce, "layers", layers)
		v.Options = []string{"noexec", "noatime"}
		target := publish(t, pod, v)
		wantMountFlags(t, target, unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC|unix.ST_NOATIME, unix.ST_RDONLY)
		unpublish(t, pod, v)
		for option, words := range map[string]string{"suid": "--allow-mount-option=suid", "lowerdir=/etc": "allowed are",
			"context=x": "allowed are"} {
			t.Run(option, func(t *testing.T) {
				v.Options = []string{option}
				_, err := pod.Publish(timeout(t), v)
				wantCode(t, err, codes.InvalidArgument, words)
			})
		}
	})
	t.Run("permitted", func(t *testing.T) {
		node := startNode(t, "--allow-mount-option=suid,dev")
		v := claim("options", readWriteOnce, "layers", layersOf(t, node, map[string]string{"f": "f"}))
		v.Options = []string{"suid", "dev"}
		wantMountFlags(t, publish(t, newPod(t, node, "pod"), v), 0, unix.ST_NOSUID|unix.ST_NODEV)
	})
}

// wantMountFlags checks the flags of statfs(2).
func wantMountFlags(t *testing.T, path string, set, clear int64) {
	t.Helper()
	var stat unix.Statfs_t
	must(t, unix.Statfs(path, &stat))
	if stat.Flags&set != set || stat.Flags&clear != 0 {
		t.Errorf("mount flags of %s are %#x: wanted %#x and not %#x", path, stat.Flags, set, clear)
	}
}

func device(t *testing.T, path string) uint64 {
	t.Helper()
	var stat unix.Stat_t
	must(t, unix.Stat(path, &stat))
	return stat.Dev
}
