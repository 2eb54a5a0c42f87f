package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// allVolumes is a volume of each kind and policy.
func allVolumes(t *testing.T, node *drivertest.Node) map[string]drivertest.Volume {
	layers := layersOf(t, node, map[string]string{"f": "layer"}, map[string]string{"g": "layer"})
	return map[string]drivertest.Volume{
		"inline pod":         inline("layers", layers),
		"inline none":        inline("layers", layers, "upper", "none"),
		"inline volume://":   inline("layers", layers, "upper", "volume://scratch/up"),
		"static":             claim("static", readWriteOnce, "layers", layers),
		"static pod":         claim("static-pod", readWriteMany, "layers", layers, "upper", "pod"),
		"provisioned":        create(t, node, "provisioned", readWriteOnce, "layers", layers),
		"provisioned RWOP":   create(t, node, "rwop", readWriteOncePod, "layers", layers),
		"provisioned ROX":    create(t, node, "rox", readOnlyMany, "layers", layers),
		"provisioned volume": create(t, node, "in-volume", readWriteOnce, "layers", layers, "upper", "volume://scratch/claim"),
	}
}

func TestEveryRPCTwice(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		for name, v := range allVolumes(t, node) {
			t.Run(name, func(t *testing.T) {
				pod := newPod(t, node, "pod")
				_, err := pod.EmptyDir("scratch")
				must(t, err)
				for range 2 {
					wantFile(t, filepath.Join(publish(t, pod, v), "f"), "layer")
				}
				mounts, err := drivertest.Mounts(pod.Target(v.Name))
				must(t, err)
				if len(mounts) != 1 {
					t.Errorf("%d mounts at the target", len(mounts))
				}
				for range 2 {
					_, err := node.NodeService().NodeGetVolumeStats(timeout(t),
						&csi.NodeGetVolumeStatsRequest{VolumeId: pod.Request(v).GetVolumeId(), VolumePath: pod.Target(v.Name)})
					must(t, err)
				}
				for range 2 {
					unpublish(t, pod, v)
				}
				if v.Claim {
					deleteVolume(t, node, v)
					deleteVolume(t, node, v)
				}
			})
		}
		wantNothingLeft(t, node)
	})
}

// publishInTurn publishes a volume as kubelet does: again while the operations of others on it take their time.
func publishInTurn(t *testing.T, pod *drivertest.Pod, v drivertest.Volume) (string, error) {
	ctx := timeout(t)
	for {
		target, err := pod.Publish(ctx, v)
		if status.Code(err) != codes.Aborted || ctx.Err() != nil {
			return target, err
		}
	}
}

func TestThirtyTwoAtOnceOnOneVolume(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		for name, v := range allVolumes(t, node) {
			t.Run(name, func(t *testing.T) {
				pod := newPod(t, node, "pod")
				_, err := pod.EmptyDir("scratch")
				must(t, err)
				must(t, atOnce(32, func(int) error { _, err := publishInTurn(t, pod, v); return err }))
				wantFile(t, filepath.Join(pod.Target(v.Name), "f"), "layer")
				mounts, err := drivertest.Mounts(pod.Target(v.Name))
				must(t, err)
				if len(mounts) != 1 {
					t.Errorf("%d mounts at the target", len(mounts))
				}
				must(t, atOnce(32, func(int) error { return pod.Unpublish(timeout(t), v) }))
				if v.Claim {
					deleteVolume(t, node, v)
				}
			})
		}
		wantNothingLeft(t, node)
	})
}

// TestFiftyPodsAtOnce is Dynatrace/dynatrace-operator #1401: many pods at once got each other's state.
func TestFiftyPodsAtOnce(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		layers := layersOf(t, node, map[string]string{"f": "layer"})
		own := inline("layers", layers)
		shared := create(t, node, "shared", readWriteOnce, "layers", layers)
		each := create(t, node, "each", readWriteMany, "layers", layers, "upper", "pod")
		pods := make([]*drivertest.Pod, 50)
		for i := range pods {
			pods[i] = newPod(t, node, fmt.Sprint("pod-", i))
		}
		for range 2 {
			must(t, atOnce(len(pods), func(i int) error {
				for _, v := range []drivertest.Volume{own, shared, each} {
					target, err := publishInTurn(t, pods[i], v)
					if err != nil {
						return err
					}
					if err := os.WriteFile(filepath.Join(target, fmt.Sprint("of-", i)), nil, 0o644); err != nil {
						return err
					}
				}
				return nil
			}))
			for i, pod := range pods {
				for _, v := range []drivertest.Volume{own, each} {
					entries, err := os.ReadDir(pod.Target(v.Name))
					must(t, err)
					if len(entries) != 2 {
						t.Fatalf("pod %d sees %d entries in its own %s: %v", i, len(entries), v.Name, entries)
					}
				}
				entries, err := os.ReadDir(pod.Target(shared.Name))
				must(t, err)
				if len(entries) != 51 {
					t.Fatalf("pod %d sees %d entries in the shared volume", i, len(entries))
				}
			}
			must(t, atOnce(len(pods), func(i int) error {
				return errors.Join(pods[i].Unpublish(timeout(t), own), pods[i].Unpublish(timeout(t), shared), pods[i].Unpublish(timeout(t), each))
			}))
		}
		deleteVolume(t, node, shared)
		deleteVolume(t, node, each)
		wantNothingLeft(t, node)
	})
}

func TestPublishRacesUnpublish(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		for name, v := range allVolumes(t, node) {
			t.Run(name, func(t *testing.T) {
				pod := newPod(t, node, "pod")
				_, err := pod.EmptyDir("scratch")
				must(t, err)
				for range 10 {
					must(t, atOnce(8, func(i int) error {
						request := pod.Request(v)
						if i%2 == 0 {
							_, err := pod.Publish(timeout(t), v)
							if status.Code(err) == codes.FailedPrecondition || isErrno(err, unix.ENOENT) {
								// The other one has removed kubelet's directory of the volume.
								return nil
							}
							return err
						}
						_, err := node.NodeService().NodeUnpublishVolume(timeout(t),
							&csi.NodeUnpublishVolumeRequest{VolumeId: request.VolumeId, TargetPath: request.TargetPath})
						return err
					}))
					mounts, err := drivertest.Mounts(pod.Target(v.Name))
					must(t, err)
					if len(mounts) > 1 {
						t.Fatalf("%d mounts at the target", len(mounts))
					}
				}
				unpublish(t, pod, v)
				if v.Claim {
					deleteVolume(t, node, v)
				}
			})
		}
		wantNothingLeft(t, node)
	})
}

// TestPublishWhileThePredecessorIsUnmounted is dynatrace-operator #3388: a publish that came while the target was still
// being unmounted was answered "already done", and the pod got an empty directory.
func TestPublishWhileThePredecessorIsUnmounted(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	for _, v := range []drivertest.Volume{inline("layers", layers), claim("kept", readWriteOnce, "layers", layers)} {
		pod := newPod(t, node, "pod")
		target := publish(t, pod, v)
		for range 50 {
			// Much to sync makes the unmount of a persistent upper slow.
			must(t, os.WriteFile(filepath.Join(target, "big"), make([]byte, 4<<20), 0o644))
			unpublishing := make(chan error, 1)
			go func() {
				request := pod.Request(v)
				_, err := node.NodeService().NodeUnpublishVolume(timeout(t),
					&csi.NodeUnpublishVolumeRequest{VolumeId: request.VolumeId, TargetPath: request.TargetPath})
				unpublishing <- err
			}()
			time.Sleep(200 * time.Microsecond)
			publish(t, pod, v)
			must(t, <-unpublishing)
			// Whichever came first, the last word decides: after one more publish the volume is there.
			publish(t, pod, v)
			wantFile(t, filepath.Join(target, "f"), "layer")
		}
		unpublish(t, pod, v)
	}
}

// TestBlockedUnmountHoldsNothingUp is aws-fsx-csi-driver #495: an unmount that hung held a lock that all volumes needed.
func TestBlockedUnmountHoldsNothingUp(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	pod := newPod(t, node, "pod")
	volume := sibling(t, pod, "data", "ext4")
	blocked := inline("layers", layers, "upper", "volume://data/up")
	write(t, filepath.Join(publish(t, pod, blocked), "f"), "dirty")

	// A frozen file system lets nobody write: the unmount waits for its sync.
	dir, err := os.Open(volume)
	must(t, err)
	defer dir.Close()
	must(t, unix.IoctlSetInt(int(dir.Fd()), fiFreeze, 0))
	thawed := false
	thaw := func() {
		if !thawed {
			thawed = true
			must(t, unix.IoctlSetInt(int(dir.Fd()), fiThaw, 0))
		}
	}
	defer thaw()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	wantCode(t, pod.Unpublish(ctx, blocked), codes.DeadlineExceeded)
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := pod.Publish(ctx, blocked); err == nil {
		t.Error("published while the unmount hangs")
	}

	other := inline("layers", layers)
	other.Name = "other"
	for range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, err := pod.Publish(ctx, other)
		must(t, errors.Join(err, pod.Unpublish(ctx, other)))
		cancel()
	}
	thaw()
	dir.Close()
	unpublish(t, pod, blocked)
	wantFile(t, filepath.Join(volume, "up/upper/f"), "dirty")
	must(t, unix.Unmount(volume, 0))
}

// FIFREEZE and FITHAW of include/uapi/linux/fs.h.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// TestUnpublishIsSureThatNothingIsMounted is moosefs-csi #34: unpublish answered OK while the target was mounted still.
func TestUnpublishIsSureThatNothingIsMounted(t *testing.T) {
	node := startNode(t)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}))
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	open, err := os.Open(filepath.Join(target, "f"))
	must(t, err)
	err = pod.Unpublish(timeout(t), v)
	wantCode(t, err, codes.Unavailable, "open")
	wantFile(t, filepath.Join(target, "f"), "layer")
	must(t, open.Close())

	// Somebody mounted the view once more on itself.
	must(t, unix.Mount(target, target, "", unix.MS_BIND, ""))
	unpublish(t, pod, v)
	mounts, err := drivertest.Mounts(target)
	must(t, err)
	if len(mounts) != 0 {
		t.Errorf("%d mounts are left", len(mounts))
	}
	wantNothingLeft(t, node)
}

// atOnce does something so many times side by side.
func atOnce(n int, do func(i int) error) error {
	var group sync.WaitGroup
	failed := make([]error, n)
	for i := range n {
		group.Go(func() { failed[i] = do(i) })
	}
	group.Wait()
	return errors.Join(failed...)
}
