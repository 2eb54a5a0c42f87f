package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// TestCrash kills the driver (SIGKILL) at random moments while workers publish and unpublish every kind of volume, and
// starts it again. Workers try again as kubelet does. In the end no mount, directory or state file is left, and
// persistent volumes have every byte that was written to them.
func TestCrash(t *testing.T) {
	takesMinutes(t)
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		crash(t, node, 8, 15, []string{"limit", "none"}, func(i int, layers string) []drivertest.Volume {
			return []drivertest.Volume{claim(fmt.Sprint("own-", i), readWriteOnce, "layers", layers)}
		})
	})
}

// TestCrashOfLimitedUppers is the same with uppers of every kind that the data root can hold. That they are mounted does
// not depend on the way in which views are.
func TestCrashOfLimitedUppers(t *testing.T) {
	takesMinutes(t)
	for system, rounds := range map[string]int{"the node's own": 8, "btrfs with quota": 4} {
		t.Run(system, func(t *testing.T) {
			node := newNode(t)
			if system != "the node's own" {
				mountImage(t, system, 2<<30, node.DataRoot, "")
			}
			start(t, node)
			crash(t, node, 4, rounds, nil, func(i int, layers string) []drivertest.Volume {
				return []drivertest.Volume{
					inline("layers", layers, "sizeLimit", "8Mi"),
					inline("layers", layers, "sizeLimit", "8Mi", "medium", "memory"),
					claim(fmt.Sprint("own-", i), readWriteOnce, "layers", layers, "sizeLimit", "8Mi"),
					claim(fmt.Sprint("image-", i), readWriteOnce, "layers", layers, "sizeLimit", "8Mi", "limit", "image"),
				}
			})
		})
	}
}

// crash has workers use volumes for so many rounds: these, more of their own, and two claims that are limited as said.
func crash(t *testing.T, node *drivertest.Node, workers, rounds int, limit []string, own func(i int, layers string) []drivertest.Volume) {
	layers := layersOf(t, node, map[string]string{"f": "layer"}, map[string]string{"g": "layer"})
	shared := create(t, node, "shared", readWriteOnce, append([]string{"layers", layers}, limit...)...)
	each := create(t, node, "each", readWriteMany, append([]string{"layers", layers, "upper", "pod"}, limit...)...)

	var publishes, kills atomic.Int64
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() { stopped <- killer(t, node, stop, &kills) }()
	err := atOnce(workers, func(i int) error {
		w := worker{t: t, node: node, publishes: &publishes, name: fmt.Sprint("worker-", i), volumes: append([]drivertest.Volume{
			inline("layers", layers),
			inline("layers", layers, "upper", "none"),
			inline("layers", layers, "upper", "volume://scratch"),
			shared,
			each,
		}, own(i, layers)...)}
		for round := range rounds {
			if err := w.round(round); err != nil {
				return err
			}
		}
		return nil
	})
	close(stop)
	must(t, errors.Join(err, <-stopped))
	t.Logf("%d publishes and as many unpublishes, %d kills", publishes.Load(), kills.Load())
	if publishes.Load() < int64(workers*rounds*5) || kills.Load() < 20 {
		t.Errorf("only %d publishes and %d kills", publishes.Load(), kills.Load())
	}

	pod := newPod(t, node, "reader")
	view := publish(t, pod, shared)
	for i := range workers {
		for round := range rounds {
			wantFile(t, filepath.Join(view, fmt.Sprintf("worker-%d-%d", i, round)), payload(round))
		}
		for _, kept := range own(i, layers) {
			if !kept.Claim {
				continue
			}
			target := publish(t, pod, kept)
			for round := range rounds {
				wantFile(t, filepath.Join(target, fmt.Sprint("round-", round)), payload(round))
			}
			unpublish(t, pod, kept)
			deleteVolume(t, node, kept)
		}
	}
	unpublish(t, pod, shared)
	deleteVolume(t, node, shared)
	deleteVolume(t, node, each)
	wantFile(t, filepath.Join(node.LayerDir, "layer-0/f"), "layer")
	wantNothingLeft(t, node)
}

// killer kills the driver until stop is closed, sometimes before it is ready. It leaves it running.
func killer(t *testing.T, node *drivertest.Node, stop chan struct{}, kills *atomic.Int64) error {
	pause := 150 * time.Millisecond
	if os.Getenv("OVERLAY_CSI_TEST_NATIVE") != "" {
		// Under emulation the driver takes longer than that to start.
		pause = 3 * time.Second
	}
	for {
		select {
		case <-stop:
			return nil
		case <-time.After(time.Duration(rand.Int64N(int64(pause)))):
		}
		if err := node.Kill(); err != nil {
			return err
		}
		kills.Add(1)
		if err := node.Start(t.Context()); err != nil {
			return err
		}
	}
}

// worker is kubelet for one pod after the other.
type worker struct {
	t         *testing.T
	node      *drivertest.Node
	publishes *atomic.Int64
	name      string
	volumes   []drivertest.Volume
}

func payload(round int) string { return fmt.Sprintf("written in round %d", round) }

func (w *worker) round(round int) error {
	pod, err := w.node.NewPod(fmt.Sprint(w.name, "-", round))
	if err != nil {
		return err
	}
	scratch, err := pod.EmptyDir("scratch")
	if err != nil {
		return err
	}
	for i := range w.volumes {
		// Inline volumes of one pod need a name each.
		if !w.volumes[i].Claim {
			w.volumes[i].Name = fmt.Sprint("v", i)
		}
		v := w.volumes[i]
		if err := w.again(func() error { _, err := pod.Publish(timeout(w.t), v); return err }); err != nil {
			return fmt.Errorf("publish %s: %w", v.Name, err)
		}
		w.publishes.Add(1)
		if err := w.use(pod, v, round); err != nil {
			return fmt.Errorf("use %s: %w", v.Name, err)
		}
	}
	for _, v := range w.volumes {
		if err := w.again(func() error { return pod.Unpublish(timeout(w.t), v) }); err != nil {
			return fmt.Errorf("unpublish %s: %w", v.Name, err)
		}
	}
	return errors.Join(os.RemoveAll(scratch), os.RemoveAll(filepath.Join(pod.Dir(), "plugins")), os.RemoveAll(pod.Dir()))
}

// use reads what must be there and writes what must be found later.
func (w *worker) use(pod *drivertest.Pod, v drivertest.Volume, round int) error {
	target := pod.Target(v.Name)
	content, err := os.ReadFile(filepath.Join(target, "f"))
	if err != nil || string(content) != "layer" {
		return fmt.Errorf("layer's file: %q, %w", content, err)
	}
	switch {
	case v.Attributes["upper"] == "none":
		return nil
	case v.ID == "shared":
		return os.WriteFile(filepath.Join(target, fmt.Sprint(pod.Name)), []byte(payload(round)), 0o644)
	case v.Claim && v.Attributes["upper"] != "pod":
		for earlier := range round {
			content, err := os.ReadFile(filepath.Join(target, fmt.Sprint("round-", earlier)))
			if err != nil || string(content) != payload(earlier) {
				return fmt.Errorf("round %d of %d: %q, %w", earlier, round, content, err)
			}
		}
		return os.WriteFile(filepath.Join(target, fmt.Sprint("round-", round)), []byte(payload(round)), 0o644)
	}
	// A view of this pod's own has nothing of another pod.
	if _, err := os.Lstat(filepath.Join(target, "own")); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("a new pod's view has a file of an earlier one: %w", err)
	}
	return os.WriteFile(filepath.Join(target, "own"), nil, 0o644)
}

// again tries until it works, as kubelet does, but for longer than any crash lasts.
func (w *worker) again(do func() error) error {
	deadline := time.Now().Add(time.Minute)
	for {
		err := do()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestStatsAreOfTheUppersFileSystem(t *testing.T) {
	node := newNode(t)
	mountImage(t, "ext4", 64<<20, node.DataRoot, "")
	start(t, node)
	v := inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	used := func(unit csi.VolumeUsage_Unit) int64 {
		response, err := node.NodeService().NodeGetVolumeStats(timeout(t), &csi.NodeGetVolumeStatsRequest{VolumeId: pod.Request(v).GetVolumeId(), VolumePath: target})
		must(t, err)
		for _, usage := range response.GetUsage() {
			if usage.GetUnit() == unit {
				if usage.GetTotal() <= 0 || usage.GetTotal() > 64<<20 || usage.GetUsed()+usage.GetAvailable() > usage.GetTotal() {
					t.Errorf("%v", usage)
				}
				return usage.GetUsed()
			}
		}
		t.Fatalf("no usage in %s", unit)
		return 0
	}
	bytes, inodes := used(csi.VolumeUsage_BYTES), used(csi.VolumeUsage_INODES)
	write(t, filepath.Join(target, "big"), string(make([]byte, 8<<20)))
	file, err := os.Open(filepath.Join(target, "big"))
	must(t, err)
	must(t, file.Sync())
	must(t, file.Close())
	must(t, syncFS(node.DataRoot))
	if grown := used(csi.VolumeUsage_BYTES) - bytes; grown < 8<<20 || grown > 9<<20 {
		t.Errorf("8 MiB written, %d bytes used", grown)
	}
	if grown := used(csi.VolumeUsage_INODES) - inodes; grown != 1 {
		t.Errorf("one file made, %d inodes used", grown)
	}
	unpublish(t, pod, v)
}
