package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	binaries
	mode                 string
	nodes, rates         string
	warm, duration, live time.Duration
	grow, score          int
	central              centralMode
	compare, record      bool
	audit                string
}

// player plays one node until the context ends, and calls ready once its informers have what exists.
type player interface {
	run(ctx context.Context, ready func())
}

// mode is a way to deploy the driver: what is played once for the cluster, and on each node.
type mode interface {
	// manifests returns the objects that the driver is deployed with.
	manifests(ctx context.Context) ([]byte, error)
	start(ctx context.Context, c *cluster) error
	node(c *cluster, i int) player
}

// sidecarMode is the chart with provisioner.mode=node: sidecars on each node, and nothing central.
type sidecarMode struct{ helm string }

func (m sidecarMode) manifests(ctx context.Context) ([]byte, error) {
	return renderChart(ctx, m.helm, "node")
}

func (sidecarMode) start(context.Context, *cluster) error { return nil }
func (sidecarMode) node(c *cluster, i int) player         { return newSidecarNode(c, nodeName(i), i == 0) }

func main() {
	// The servers die with the thread that started them.
	runtime.LockOSThread()
	var o options
	flag.StringVar(&o.mode, "mode", "node", "node: sidecars on each node; central: one of each for the cluster")
	flag.StringVar(&o.nodes, "nodes", "10,100,1000,5000", "numbers of nodes")
	flag.StringVar(&o.rates, "rates", "1,10,50", "claims that are made in a second, each with its pod")
	flag.DurationVar(&o.warm, "warm", 20*time.Second, "how long the churn runs before it is measured")
	flag.DurationVar(&o.duration, "duration", time.Minute, "how long it is measured")
	flag.DurationVar(&o.live, "live", 15*time.Second, "how long a pod is left before it and its claim are deleted")
	flag.IntVar(&o.grow, "grow", 10, "every so many claims grows")
	flag.IntVar(&o.score, "score", 0, "percentageOfNodesToScore in the scheduler's configuration; 0: its default")
	flag.StringVar(&o.etcd, "etcd", "", "etcd; otherwise that of the PATH, or built from test/scale/servers")
	flag.StringVar(&o.apiserver, "apiserver", "", "kube-apiserver, likewise")
	flag.StringVar(&o.manager, "controller-manager", "", "kube-controller-manager, likewise")
	flag.StringVar(&o.scheduler, "scheduler", "", "kube-scheduler, likewise")
	flag.StringVar(&o.central.provisioner, "provisioner", "", "csi-provisioner, likewise, for -mode central and -record")
	flag.StringVar(&o.central.resizer, "resizer", "", "csi-resizer, likewise")
	flag.StringVar(&o.central.driver, "driver", "", "overlay-csi, for -mode central; otherwise built from this source tree")
	flag.StringVar(&o.central.helm, "helm", "helm", "helm, which renders the chart")
	flag.BoolVar(&o.record, "record", false, "print what the real programs on a node ask for, and measure nothing (root)")
	flag.BoolVar(&o.compare, "compare", false, "compare what the played nodes ask for with what the real programs do, and measure nothing")
	flag.StringVar(&o.audit, "audit", "", "print what the real programs ask for, from the audit log of an API server, and do nothing else")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

// progress says on standard error what goes on. The report is on standard output.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}

func run(ctx context.Context, o options) error {
	modes := map[string]mode{"node": sidecarMode{o.central.helm}, "central": &o.central}
	m, ok := modes[o.mode]
	if !ok {
		return fmt.Errorf("-mode=%s: it must be node or central", o.mode)
	}
	if o.audit != "" {
		return printAudit(o.audit)
	}
	nodes, err := numbers(o.nodes)
	if err != nil {
		return fmt.Errorf("-nodes: %w", err)
	}
	rates, err := numbers(o.rates)
	if err != nil {
		return fmt.Errorf("-rates: %w", err)
	}
	if _, err := exec.LookPath(o.central.helm); err != nil {
		return fmt.Errorf("find helm, which renders the chart: %w; name it by -helm", err)
	}
	if err := o.find(ctx); err != nil {
		return err
	}
	if o.mode == "central" || o.record {
		if err := o.central.findSidecars(ctx); err != nil {
			return err
		}
	}
	if o.mode == "central" {
		if err := o.central.findDriver(ctx); err != nil {
			return err
		}
	}
	if o.record {
		return record(ctx, o)
	}
	if o.compare {
		return compare(ctx, o)
	}
	if err := checkFileLimit(int(nodes[len(nodes)-1])); err != nil {
		return err
	}
	fmt.Printf("Mode %s, %s, %d CPUs.\n\n", o.mode, runtime.Version(), runtime.NumCPU())
	var results []result
	for _, n := range nodes {
		some, err := measure(ctx, o, m, int(n), rates)
		results = append(results, some...)
		if err != nil {
			report(os.Stdout, results)
			return fmt.Errorf("%d nodes: %w", int(n), err)
		}
	}
	report(os.Stdout, results)
	return nil
}

// checkFileLimit fails where this process or the API server could not have three connections for each node: those of the provisioner, the
// resizer and the snapshotter. The driver has one too once a claim is made on its node.
func checkFileLimit(nodes int) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("getrlimit: %w", err)
	}
	if need := uint64(3*nodes + 1000); limit.Cur < need {
		return fmt.Errorf("%d nodes need %d open files, and the limit is %d; raise it with ulimit -n", nodes, need, limit.Cur)
	}
	return nil
}

func numbers(text string) ([]float64, error) {
	var values []float64
	for part := range strings.SplitSeq(text, ",") {
		value, err := strconv.ParseFloat(part, 64)
		if err != nil || value <= 0 {
			return nil, fmt.Errorf("%q is not a positive number", part)
		}
		values = append(values, value)
	}
	slices.Sort(values)
	return values, nil
}

// measure runs a control plane with n nodes, and each churn on it.
func measure(ctx context.Context, o options, m mode, n int, rates []float64) (results []result, err error) {
	s, err := startServers(ctx, o.binaries, "")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	c, err := newCluster(ctx, s, m)
	if err != nil {
		return nil, err
	}
	playing, end := context.WithCancel(ctx)
	defer end()
	churn, err := play(playing, o, m, c, n)
	if err != nil {
		return nil, err
	}
	for _, rate := range rates {
		r, err := measureRate(ctx, o, c, churn, n, rate)
		if err != nil {
			return results, err
		}
		results = append(results, r)
		progress("%d nodes, %g claims/s: %.1f were bound, in %s at p50", n, rate, float64(r.bound)/r.seconds(), milliseconds(r.p50))
		if float64(r.bound)/r.seconds() < 0.8*rate {
			progress("%d nodes: %.1f claims/s were bound of %g; higher rates are left out", n, float64(r.bound)/r.seconds(), rate)
			break
		}
	}
	return results, nil
}

// starting is how many nodes start at a time. All together would be another test: in a rolling update they start one after the other. A
// program that starts has more than one connection for a moment, since each of its first requests opens one.
const starting = 25

// play starts the nodes, and returns once all of them have what exists.
func play(ctx context.Context, o options, m mode, c *cluster, n int) (*churn, error) {
	progress("%d nodes: making the objects of the nodes", n)
	if err := c.addNodes(ctx, n); err != nil {
		return nil, err
	}
	if err := c.startControllers(ctx, o.binaries, o.score); err != nil {
		return nil, err
	}
	if err := m.start(ctx, c); err != nil {
		return nil, err
	}
	began := time.Now()
	var all sync.WaitGroup
	slots := make(chan struct{}, starting)
	for i := range n {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		all.Add(1)
		go m.node(c, i).run(ctx, func() { <-slots; all.Done() })
	}
	churn := newChurn(c, o.live, o.grow)
	all.Add(1)
	go churn.watch(ctx, all.Done)
	started := make(chan struct{})
	go func() { all.Wait(); close(started) }()
	select {
	case <-started:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	server, err := usageOf(c.apiserver.Process.Pid)
	if err != nil {
		return nil, err
	}
	own, err := usageOf(os.Getpid())
	if err != nil {
		return nil, err
	}
	progress("%d nodes: started in %s; the API server has %d open files, and this process %d",
		n, time.Since(began).Round(time.Second/10), server.files, own.files)
	return churn, nil
}

func measureRate(ctx context.Context, o options, c *cluster, churn *churn, n int, rate float64) (result, error) {
	progress("%d nodes, %g claims/s", n, rate)
	churning, end := context.WithCancel(ctx)
	defer end()
	go churn.run(churning, "claim-"+strings.ReplaceAll(fmt.Sprint(rate), ".", "-"), rate)
	if !sleep(ctx, o.warm+o.live) {
		return result{}, ctx.Err()
	}
	r := result{nodes: n, rate: rate}
	var err error
	skipped := churn.skipped.Load()
	churn.reset()
	if r.before, err = c.sample(ctx, os.Getpid()); err != nil {
		return r, err
	}
	if !sleep(ctx, o.duration) {
		return r, ctx.Err()
	}
	if r.after, err = c.sample(ctx, os.Getpid()); err != nil {
		return r, err
	}
	r.p50, r.p99, r.bound, r.waiting = churn.percentiles()
	r.skipped = churn.skipped.Load() - skipped
	end()
	if err := churn.drain(ctx, time.Minute); err != nil {
		r.note = err.Error()
	}
	c.counters.mu.Lock()
	defer c.counters.mu.Unlock()
	for text, times := range c.counters.unexpected {
		progress("%d times: %s", times, text)
	}
	clear(c.counters.unexpected)
	return r, nil
}
