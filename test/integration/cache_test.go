package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	corev1 "k8s.io/api/core/v1"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// cacheNode starts a node with an API server that knows the phases of pods.
func cacheNode(t *testing.T, args ...string) (*drivertest.Node, *drivertest.PodPhases) {
	t.Helper()
	node, statuses := newCacheNode(t, args...)
	start(t, node)
	return node, statuses
}

// newCacheNode is cacheNode for a node whose driver is not started yet.
func newCacheNode(t *testing.T, args ...string) (*drivertest.Node, *drivertest.PodPhases) {
	t.Helper()
	statuses := drivertest.NewPodPhases()
	t.Cleanup(statuses.Close)
	kubeconfig, err := statuses.Kubeconfig(t.TempDir())
	must(t, err)
	return newNode(t, append(args, "--kubeconfig="+kubeconfig)...), statuses
}

// cacheVolume is an inline volume in a namespace, on layers, whose upper is committed to a cache unless that is "".
func cacheVolume(namespace, layers, commit string) drivertest.Volume {
	v := inline("layers", layers, "csi.storage.k8s.io/pod.namespace", namespace)
	if commit != "" {
		v.Attributes["commit"] = commit
	}
	return v
}

// job runs a pod that writes files to a volume, and ends in a phase.
func job(
	t *testing.T, node *drivertest.Node, statuses *drivertest.PodPhases, name string, v drivertest.Volume, phase corev1.PodPhase,
	files ...string,
) {
	t.Helper()
	pod := newPod(t, node, name)
	target := publish(t, pod, v)
	for _, file := range files {
		write(t, filepath.Join(target, file), name)
	}
	statuses.Set(pod, phase)
	unpublish(t, pod, v)
	removePod(t, pod)
}

// wantCache publishes a view of a cache and checks which files it has, with the names of the jobs that wrote them.
func wantCache(t *testing.T, node *drivertest.Node, namespace, layers string, want map[string]string) {
	t.Helper()
	pod, v := newPod(t, node, "reader"), cacheVolume(namespace, layers, "")
	target := publish(t, pod, v)
	entries, err := os.ReadDir(target)
	must(t, err)
	got := map[string]string{}
	for _, entry := range entries {
		content, err := os.ReadFile(filepath.Join(target, entry.Name()))
		must(t, err)
		got[entry.Name()] = string(content)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s in %s has %v instead of %v", layers, namespace, got, want)
	}
	unpublish(t, pod, v)
	removePod(t, pod)
}

func TestCache(t *testing.T) {
	node, statuses := cacheNode(t)
	deps := cacheVolume("ci", "cache://deps", "deps")
	job(t, node, statuses, "first", deps, corev1.PodSucceeded, "a", "b")
	wantCache(t, node, "ci", "cache://deps", map[string]string{"a": "first", "b": "first"})

	pod := newPod(t, node, "second")
	target := publish(t, pod, deps)
	wantFile(t, filepath.Join(target, "a"), "first")
	write(t, filepath.Join(target, "a"), "second")
	must(t, os.Remove(filepath.Join(target, "b")))
	statuses.Set(pod, corev1.PodSucceeded)
	unpublish(t, pod, deps)
	removePod(t, pod)
	wantCache(t, node, "ci", "cache://deps", map[string]string{"a": "second"})

	job(t, node, statuses, "failed", deps, corev1.PodFailed, "a", "c")
	wantCache(t, node, "ci", "cache://deps", map[string]string{"a": "second"})
	// Nobody sees it but the namespace.
	wantCache(t, node, "other", "cache://deps", map[string]string{})
	wantCache(t, node, "ci", "cache://other", map[string]string{})
	// Without cache:// the cache begins again.
	job(t, node, statuses, "anew", cacheVolume("ci", layersOf(t, node, map[string]string{"l": "layer"}), "deps"), corev1.PodSucceeded, "d")
	wantCache(t, node, "ci", "cache://deps", map[string]string{"d": "anew"})
	// It may lie between layers.
	between := layersOf(t, node, map[string]string{"d": "above"}, map[string]string{"below": "below"})
	above, below, _ := strings.Cut(between, "\n")
	wantCache(t, node, "ci", above+"\ncache://deps\n"+below, map[string]string{"d": "above", "below": "below", "l": "layer"})
	wantNoViews(t, node)
}

// TestCacheLastWriter: two jobs at once begin on one version, and the one that ends last is the newest version as a whole.
func TestCacheLastWriter(t *testing.T) {
	node, statuses := cacheNode(t)
	deps := cacheVolume("ci", "cache://deps", "deps")
	job(t, node, statuses, "base", deps, corev1.PodSucceeded, "base")
	var pods []*drivertest.Pod
	var targets []string
	for _, name := range []string{"one", "two"} {
		pods = append(pods, newPod(t, node, name))
		targets = append(targets, publish(t, pods[len(pods)-1], deps))
	}
	for i, pod := range pods {
		write(t, filepath.Join(targets[i], "of-"+pod.Name), pod.Name)
		write(t, filepath.Join(targets[i], "both"), pod.Name)
	}
	// A view that is mounted keeps what it has.
	job(t, node, statuses, "between", deps, corev1.PodSucceeded, "between")
	wantAbsent(t, filepath.Join(targets[0], "between"))
	wantFile(t, filepath.Join(targets[0], "base"), "base")
	for _, i := range []int{1, 0} {
		statuses.Set(pods[i], corev1.PodSucceeded)
		unpublish(t, pods[i], deps)
	}
	wantCache(t, node, "ci", "cache://deps", map[string]string{"base": "base", "of-one": "one", "both": "one"})
	eventually(t, "what was replaced is discarded", func() bool {
		frozen, err := os.ReadDir(filepath.Join(node.DataRoot, "frozen"))
		return err == nil && len(frozen) == 2
	})
}

// TestCacheWithoutSuccess: a pod ends whatever is known of it, and nothing is committed.
func TestCacheWithoutSuccess(t *testing.T) {
	node, statuses := cacheNode(t)
	deps := cacheVolume("ci", "cache://deps", "deps")
	for name, phase := range map[string]corev1.PodPhase{"running": corev1.PodRunning, "failed": corev1.PodFailed} {
		job(t, node, statuses, name, deps, phase, "a")
	}
	pod := newPod(t, node, "gone")
	write(t, filepath.Join(publish(t, pod, deps), "a"), "a")
	unpublish(t, pod, deps)
	pod = newPod(t, node, "recreated")
	write(t, filepath.Join(publish(t, pod, deps), "a"), "a")
	statuses.Set(&drivertest.Pod{Name: "recreated", UID: "another"}, corev1.PodSucceeded)
	unpublish(t, pod, deps)
	wantCache(t, node, "ci", "cache://deps", map[string]string{})

	alone := startNode(t)
	pod = newPod(t, alone, "alone")
	write(t, filepath.Join(publish(t, pod, deps), "a"), "a")
	unpublish(t, pod, deps)
	wantCache(t, alone, "ci", "cache://deps", map[string]string{})
	if !strings.Contains(alone.Log(), "Not committed") {
		t.Error("the log does not say that nothing was committed")
	}
}

// TestCacheAfterReboot: what was committed and not yet written to the disk is not there after the node went down; the version before is.
func TestCacheAfterReboot(t *testing.T) {
	node, statuses := cacheNode(t)
	deps := cacheVolume("ci", "cache://deps", "deps")
	job(t, node, statuses, "first", deps, corev1.PodSucceeded, "a")
	record := filepath.Join(node.DataRoot, "caches/ci/deps/cache.json")
	read := func() string {
		data, err := os.ReadFile(record)
		must(t, err)
		return string(data)
	}
	eventually(t, "the first version is written", func() bool { return !strings.Contains(read(), "bootID") })
	must(t, node.Kill())
	start(t, node)
	wantCache(t, node, "ci", "cache://deps", map[string]string{"a": "first"})
	job(t, node, statuses, "second", deps, corev1.PodSucceeded, "a", "b")
	must(t, node.Kill())
	// As of a boot that ended before the version was written.
	var cache map[string]any
	must(t, json.Unmarshal([]byte(read()), &cache))
	versions := cache["versions"].([]any)
	cache["bootID"], cache["before"] = "earlier", versions[1:]
	data, err := json.Marshal(cache)
	must(t, err)
	must(t, os.WriteFile(record, data, 0o600))
	start(t, node)
	wantCache(t, node, "ci", "cache://deps", map[string]string{"a": "first"})
	eventually(t, "the record says so", func() bool { return !strings.Contains(read(), "earlier") })
}

// TestCacheKills kills the driver while jobs end.
func TestCacheKills(t *testing.T) {
	node, statuses := cacheNode(t)
	deps := cacheVolume("ci", "cache://deps", "deps")
	job(t, node, statuses, "base", deps, corev1.PodSucceeded, "base")
	for i := range proof(8, 200) {
		pod := newPod(t, node, fmt.Sprintf("job-%d", i))
		target := publish(t, pod, deps)
		wantFile(t, filepath.Join(target, "base"), "base")
		write(t, filepath.Join(target, "last"), pod.Name)
		statuses.Set(pod, corev1.PodSucceeded)
		ended := make(chan error)
		go func() { ended <- pod.Unpublish(timeout(t), deps) }()
		if i%2 == 0 {
			eventually(t, "the commit begins", func() bool {
				frozen, err := os.ReadDir(filepath.Join(node.DataRoot, "frozen"))
				return err != nil || len(frozen) > 0
			})
		}
		must(t, node.Kill())
		<-ended
		start(t, node)
		must(t, pod.Unpublish(timeout(t), deps))
		removePod(t, pod)
		wantCache(t, node, "ci", "cache://deps", map[string]string{"base": "base", "last": pod.Name})
	}
	wantNoViews(t, node)
	if left, err := os.ReadDir(filepath.Join(node.DataRoot, "volumes")); err != nil || len(left) > 0 {
		t.Errorf("volumes left: %v, %v", left, err)
	}
}

// TestCacheSize: the least recently used caches are removed, and one that is too large is not committed.
func TestCacheSize(t *testing.T) {
	node, statuses := cacheNode(t, "--cache-max-size=4Mi")
	fillCache := func(name string, bytes int) {
		t.Helper()
		pod, v := newPod(t, node, name), cacheVolume("ci", "cache://"+name, name)
		target := publish(t, pod, v)
		must(t, os.WriteFile(filepath.Join(target, "f"), make([]byte, bytes), 0o644))
		statuses.Set(pod, corev1.PodSucceeded)
		unpublish(t, pod, v)
		removePod(t, pod)
	}
	caches := func() string {
		paths, err := filepath.Glob(filepath.Join(node.DataRoot, "caches/ci/*"))
		must(t, err)
		for i, path := range paths {
			paths[i] = filepath.Base(path)
		}
		return strings.Join(paths, " ")
	}
	fillCache("a", 3<<20/2)
	fillCache("b", 3<<20/2)
	fillCache("huge", 5<<20)
	user, usesA := newPod(t, node, "user"), cacheVolume("ci", "cache://a", "")
	publish(t, user, usesA)
	fillCache("c", 3<<20/2)
	eventually(t, "the cache that no volume uses is removed", func() bool { return caches() == "a c" })
	unpublish(t, user, usesA)
}

func TestCacheRefuses(t *testing.T) {
	node, _ := cacheNode(t)
	pod := newPod(t, node, "pod")
	readOnly := cacheVolume("ci", "cache://deps", "deps")
	readOnly.ReadOnly = true
	static := func(attributes ...string) drivertest.Volume {
		return drivertest.Volume{Name: "v", ID: "v", Claim: true, Attributes: pairs(attributes)}
	}
	for name, c := range map[string]struct {
		v    drivertest.Volume
		word string
	}{
		"not topmost":     {cacheVolume("ci", layersOf(t, node, map[string]string{"f": "f"})+"\ncache://deps", "deps"), "as the first layer"},
		"no namespace":    {cacheVolume("", "cache://deps", ""), "namespace"},
		"namespace":       {cacheVolume("../ci", "cache://deps", "deps"), "namespace"},
		"read-only":       {readOnly, "read-only"},
		"static volume":   {static("layers", "cache://deps"), "inline"},
		"commit, static":  {static("layers", "dir://layers/layer-0", "commit", "x"), "inline"},
		"cache with path": {cacheVolume("ci", "cache://deps/sub", ""), "as a whole"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := pod.Publish(timeout(t), c.v)
			wantCode(t, err, codes.InvalidArgument, c.word)
		})
	}
	read := cacheVolume("ci", "cache://deps", "")
	read.Attributes["upper"] = "none"
	unpublishAfter(t, pod, read)
}

// unpublishAfter publishes a volume, whose view is empty, and unpublishes it.
func unpublishAfter(t *testing.T, pod *drivertest.Pod, v drivertest.Volume) {
	t.Helper()
	entries, err := os.ReadDir(publish(t, pod, v))
	if err != nil || len(entries) > 0 {
		t.Errorf("%v, %v", entries, err)
	}
	unpublish(t, pod, v)
}

// TestCacheMerges: a cache of many versions becomes one of few, and its files stay.
func TestCacheMerges(t *testing.T) {
	node, statuses := cacheNode(t)
	deps := cacheVolume("ci", "cache://deps", "deps")
	reader, want := newPod(t, node, "keeps"), map[string]string{}
	v := cacheVolume("ci", "cache://deps", "")
	var target string
	for i := range 12 {
		name := fmt.Sprintf("job-%d", i)
		job(t, node, statuses, name, deps, corev1.PodSucceeded, name, "last")
		want[name], want["last"] = name, name
		if i == 5 {
			target = publish(t, reader, v)
		}
	}
	eventually(t, "the versions are merged", func() bool {
		caches, err := node.Admin().Caches(t.Context())
		must(t, err)
		return len(caches) == 1 && caches[0].Versions <= 8
	})
	wantCache(t, node, "ci", "cache://deps", want)
	wantFile(t, filepath.Join(target, "last"), "job-5")
	wantFile(t, filepath.Join(target, "job-0"), "job-0")
	unpublish(t, reader, v)
	must(t, node.Admin().DeleteCache(t.Context(), "ci", "deps"))
	wantCache(t, node, "ci", "cache://deps", map[string]string{})
	eventually(t, "nothing is left of it", func() bool {
		frozen, err := os.ReadDir(filepath.Join(node.DataRoot, "frozen"))
		return err == nil && len(frozen) == 0
	})
}

// TestCacheOfDiskImages: each version has the backend of its volume, and they may differ.
func TestCacheOfDiskImages(t *testing.T) {
	node, statuses := cacheNode(t)
	image := cacheVolume("ci", "cache://deps", "deps")
	image.Attributes["sizeLimit"], image.Attributes["sizeEnforcement"] = "16Mi", "image"
	job(t, node, statuses, "image", image, corev1.PodSucceeded, "a", "b")
	job(t, node, statuses, "directory", cacheVolume("ci", "cache://deps", "deps"), corev1.PodSucceeded, "b", "c")
	job(t, node, statuses, "second-image", image, corev1.PodSucceeded, "c")
	want := map[string]string{"a": "image", "b": "directory", "c": "second-image"}
	wantCache(t, node, "ci", "cache://deps", want)
	must(t, node.Kill())
	start(t, node)
	wantCache(t, node, "ci", "cache://deps", want)
	wantNoViews(t, node)
}
