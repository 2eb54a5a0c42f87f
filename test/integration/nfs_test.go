package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// serveNFS serves a directory over NFS. goAway and comeBack may be called in turn, and mount mounts what is served with more options.
func serveNFS(t *testing.T, dir string) (goAway, comeBack func(), mount func(at, options string)) {
	t.Helper()
	if !drivertest.HasNFS() {
		t.Skip("this kernel has no NFS, client and server (modules nfsv4 and nfsd), or the server is in use")
	}
	server, err := drivertest.ServeNFS(dir)
	must(t, err)
	t.Cleanup(func() { must(t, server.Close()) })
	isAway := false
	comeBack = func() {
		if isAway {
			server.ComeBack()
		}
		isAway = false
	}
	mount = func(at, options string) {
		must(t, os.MkdirAll(at, 0o755))
		must(t, server.Mount(at, options))
		t.Cleanup(func() {
			comeBack()
			if err := unix.Unmount(at, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				t.Errorf("unmount %s: %v", at, err)
			}
		})
	}
	return func() { server.GoAway(); isAway = true }, comeBack, mount
}

// soon checks that something does not wait for a server that is away. A machine that is emulated is slow.
func soon(t *testing.T, what string, do func()) {
	t.Helper()
	began := time.Now()
	do()
	took := time.Since(began)
	t.Logf("%s took %s", what, took.Round(time.Millisecond))
	if took > 15*time.Second {
		t.Errorf("%s took %s", what, took)
	}
}

// threads is how many threads the driver has.
func threads(t *testing.T, node *drivertest.Node) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", node.PID()))
	must(t, err)
	_, rest, _ := bytes.Cut(status, []byte("\nThreads:"))
	number, _, _ := bytes.Cut(rest, []byte("\n"))
	n, err := strconv.Atoi(strings.TrimSpace(string(number)))
	must(t, err)
	return n
}

// How many layers are on the server, and how many views of one of them there are besides those that are looked at.
const onServer, views = 50, 20

// TestNFSServerThatIsAway: layers are on an NFS server, mounted hard, and the server no longer answers. Only the volumes with these
// layers notice.
func TestNFSServerThatIsAway(t *testing.T) {
	node := newNode(t, "--reconcile-interval=50ms", "--volume-health", "--pod-volume-wait=2s")
	away, content := filepath.Join(node.Dir, "away"), filepath.Join(node.Dir, "content")
	for i := range onServer {
		fill(t, content, map[string]string{fmt.Sprintf("layer-%d/f", i): "f"})
	}
	goAway, comeBack, mount := serveNFS(t, content)
	mount(away, "noac,lookupcache=none")
	// As most are: what was looked at is taken from memory for up to a minute.
	cached := filepath.Join(node.Dir, "cached")
	mount(cached, "nosharecache")
	node.AddArgs("--layer-root=away="+away, "--layer-root=cached="+cached)
	start(t, node)

	pod := newPod(t, node, "pod")
	share, err := pod.EmptyDir("share")
	must(t, err)
	mount(share, "nosharecache")
	onNFS := inline("layers", "dir://away/layer-0", "upper", "none")
	upper := inline("layers", "dir://away/layer-1")
	fromCache := inline("layers", "dir://cached/layer-0")
	other := inline("layers", layersOf(t, node, map[string]string{"f": "f"}))
	ofPod := inline("layers", "volume://share/layer-0")
	onNFS.Name, upper.Name, fromCache.Name, ofPod.Name, other.Name = "on-nfs", "upper", "from-cache", "of-pod", "other"
	for _, v := range []drivertest.Volume{onNFS, upper, fromCache, ofPod, other} {
		wantFile(t, filepath.Join(publish(t, pod, v), "f"), "f")
	}
	others := newPod(t, node, "others")
	for i := range views {
		onNFS.Name = fmt.Sprintf("view-%d", i)
		publish(t, others, onNFS)
	}
	onNFS.Name = "on-nfs"
	before := threads(t, node)
	goAway()
	wantOthersGoOn(t, node, pod, other)
	soon(t, "the health of a volume on NFS", func() { wantHealth(t, node, pod, onNFS, inaccessible, "DoesNotAnswer") })
	wantHealth(t, node, pod, other, 0, "")

	waiting := newPod(t, node, "waiting")
	wantRefused(t, pod, waiting)
	if now := threads(t, node); now > before+views+20 {
		t.Errorf("the driver has %d threads, and had %d before", now, before)
	} else {
		t.Logf("the driver has %d threads, and had %d before", now, before)
	}
	wantOthersGoOn(t, node, pod, other)

	soon(t, "the unpublish of "+fromCache.Name, func() { unpublish(t, pod, fromCache) })
	soon(t, "the end of the driver", func() { must(t, node.Kill()) })
	soon(t, "the start of the driver", func() { start(t, node) })
	wantOthersGoOn(t, node, pod, other)
	for _, v := range []drivertest.Volume{upper, ofPod, other} {
		soon(t, "the unpublish of "+v.Name, func() { unpublish(t, pod, v) })
	}

	comeBack()
	eventually(t, "the server answers", func() bool {
		_, err := waiting.Publish(timeout(t), onNFS)
		return err == nil
	})
	wantFile(t, filepath.Join(waiting.Target(onNFS.Name), "f"), "f")
	wantFile(t, filepath.Join(pod.Target(onNFS.Name), "f"), "f")
	eventually(t, "the volume is well again", func() bool {
		reasons, err := healthReasons(node, pod, onNFS)
		return err == nil && len(reasons) == 0
	})
	unpublish(t, pod, onNFS)
	unpublish(t, waiting, onNFS)
	for i := range views {
		onNFS.Name = fmt.Sprintf("view-%d", i)
		unpublish(t, others, onNFS)
	}
	for _, p := range []*drivertest.Pod{pod, waiting} {
		left, err := filepath.Glob(filepath.Join(p.Dir(), "volumes/kubernetes.io~csi/*"))
		must(t, err)
		for _, path := range left {
			onNFS.Name = filepath.Base(path)
			unpublish(t, p, onNFS)
		}
	}
	must(t, unix.Unmount(share, unix.MNT_DETACH))
	for _, p := range []*drivertest.Pod{pod, others, waiting} {
		removePod(t, p)
	}
	wantNothingLeft(t, node)
}

// wantOthersGoOn checks all that has nothing to do with the server. other is a volume that is published for pod.
func wantOthersGoOn(t *testing.T, node *drivertest.Node, pod *drivertest.Pod, other drivertest.Volume) {
	t.Helper()
	soon(t, "the publish, statistics and unpublish of another volume", func() {
		another := newPod(t, node, "another")
		wantFile(t, filepath.Join(publish(t, another, other), "f"), "f")
		stats(t, node, another, other)
		unpublish(t, another, other)
		removePod(t, another)
		stats(t, node, pod, other)
	})
	soon(t, "reconcile", func() {
		for range 2 {
			waitForReconcile(t, node)
		}
	})
	response, err := node.Identity().Probe(timeout(t), &csi.ProbeRequest{})
	must(t, err)
	if !response.GetReady().GetValue() {
		t.Error("the driver is not ready")
	}
}

// wantRefused checks that volumes that name layers on the server are refused. pod has the server as a volume of its own.
func wantRefused(t *testing.T, pod, waiting *drivertest.Pod) {
	t.Helper()
	refuse := func(pod *drivertest.Pod, ref, message string) {
		v := inline("layers", ref)
		v.Name = strings.NewReplacer("/", "-", ":", "-").Replace(ref)
		_, err := pod.Publish(timeout(t), v)
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), message) || !strings.Contains(err.Error(), "does not answer") {
			t.Errorf("%s: %v", ref, err)
		}
	}
	layer := func(i int) string { return fmt.Sprintf("dir://away/layer-%d", i) }
	soon(t, "a publish with a layer on NFS", func() { refuse(waiting, layer(0), "layer root away") })
	soon(t, "the next one with the same layer", func() { refuse(waiting, layer(0), "layer root away") })
	soon(t, "others at the same time", func() {
		var all sync.WaitGroup
		for i := range 10 {
			all.Go(func() { refuse(waiting, layer(i), "layer root away") })
		}
		// The kernel remembers this directory.
		all.Go(func() { refuse(waiting, "dir://cached/layer-0", "layer root cached") })
		all.Go(func() { refuse(waiting, "archive://cached/a.tar", "layer root cached") })
		all.Go(func() { refuse(pod, "volume://share/layer-1", "volume share of pod default/pod") })
		all.Wait()
	})
	soon(t, "all others one after the other", func() {
		for i := range onServer {
			refuse(waiting, layer(i), "layer root away")
		}
		refuse(pod, "volume://share/layer-1", "volume share of pod default/pod")
	})
}

// healthReasons are the reasons of what is wrong with a volume as its pod sees it.
func healthReasons(node *drivertest.Node, pod *drivertest.Pod, v drivertest.Volume) (reasons []string, err error) {
	request := pod.Request(v)
	response, err := node.NodeService().NodeGetVolumeHealth(context.Background(),
		&csi.NodeGetVolumeHealthRequest{VolumeId: request.GetVolumeId(), VolumePublishPath: request.GetTargetPath()})
	for _, c := range response.GetVolumeHealth().GetHealthStatuses() {
		reasons = append(reasons, c.GetReason())
	}
	return reasons, err
}
