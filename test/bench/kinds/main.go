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
	"slices"
	"strconv"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

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

func run(ctx context.Context, rounds, files int) error {
	for _, system := range []string{"", "btrfs with quota", "ext4 with project quota", "xfs with project quota"} {
		if err := onSystem(ctx, system, rounds, files); err != nil {
			return fmt.Errorf("%s: %w", system, err)
		}
	}
	return nil
}

// onSystem measures with a data root on that file system, "" for the one of temporary files.
func onSystem(ctx context.Context, system string, rounds, files int) (err error) {
	dir, remove, err := drivertest.WorkDir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	binary, err := drivertest.Build(dir)
	if err != nil {
		return err
	}
	node, err := drivertest.NewNode(dir, binary)
	if err != nil {
		return err
	}
	if system != "" {
		image := node.DataRoot + ".img"
		if err := errors.Join(os.MkdirAll(node.DataRoot, 0o755), drivertest.MakeImage(system, image, 4<<30, "")); err != nil {
			return err
		}
		if err := drivertest.MountImage(system, image, node.DataRoot); err != nil {
			fmt.Printf("\nNot measured on %s, which this kernel does not have.\n", system)
			return nil
		}
		defer unix.Unmount(node.DataRoot, unix.MNT_DETACH)
	}
	if err := node.Start(ctx); err != nil {
		return err
	}
	defer node.Stop()
	if _, err := node.Layer("small", map[string]string{"file": "small"}); err != nil {
		return err
	}
	b := bench{node: node}
	kinds, err := b.kinds(ctx, system)
	if err != nil {
		return err
	}
	where := system
	if where == "" {
		where = "the file system of temporary files"
	}
	fmt.Printf("\nData root on %s, %d rounds:\n\n", where, rounds)
	if err := b.compare(ctx, rounds, kinds); err != nil || system != "" {
		return err
	}
	return b.owners(ctx, rounds, files)
}

type bench struct {
	node   *drivertest.Node
	serial int
}

// kind is a kind of volume that is measured: the first of a comparison is what the others are compared with.
type kind struct {
	name   string
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

// kinds are those of one data root.
func (b *bench) kinds(ctx context.Context, system string) ([]*kind, error) {
	layers := drivertest.Layers("small")
	plain := &kind{name: "plain: no size", volume: inline("layers", layers)}
	if system != "" {
		return []*kind{plain, {name: "`sizeLimit: 64Mi`, kept by quota", volume: inline("layers", layers, "sizeLimit", "64Mi")}}, nil
	}
	kept, err := b.claim(ctx, "kept", "layers", layers, "limit", "none")
	if err != nil {
		return nil, err
	}
	image, err := b.claim(ctx, "image", "layers", layers, "limit", "image")
	if err != nil {
		return nil, err
	}
	return []*kind{
		plain,
		{name: "claim without a limit", volume: kept},
		{name: "`medium: memory`", volume: inline("layers", layers, "sizeLimit", "64Mi", "medium", "memory")},
		{name: "disk image, made for the pod", volume: inline("layers", layers, "sizeLimit", "64Mi", "limit", "image")},
		{name: "disk image of a claim, made before", volume: image},
	}, nil
}

// claim has the driver make a claim's volume.
func (b *bench) claim(ctx context.Context, name string, keys ...string) (drivertest.Volume, error) {
	mode := csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	response, err := b.node.Controller().CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name, Parameters: inline(keys...).Attributes, VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(mode)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20},
	})
	if err != nil {
		return drivertest.Volume{}, err
	}
	return drivertest.Volume{Name: "v", ID: response.GetVolume().GetVolumeId(), Claim: true, Mode: mode, Attributes: response.GetVolume().GetVolumeContext()}, nil
}

// owners compares the ways to give the files of a large layer an owner.
func (b *bench) owners(ctx context.Context, rounds, files int) error {
	path, err := b.node.Layer("large", nil)
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
	group, walk := inline("layers", layers), inline("layers", layers, "ownership", "walk")
	group.Group, walk.Group = "2000", "2000"
	fmt.Printf("\nA layer of %d files, %d rounds:\n\n", files, rounds)
	return b.compare(ctx, rounds, []*kind{
		{name: "plain", volume: inline("layers", layers)},
		{name: "`fsGroup`", volume: group},
		{name: "`layerOwner`", volume: inline("layers", layers, "layerOwner", "1000:1000")},
		{name: "`fsGroup`, `ownership: walk`", volume: walk, rounds: 3},
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
		publish, unpublish := quantile(k.publish, 50), quantile(k.unpublish, 50)
		fmt.Printf("| %s | %s | %.2f | %s | %s | %.2f |\n", k.name, milliseconds(publish), ratio(publish, quantile(kinds[0].publish, 50)),
			milliseconds(quantile(k.publish, 99)), milliseconds(unpublish), ratio(unpublish, quantile(kinds[0].unpublish, 50)))
	}
	return nil
}

func (b *bench) measure(ctx context.Context, k *kind) error {
	b.serial++
	pod, err := b.node.NewPod("bench-" + strconv.Itoa(b.serial))
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

func quantile(samples []time.Duration, percent int) time.Duration {
	sorted := slices.Sorted(slices.Values(samples))
	return sorted[min(len(sorted)-1, len(sorted)*percent/100)]
}

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.2f ms", float64(d.Microseconds())/1000)
}
