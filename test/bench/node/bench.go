package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/overlay-csi/overlay-csi/test/bench/durations"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// bench is a node of one scenario.
type bench struct {
	node     *drivertest.Node
	layers   string
	follower *follower
}

// view is a volume of a pod.
type view struct {
	pod    *drivertest.Pod
	volume drivertest.Volume
}

// newBench starts a driver in a directory of its own, with three small layers.
func newBench(ctx context.Context, follower *follower, dir, name, binary string, args ...string) (*bench, error) {
	node, err := drivertest.NewNode(filepath.Join(dir, name), binary, args...)
	if err != nil {
		return nil, err
	}
	if err := node.Start(ctx); err != nil {
		return nil, err
	}
	names := []string{"top", "middle", "bottom"}
	for _, layer := range names {
		if _, err := node.Layer(layer, map[string]string{"file": layer, layer: layer}); err != nil {
			return nil, errors.Join(err, node.Kill())
		}
	}
	return &bench{node: node, layers: drivertest.Layers(names...), follower: follower}, nil
}

// close ends the driver, and gives back the disk that the scenario took.
func (b *bench) close() error {
	return errors.Join(b.node.Stop(), drivertest.UnmountBeneath(b.node.Dir), os.RemoveAll(b.node.Dir))
}

// attributes are those of a volume, in pairs.
func attributes(pairs ...string) map[string]string {
	keys := map[string]string{}
	for i := 0; i+1 < len(pairs); i += 2 {
		keys[pairs[i]] = pairs[i+1]
	}
	return keys
}

// newView makes a pod, and the directory of its volume: kubelet's work, not the driver's.
func (b *bench) newView(v drivertest.Volume) (view, error) {
	v.Name = "v"
	pod, err := b.node.NewPod("bench")
	if err != nil {
		return view{}, err
	}
	return view{pod: pod, volume: v}, os.MkdirAll(filepath.Dir(pod.Target(v.Name)), 0o755)
}

func (b *bench) newViews(n int, v drivertest.Volume) ([]view, error) {
	views := make([]view, n)
	for i := range views {
		var err error
		if views[i], err = b.newView(v); err != nil {
			return nil, err
		}
	}
	return views, nil
}

func (b *bench) publish(ctx context.Context, v view) error {
	_, err := b.node.NodeService().NodePublishVolume(ctx, v.pod.Request(v.volume))
	return err
}

func (b *bench) unpublish(ctx context.Context, v view) error {
	request := v.pod.Request(v.volume)
	_, err := b.node.NodeService().NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{
		VolumeId: request.VolumeId, TargetPath: request.TargetPath,
	})
	return err
}

func (b *bench) stats(ctx context.Context, v view) error {
	request := v.pod.Request(v.volume)
	_, err := b.node.NodeService().NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{
		VolumeId: request.VolumeId, VolumePath: request.TargetPath,
	})
	return err
}

// claim has the driver make the volume of a claim.
func (b *bench) claim(ctx context.Context, name string, bytes int64, parameters map[string]string) (drivertest.Volume, error) {
	mode := csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	response, err := b.node.Controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name, Parameters: parameters, VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(mode)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: bytes},
	})
	made := response.GetVolume()
	return drivertest.Volume{ID: made.GetVolumeId(), Claim: true, Mode: mode, Attributes: made.GetVolumeContext()}, err
}

func (b *bench) delete(ctx context.Context, v drivertest.Volume) error {
	_, err := b.node.Controller().DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.ID})
	return err
}

func (b *bench) capacity(ctx context.Context) error {
	_, err := b.node.Controller().GetCapacity(ctx, &csi.GetCapacityRequest{})
	return err
}

// discard removes the directories of pods, as kubelet does. It is done after all of a measurement: ext4 looks past each recently
// deleted inode when it makes a directory.
func discard(views []view) error {
	var failed error
	for _, v := range views {
		failed = errors.Join(failed, os.RemoveAll(v.pod.Dir()))
	}
	return failed
}

// settle waits until the driver has deleted what it is to delete in the background.
func (b *bench) settle(ctx context.Context) error {
	for {
		entries, err := os.ReadDir(filepath.Join(b.node.DataRoot, "trash"))
		if err != nil || len(entries) == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// restart ends the driver by SIGQUIT, of which the Go runtime writes all goroutines, and starts it again. It returns how many there
// were, and how long the start took until the driver was ready.
func (b *bench) restart(ctx context.Context) (goroutines int, took time.Duration, err error) {
	pid, before := b.node.PID(), len(b.node.Log())
	if err := syscall.Kill(pid, syscall.SIGQUIT); err != nil {
		return 0, 0, err
	}
	for syscall.Kill(pid, 0) == nil {
		time.Sleep(10 * time.Millisecond)
	}
	for line := range strings.Lines(b.node.Log()[before:]) {
		if strings.HasPrefix(line, "goroutine ") && !strings.HasPrefix(line, "goroutine 0 ") {
			goroutines++
		}
	}
	if err := b.node.Kill(); err != nil {
		return 0, 0, err
	}
	begin := time.Now()
	err = b.node.Start(ctx)
	return goroutines, time.Since(begin), err
}

// checkEmpty returns an error if a driver with no volume has left something on the node.
func (b *bench) checkEmpty() error {
	found, err := b.node.Leftovers()
	if err != nil {
		return err
	}
	loops, err := drivertest.LoopDevices(b.node.Dir)
	if err != nil {
		return err
	}
	if found = append(found, loops...); len(found) > 0 {
		return fmt.Errorf("the driver left %d things, such as %q", len(found), found[:min(5, len(found))])
	}
	return nil
}

// series is how long one thing took, again and again, in this order.
type series []time.Duration

// time measures something once.
func (s *series) time(do func() error) error {
	begin := time.Now()
	err := do()
	*s = append(*s, time.Since(begin))
	return err
}

const (
	seriesHead = "| what | times | first p50 | first p99 | last p50 | last p99 | last to first |\n" +
		"| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
	// edge is how many of the first and of the last are compared.
	edge = 100
)

// print writes a row that compares the first with the last.
func (s series) print(name string) {
	n := max(1, min(edge, len(s)/2))
	first, last := s[:n], s[len(s)-n:]
	fmt.Printf("| %s | %d |", name, len(s))
	for _, part := range []series{first, last} {
		fmt.Printf(" %s | %s |", durations.Milliseconds(durations.Quantile(part, 50)), durations.Milliseconds(durations.Quantile(part, 99)))
	}
	fmt.Printf(" %.2f |\n", durations.Ratio(durations.Quantile(last, 50), durations.Quantile(first, 50)))
}
