package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/bench/durations"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// bench measures one node. Every measured thing has three layers and an ephemeral upper.
type bench struct {
	node       *drivertest.Node
	opts       options
	volume     drivertest.Volume
	raw        raw
	serial     atomic.Int64
	background []view
}

// view is one published volume.
type view struct {
	pod *drivertest.Pod
	req *csi.NodePublishVolumeRequest
}

func newBench(node *drivertest.Node, opts options) (*bench, error) {
	names := []string{"top", "middle", "bottom"}
	var lowers []string
	for _, name := range names {
		path, err := node.Layer(name, map[string]string{"file": name, name: name})
		if err != nil {
			return nil, err
		}
		lowers = append(lowers, path)
	}
	b := &bench{node: node, opts: opts, raw: raw{dir: filepath.Join(node.Dir, "raw"), lowers: lowers}}
	b.volume = drivertest.Volume{Name: "v", Attributes: map[string]string{"layers": drivertest.Layers(names...)}}
	return b, errors.Join(os.MkdirAll(filepath.Join(b.raw.dir, "trash"), 0o755))
}

func (b *bench) run(ctx context.Context) error {
	fmt.Printf(
		"%d rounds, three dir:// layers, upper: pod; %s, %d CPUs, Linux %s\n\n",
		b.opts.rounds,
		runtime.Version(),
		runtime.NumCPU(),
		release(),
	)
	if b.opts.throughput {
		return b.throughput(ctx)
	}
	fmt.Println("| what | views mounted | raw p50 | driver p50 | ratio | raw p99 | driver p99 | ratio |")
	fmt.Println("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
	if err := b.fill(ctx, 10); err != nil {
		return err
	}
	few, err := b.oneByOne(ctx)
	if err != nil {
		return err
	}
	few.print(10)
	if err := b.fill(ctx, b.opts.views); err != nil {
		return err
	}
	resident, err := residentMemory(b.node.PID())
	if err != nil {
		return err
	}
	many, err := b.oneByOne(ctx)
	if err != nil {
		return err
	}
	many.print(b.opts.views)
	if err := b.fill(ctx, 10); err != nil {
		return err
	}
	// Once more with few: what has drifted in between shows in the difference to the first.
	again, err := b.oneByOne(ctx)
	if err != nil {
		return err
	}
	again.print(10)
	fewPublish := slices.Concat(few.driver.publish, again.driver.publish)
	fewUnpublish := slices.Concat(few.driver.unpublish, again.driver.unpublish)
	fmt.Printf(
		"\nWith %d views beside it, p50 of a publish is %.2f times, of an unpublish %.2f times that with 10.\n",
		b.opts.views,
		durations.Ratio(
			durations.Quantile(many.driver.publish, 50),
			durations.Quantile(fewPublish, 50),
		),
		durations.Ratio(durations.Quantile(many.driver.unpublish, 50), durations.Quantile(fewUnpublish, 50)),
	)
	fmt.Printf("Resident memory of the driver with %d views: %.1f MiB.\n", b.opts.views, float64(resident)/(1<<20))
	return b.throughput(ctx)
}

// samples are the times of publishes and unpublishes.
type samples struct{ publish, unpublish []time.Duration }

type comparison struct{ raw, driver samples }

// oneByOne times the raw system calls and the driver in turns.
func (b *bench) oneByOne(ctx context.Context) (comparison, error) {
	var c comparison
	var used []view
	for range b.opts.rounds {
		name := strconv.FormatInt(b.serial.Add(1), 10)
		begin := time.Now()
		if err := b.raw.mount(name); err != nil {
			return c, err
		}
		c.raw.publish = append(c.raw.publish, time.Since(begin))

		v, err := b.newView()
		if err != nil {
			return c, err
		}
		begin = time.Now()
		if err := b.publish(ctx, v); err != nil {
			return c, err
		}
		c.driver.publish = append(c.driver.publish, time.Since(begin))

		begin = time.Now()
		if err := b.raw.unmount(name); err != nil {
			return c, err
		}
		c.raw.unpublish = append(c.raw.unpublish, time.Since(begin))

		begin = time.Now()
		if err := b.unpublish(ctx, v); err != nil {
			return c, err
		}
		c.driver.unpublish = append(c.driver.unpublish, time.Since(begin))
		used = append(used, v)
	}
	// Afterwards: ext4 looks past each recently deleted inode when it makes a directory.
	for _, v := range used {
		if err := b.discard(v); err != nil {
			return c, err
		}
	}
	return c, b.raw.empty()
}

func (c comparison) print(views int) {
	for _, row := range []struct {
		name        string
		raw, driver []time.Duration
	}{{"NodePublishVolume", c.raw.publish, c.driver.publish}, {"NodeUnpublishVolume", c.raw.unpublish, c.driver.unpublish}} {
		fmt.Printf("| %s | %d |", row.name, views)
		for _, p := range []int{50, 99} {
			raw, driver := durations.Quantile(row.raw, p), durations.Quantile(row.driver, p)
			fmt.Printf(" %s | %s | %.2f |", durations.Milliseconds(raw), durations.Milliseconds(driver), durations.Ratio(driver, raw))
		}
		fmt.Println()
	}
}

// throughput compares how many views many callers at once get in a second, from the raw calls and from the driver, in
// turns.
func (b *bench) throughput(ctx context.Context) error {
	const turns = 5
	each := max(1, b.opts.rounds/b.opts.parallel/2)
	var raw, driver []float64
	for range turns {
		rate, err := b.atOnce(each, func(int) error {
			name := strconv.FormatInt(b.serial.Add(1), 10)
			return errors.Join(b.raw.mount(name), b.raw.unmount(name))
		})
		if err != nil {
			return err
		}
		raw = append(raw, rate)
		if err := b.raw.empty(); err != nil {
			return err
		}
		if rate, err = b.driverAtOnce(ctx, each); err != nil {
			return err
		}
		driver = append(driver, rate)
	}
	slices.Sort(raw)
	slices.Sort(driver)
	fmt.Printf(
		"\n%d callers at once, publish and unpublish, median of %d turns: raw %.0f/s, driver %.0f/s, ratio %.2f.\n",
		b.opts.parallel,
		turns,
		raw[turns/2],
		driver[turns/2],
		driver[turns/2]/raw[turns/2],
	)
	return nil
}

// driverAtOnce is the driver's turn. The pods' directories, which are kubelet's work, are there before it begins.
func (b *bench) driverAtOnce(ctx context.Context, each int) (float64, error) {
	views := make([]view, each*b.opts.parallel)
	for i := range views {
		var err error
		if views[i], err = b.newView(); err != nil {
			return 0, err
		}
	}
	rate, err := b.atOnce(each, func(i int) error {
		return errors.Join(b.publish(ctx, views[i]), b.unpublish(ctx, views[i]))
	})
	for _, v := range views {
		err = errors.Join(err, b.discard(v))
	}
	return rate, errors.Join(err, b.waitForTrash())
}

// atOnce does something many times on many threads, each time with another number, and returns how often in a second.
func (b *bench) atOnce(each int, do func(i int) error) (float64, error) {
	var group sync.WaitGroup
	var next atomic.Int64
	failed := make(chan error, b.opts.parallel)
	begin := time.Now()
	for range b.opts.parallel {
		group.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for range each {
				if err := do(int(next.Add(1) - 1)); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	group.Wait()
	took := time.Since(begin)
	close(failed)
	return float64(each*b.opts.parallel) / took.Seconds(), <-failed
}

// fill publishes or unpublishes until so many views are mounted.
func (b *bench) fill(ctx context.Context, views int) error {
	for len(b.background) < views {
		v, err := b.newView()
		if err != nil {
			return err
		}
		if err := b.publish(ctx, v); err != nil {
			return err
		}
		b.background = append(b.background, v)
	}
	for len(b.background) > views {
		v := b.background[len(b.background)-1]
		if err := errors.Join(b.unpublish(ctx, v), b.discard(v)); err != nil {
			return err
		}
		b.background = b.background[:len(b.background)-1]
	}
	return b.waitForTrash()
}

// waitForTrash waits until the driver's background work is done, so that it is not measured with what comes next.
func (b *bench) waitForTrash() error {
	for {
		entries, err := os.ReadDir(filepath.Join(b.node.DataRoot, "trash"))
		if err != nil || len(entries) == 0 {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// newView makes a pod and the directory of its volume: kubelet's work, not the driver's.
func (b *bench) newView() (view, error) {
	pod, err := b.node.NewPod("bench")
	if err != nil {
		return view{}, err
	}
	v := view{pod: pod, req: pod.Request(b.volume)}
	return v, os.MkdirAll(filepath.Dir(v.req.TargetPath), 0o755)
}

func (b *bench) publish(ctx context.Context, v view) error {
	_, err := b.node.NodeService().NodePublishVolume(ctx, v.req)
	return err
}

func (b *bench) unpublish(ctx context.Context, v view) error {
	_, err := b.node.NodeService().
		NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.req.VolumeId, TargetPath: v.req.TargetPath})
	return err
}

func (b *bench) discard(v view) error { return os.RemoveAll(v.pod.Dir()) }

// raw makes and removes views with the system calls alone: mkdir, mkdir, fsopen…move_mount; umount, rename.
type raw struct {
	dir    string
	lowers []string
}

func (r raw) paths(name string) (base, upper, work, target string) {
	base = filepath.Join(r.dir, name)
	return base, base + "-upper", base + "-work", base + "-target"
}

func (r raw) mount(name string) error {
	_, upper, work, target := r.paths(name)
	// The target is made in the way of kubelet's directories: it is not what a view costs.
	if err := errors.Join(unix.Mkdir(target, 0o755), unix.Mkdir(upper, 0o755), unix.Mkdir(work, 0o755)); err != nil {
		return err
	}
	context, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(context)
	for _, lower := range r.lowers {
		if err := unix.FsconfigSetString(context, "lowerdir+", lower); err != nil {
			return err
		}
	}
	err = errors.Join(
		unix.FsconfigSetString(context, "upperdir", upper),
		unix.FsconfigSetString(context, "workdir", work),
		unix.FsconfigSetFlag(context, "volatile"),
		unix.FsconfigCreate(context))
	if err != nil {
		return err
	}
	mount, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return err
	}
	defer unix.Close(mount)
	return unix.MoveMount(mount, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

func (r raw) unmount(name string) error {
	_, upper, _, target := r.paths(name)
	return errors.Join(unix.Unmount(target, 0), unix.Rename(upper, filepath.Join(r.dir, "trash", name)))
}

// empty removes what the raw calls left, as the driver does in the background.
func (r raw) empty() error {
	return errors.Join(os.RemoveAll(r.dir), os.MkdirAll(filepath.Join(r.dir, "trash"), 0o755))
}

// residentMemory is VmRSS of a process in bytes (proc(5)).
func residentMemory(pid int) (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("no VmRSS in the process's status")
}

func release() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "?"
	}
	return unix.ByteSliceToString(name.Release[:])
}
