package integration

import (
	"context"
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
		c := crash{workers: 8, rounds: proof(2, 15), kills: proof(8, 40), limit: []string{"sizeEnforcement", "none"}}
		c.run(t, node, func(i int, layers string) []drivertest.Volume {
			return []drivertest.Volume{claim(fmt.Sprint("own-", i), readWriteOnce, "layers", layers)}
		})
	})
}

// crashSystems are the file systems of the data root under which TestCrashOfLimitedUppers runs.
var crashSystems = []string{"the node's own", "btrfs with quota"}

// TestCrashOfLimitedUppers is the same with uppers of every kind that the data root can hold. That they are mounted does
// not depend on the way in which views are.
func TestCrashOfLimitedUppers(t *testing.T) {
	takesMinutes(t)
	for _, system := range crashSystems {
		t.Run(system, func(t *testing.T) {
			node := newNode(t)
			if system != "the node's own" {
				mountImage(t, system, 2<<30, node.DataRoot, "")
			}
			start(t, node)
			c := crash{workers: 4, rounds: proof(2, 8), kills: proof(8, 40)}
			c.run(t, node, func(i int, layers string) []drivertest.Volume {
				return []drivertest.Volume{
					inline("layers", layers, "sizeLimit", "8Mi"),
					inline("layers", layers, "sizeLimit", "8Mi", "medium", "memory"),
					claim(fmt.Sprint("own-", i), readWriteOnce, "layers", layers, "sizeLimit", "8Mi"),
					claim(fmt.Sprint("image-", i), readWriteOnce, "layers", layers, "sizeLimit", "8Mi", "sizeEnforcement", "image"),
				}
			})
		})
	}
}

// crash has workers use volumes, pod after pod, while the driver is killed.
type crash struct {
	workers int
	// Each worker has so many pods at least, and more until the driver was killed so often while an RPC was under way. A fast
	// disk has more pods, a slow one takes longer.
	rounds, kills int
	// limit is what is said of the size of the two claims that all workers use.
	limit []string
}

// crashDeadline is far beyond what the slowest disk takes: a driver that makes no progress fails the test.
const crashDeadline = 15 * time.Minute

// run has every worker use these volumes, its own among them, and looks at what is left of them.
func (c crash) run(t *testing.T, node *drivertest.Node, own func(i int, layers string) []drivertest.Volume) {
	layers := layersOf(t, node, map[string]string{"f": "layer"}, map[string]string{"g": "layer"})
	shared := create(t, node, "shared", readWriteOnce, append([]string{"layers", layers}, c.limit...)...)
	each := create(t, node, "each", readWriteMany, append([]string{"layers", layers, "upper", "pod"}, c.limit...)...)

	ctx, cancel := contextWithTimeout(t, crashDeadline)
	defer cancel()
	k := killer{node: node, finished: make(chan struct{}, 1000)}
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() { stopped <- k.run(ctx, stop, 2*c.workers) }()
	var publishes atomic.Int64
	rounds := make([]int, c.workers)
	err := atOnce(c.workers, func(i int) error {
		w := worker{t: t, node: node, killer: &k, publishes: &publishes, name: fmt.Sprint("worker-", i), volumes: append([]drivertest.Volume{
			inline("layers", layers),
			inline("layers", layers, "upper", "none"),
			inline("layers", layers, "upper", "volume://scratch"),
			shared,
			each,
		}, own(i, layers)...)}
		for ; rounds[i] < c.rounds || k.interrupting.Load() < int64(c.kills); rounds[i]++ {
			if err := w.round(ctx, rounds[i]); err != nil {
				return fmt.Errorf("%s, round %d, after %d kills: %w", w.name, rounds[i], k.kills.Load(), err)
			}
		}
		return nil
	})
	close(stop)
	must(t, errors.Join(err, <-stopped))
	t.Logf("%d publishes and as many unpublishes, %d kills, %d of them while an RPC was under way", publishes.Load(), k.kills.Load(),
		k.interrupting.Load())

	pod := newPod(t, node, "reader")
	view := publish(t, pod, shared)
	for i := range c.workers {
		for round := range rounds[i] {
			wantFile(t, filepath.Join(view, fmt.Sprintf("worker-%d-%d", i, round)), payload(round))
		}
		for _, kept := range own(i, layers) {
			if !kept.Claim {
				continue
			}
			target := publish(t, pod, kept)
			for round := range rounds[i] {
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

// killer kills the driver and starts it again. It goes by what the driver gets done and not by the clock, so that a slow
// machine gets forward between the kills, and a fast one has as many.
type killer struct {
	node *drivertest.Node
	// finished has a value for each RPC that ended well since the driver was last started.
	finished chan struct{}
	underWay atomic.Int64
	// interrupting are those of the kills that came while an RPC was under way.
	kills, interrupting atomic.Int64
}

// run kills the driver, each time after up to so many RPCs and a part of the next, until stop is closed. It leaves it running.
func (k *killer) run(ctx context.Context, stop <-chan struct{}, rpcs int) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		began := time.Now()
		n := rand.IntN(rpcs)
		for range n {
			select {
			case <-stop:
				return nil
			case <-ctx.Done():
				return fmt.Errorf("after %d kills no RPC ends any more: %w", k.kills.Load(), ctx.Err())
			case <-k.finished:
			}
		}
		time.Sleep(rand.N(time.Since(began)/time.Duration(n+1) + time.Millisecond))
		interrupting := k.underWay.Load() > 0
		if err := k.node.Kill(); err != nil {
			return err
		}
		k.kills.Add(1)
		if interrupting {
			k.interrupting.Add(1)
		}
		if rand.IntN(4) == 0 {
			if err := k.killWhileItStarts(); err != nil {
				return err
			}
		}
		for len(k.finished) > 0 {
			<-k.finished
		}
		if err := k.node.Start(ctx); err != nil {
			return err
		}
	}
}

// killWhileItStarts kills the driver before it is ready, most times: reconciling is cut off then.
func (k *killer) killWhileItStarts() error {
	if err := k.node.Launch(); err != nil {
		return err
	}
	time.Sleep(rand.N(100 * time.Millisecond))
	k.kills.Add(1)
	return k.node.Kill()
}

// worker is kubelet for one pod after the other.
type worker struct {
	t         *testing.T
	node      *drivertest.Node
	killer    *killer
	publishes *atomic.Int64
	name      string
	volumes   []drivertest.Volume
}

func payload(round int) string { return fmt.Sprintf("written in round %d", round) }

func (w *worker) round(ctx context.Context, round int) error {
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
		if err := w.again(ctx, func(ctx context.Context) error { _, err := pod.Publish(ctx, v); return err }); err != nil {
			return fmt.Errorf("publish %s: %w", v.Name, err)
		}
		w.publishes.Add(1)
		if err := w.use(pod, v, round); err != nil {
			return fmt.Errorf("use %s: %w", v.Name, err)
		}
	}
	for _, v := range w.volumes {
		if err := w.again(ctx, func(ctx context.Context) error { return pod.Unpublish(ctx, v) }); err != nil {
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

// again tries until it works, with kubelet's patience each time.
func (w *worker) again(ctx context.Context, do func(ctx context.Context) error) error {
	for {
		rpc, cancel := context.WithTimeout(ctx, 2*time.Minute)
		w.killer.underWay.Add(1)
		err := do(rpc)
		w.killer.underWay.Add(-1)
		cancel()
		if err == nil {
			select {
			case w.killer.finished <- struct{}{}:
			default:
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(5 * time.Millisecond):
		}
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
		response, err := node.NodeService().NodeGetVolumeStats(timeout(t),
			&csi.NodeGetVolumeStatsRequest{VolumeId: pod.Request(v).GetVolumeId(), VolumePath: target})
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
