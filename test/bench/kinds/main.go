// Command kinds compares how long publishing and unpublishing takes for each way to keep a volume's upper, and for each way
// to give layers an owner, with a plain volume in the same run and in turns. It prints the tables of docs/performance.md,
// and judges nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/overlay-csi/overlay-csi/test/bench/durations"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

func main() {
	rounds := flag.Int("rounds", 300, "publishes and unpublishes of each kind")
	files := flag.Int("files", 100_000, "files in the layer for which owners are compared")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *files); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds, files int) (err error) {
	dir, remove, err := drivertest.WorkDir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	binary, err := drivertest.Build(dir)
	if err != nil {
		return err
	}
	b := &bench{dir: dir, binary: binary}
	defer func() { err = errors.Join(err, b.stop()) }()
	if err := b.own(ctx, rounds, files); err != nil {
		return err
	}
	for _, fsType := range []string{"btrfs", "ext4", "xfs"} {
		if err := b.quotas(ctx, fsType, rounds); err != nil {
			return fmt.Errorf("%s: %w", fsType, err)
		}
	}
	return nil
}

type bench struct {
	dir, binary string
	serial      int
	nodes       []*drivertest.Node
}

// errNotMounted is returned by start for a file system that this kernel does not mount.
var errNotMounted = errors.New("the file system is not mounted")

// start starts a driver whose data root is on a new file system of that name, or "" for the one of temporary files. It
// returns errNotMounted if this kernel does not have that.
func (b *bench) start(ctx context.Context, system string) (*drivertest.Node, error) {
	dir := filepath.Join(b.dir, strconv.Itoa(len(b.nodes)))
	node, err := drivertest.NewNode(dir, b.binary)
	if err != nil {
		return nil, err
	}
	if system != "" {
		image := node.DataRoot + ".img"
		if err := errors.Join(os.MkdirAll(node.DataRoot, 0o755), drivertest.MakeImage(system, image, 2<<30, "")); err != nil {
			return nil, err
		}
		if err := drivertest.MountImage(system, image, node.DataRoot); err != nil {
			return nil, fmt.Errorf("%w: %w", errNotMounted, err)
		}
	}
	if err := node.Start(ctx); err != nil {
		return nil, err
	}
	b.nodes = append(b.nodes, node)
	_, err = node.Layer("small", map[string]string{"file": "small"})
	return node, err
}

func (b *bench) stop() error {
	var failed error
	for _, node := range b.nodes {
		failed = errors.Join(failed, node.Stop())
	}
	return failed
}

// kind is a kind of volume that is measured: the first of a comparison is what the others are compared with.
type kind struct {
	name   string
	node   *drivertest.Node
	volume drivertest.Volume
	// rounds are fewer than the others', where it takes long.
	rounds             int
	publish, unpublish []time.Duration
}

func inline(keys ...string) drivertest.Volume {
	v := drivertest.Volume{Name: "v", Attributes: map[string]string{}}
	for i := 0; i+1 < len(keys); i += 2 {
		v.Attributes[keys[i]] = keys[i+1]
	}
	return v
}

// own compares the kinds that every file system has, and the ways to give owners.
func (b *bench) own(ctx context.Context, rounds, files int) error {
	node, err := b.start(ctx, "")
	if err != nil {
		return err
	}
	layers := drivertest.Layers("small")
	kept, err := claim(ctx, node, "kept", "layers", layers, "sizeEnforcement", "none")
	if err != nil {
		return err
	}
	image, err := claim(ctx, node, "image", "layers", layers, "sizeEnforcement", "image")
	if err != nil {
		return err
	}
	fmt.Printf("%d rounds:\n\n", rounds)
	err = b.compare(ctx, rounds, []*kind{
		{name: "plain: no size", node: node, volume: inline("layers", layers)},
		{name: "claim without a limit", node: node, volume: kept},
		{name: "`medium: memory`", node: node, volume: inline("layers", layers, "sizeLimit", "64Mi", "medium", "memory")},
		{name: "disk image, made for the pod", node: node, volume: inline("layers", layers, "sizeLimit", "64Mi", "sizeEnforcement", "image")},
		{name: "disk image of a claim, made before", node: node, volume: image},
	})
	if err != nil {
		return err
	}
	return b.owners(ctx, node, rounds, files)
}

// quotas compares a file system's quotas with a plain volume on another file system of that type, which has none.
func (b *bench) quotas(ctx context.Context, fsType string, rounds int) error {
	quotas := map[string]string{"btrfs": "btrfs with quota"}[fsType]
	if quotas == "" {
		quotas = fsType + " with project quota"
	}
	limited, err := b.start(ctx, quotas)
	if errors.Is(err, errNotMounted) {
		fmt.Printf("\nNot measured on %s, which this kernel does not have.\n", quotas)
		return nil
	}
	if err != nil {
		return err
	}
	plain, err := b.start(ctx, fsType)
	if err != nil {
		return err
	}
	layers := drivertest.Layers("small")
	fmt.Printf("\n%s, %d rounds:\n\n", quotas, rounds)
	return b.compare(ctx, rounds, []*kind{
		{name: "plain, on " + fsType, node: plain, volume: inline("layers", layers)},
		{name: "`sizeLimit: 64Mi`, on " + quotas, node: limited, volume: inline("layers", layers, "sizeLimit", "64Mi")},
	})
}

// claim has the driver make a claim's volume.
func claim(ctx context.Context, node *drivertest.Node, name string, keys ...string) (drivertest.Volume, error) {
	mode := csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	response, err := node.Controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name, Parameters: inline(keys...).Attributes, VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(mode)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20},
	})
	if err != nil {
		return drivertest.Volume{}, err
	}
	return drivertest.Volume{
		Name:       "v",
		ID:         response.GetVolume().GetVolumeId(),
		Claim:      true,
		Mode:       mode,
		Attributes: response.GetVolume().GetVolumeContext(),
	}, nil
}

// owners compares the ways to give the files of a large layer an owner.
func (b *bench) owners(ctx context.Context, node *drivertest.Node, rounds, files int) error {
	path, err := node.Layer("large", nil)
	if err != nil {
		return err
	}
	for n := range files {
		dir := filepath.Join(path, strconv.Itoa(n/1000))
		if n%1000 == 0 {
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(n)), []byte("x"), 0o644); err != nil {
			return err
		}
	}
	layers := drivertest.Layers("large")
	group, walk := inline("layers", layers), inline("layers", layers, "ownership", "chown")
	group.Group, walk.Group = "2000", "2000"
	fmt.Printf("\nA layer of %d files, %d rounds:\n\n", files, rounds)
	return b.compare(ctx, rounds, []*kind{
		{name: "plain", node: node, volume: inline("layers", layers)},
		{name: "`fsGroup`", node: node, volume: group},
		{name: "`layerOwner`", node: node, volume: inline("layers", layers, "layerOwner", "1000:1000")},
		{name: "`fsGroup`, `ownership: chown`", node: node, volume: walk, rounds: 3},
	})
}

// compare measures kinds in turns and prints them.
func (b *bench) compare(ctx context.Context, rounds int, kinds []*kind) error {
	for round := range rounds {
		for _, k := range kinds {
			if k.rounds > 0 && round >= k.rounds {
				continue
			}
			if err := b.measure(ctx, k); err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
		}
	}
	fmt.Println("| volume | publish p50 | ratio | p99 | unpublish p50 | ratio |")
	fmt.Println("| --- | ---: | ---: | ---: | ---: | ---: |")
	for _, k := range kinds {
		publish, unpublish := durations.Quantile(k.publish, 50), durations.Quantile(k.unpublish, 50)
		fmt.Printf(
			"| %s | %s | %.2f | %s | %s | %.2f |\n",
			k.name,
			durations.Milliseconds(publish),
			durations.Ratio(publish, durations.Quantile(kinds[0].publish, 50)),
			durations.Milliseconds(
				durations.Quantile(k.publish, 99),
			),
			durations.Milliseconds(unpublish),
			durations.Ratio(unpublish, durations.Quantile(kinds[0].unpublish, 50)),
		)
	}
	return nil
}

func (b *bench) measure(ctx context.Context, k *kind) error {
	b.serial++
	pod, err := k.node.NewPod("bench-" + strconv.Itoa(b.serial))
	if err != nil {
		return err
	}
	begin := time.Now()
	if _, err := pod.Publish(ctx, k.volume); err != nil {
		return err
	}
	k.publish = append(k.publish, time.Since(begin))
	begin = time.Now()
	if err := pod.Unpublish(ctx, k.volume); err != nil {
		return err
	}
	k.unpublish = append(k.unpublish, time.Since(begin))
	return os.RemoveAll(pod.Dir())
}
