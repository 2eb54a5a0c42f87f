package integration

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// startRegistry starts a registry that the node knows how to reach.
func startRegistry(t *testing.T, node *drivertest.Node, options registrytest.Options) *registrytest.Registry {
	t.Helper()
	r, err := registrytest.Start(options)
	must(t, err)
	t.Cleanup(r.Close)
	must(t, r.Configure(node.CertsDir()))
	return r
}

// pushImage pushes an image of layers with these files, the lowest first, and returns its reference by digest.
func pushImage(t *testing.T, r *registrytest.Registry, name string, layers ...map[string]string) string {
	t.Helper()
	image, err := registrytest.ImageOf(layers...)
	must(t, err)
	return pushAny(t, r, name, image)
}

func pushAny(t *testing.T, r *registrytest.Registry, name string, what remote.Taggable) string {
	t.Helper()
	pinned, err := r.Push(t.Context(), name, what)
	must(t, err)
	return "oci://" + pinned
}

// TestImageVolume has an image of as many layers as images have at most, over a directory and over another image that has
// a layer of the first.
func TestImageVolume(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		r := startRegistry(t, node, registrytest.Options{})
		var layers []map[string]string
		for i := range 127 {
			layers = append(layers, map[string]string{"top": fmt.Sprint(i), fmt.Sprint("only-", i): "x"})
		}
		pushImage(t, r, "many:1", layers...)
		pushImage(t, r, "other:1", layers[3], map[string]string{"other": "other", "top": "other"})
		_, err := node.Layer("base", map[string]string{"base": "base", "top": "base"})
		must(t, err)
		v := inline("layers", fmt.Sprintf("oci://%s/many:1\noci://%s/other:1\ndir://layers/base", r.Host, r.Host))
		pod := newPod(t, node, "pod")
		target := publish(t, pod, v)
		for file, want := range map[string]string{"top": "126", "only-0": "x", "only-126": "x", "other": "other", "base": "base"} {
			wantFile(t, filepath.Join(target, file), want)
		}
		write(t, filepath.Join(target, "top"), "mine")
		second := newPod(t, node, "second")
		wantFile(t, filepath.Join(publish(t, second, v), "top"), "126")
		must(t, node.Kill())
		start(t, node)
		publish(t, pod, v)
		wantFile(t, filepath.Join(target, "top"), "mine")
		unpublish(t, pod, v)
		unpublish(t, second, v)
		wantNothingLeft(t, node)
	})
}

// TestPlatformOfImageVolume names another platform than the node's, of a tag and of the digest of an index.
func TestPlatformOfImageVolume(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{})
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, architecture := range []string{"amd64", "arm64", "s390x"} {
		image, err := registrytest.ImageOf(map[string]string{"f": architecture})
		must(t, err)
		platform := v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: architecture}}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: platform})
	}
	pinned := pushAny(t, r, "many:1", index)
	for i, name := range []string{"oci://" + r.Host + "/many:1", pinned} {
		v := inline("layers", name+"?platform=linux/s390x")
		pod := newPod(t, node, fmt.Sprint("pod-", i))
		wantFile(t, filepath.Join(publish(t, pod, v), "f"), "s390x")
		// The pod keeps its image, without the registry.
		r.SetFault(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(http.StatusNotFound); return true })
		must(t, node.Kill())
		start(t, node)
		wantFile(t, filepath.Join(publish(t, pod, v), "f"), "s390x")
		r.SetFault(nil)
		unpublish(t, pod, v)
	}
}

func TestPathInImageVolume(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{})
	pushImage(t, r, "a:1", map[string]string{"usr/share/a": "a", "usr/share/b": "b"},
		map[string]string{"usr/share/.wh.a": "", "usr/share/c": "c"})
	v := inline("layers", "oci://"+r.Host+"/a:1?path=/usr/share")
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	wantFile(t, filepath.Join(target, "b"), "b")
	wantFile(t, filepath.Join(target, "c"), "c")
	wantAbsent(t, filepath.Join(target, "a"))
	unpublish(t, pod, v)
	_, err := pod.Publish(timeout(t), inline("layers", "oci://"+r.Host+"/a:1?path=/nowhere"))
	wantCode(t, err, codes.NotFound, "nowhere")
}

func TestImageOfPrivateRegistry(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{TLS: true, User: "u", Password: "p"})
	pushImage(t, r, "team/a:1", map[string]string{"f": "private"})
	ref := "oci://" + r.Host + "/team/a:1"
	pod := newPod(t, node, "pod")
	for name, c := range map[string]struct {
		secrets map[string]string
		code    codes.Code
		words   []string
	}{
		"none": {nil, codes.Unauthenticated, []string{r.Host, "without credentials"}},
		"wrong": {map[string]string{".dockerconfigjson": r.DockerConfig("u", "hunter2")}, codes.Unauthenticated,
			[]string{r.Host, `as user "u"`}},
		"other type": {map[string]string{"username": "u"}, codes.InvalidArgument, []string{"kubectl create secret docker-registry"}},
	} {
		t.Run(name, func(t *testing.T) {
			v := inline("layers", ref)
			v.Name, v.Secrets = "v-"+strings.ReplaceAll(name, " ", "-"), c.secrets
			_, err := pod.Publish(timeout(t), v)
			wantCode(t, err, c.code, c.words...)
		})
	}
	v := inline("layers", ref)
	v.Secrets = map[string]string{".dockerconfigjson": r.DockerConfig("u", "p")}
	target := publish(t, pod, v)
	wantFile(t, filepath.Join(target, "f"), "private")
	unpublish(t, pod, v)
	if log := node.Log(); strings.Contains(log, "hunter2") || strings.Contains(log, `"p"`) {
		t.Error("the log has a password in it")
	}
	// A claim's tag is resolved with the provisioner's secret.
	request := &csi.CreateVolumeRequest{Name: "claim", Parameters: map[string]string{"layers": ref},
		VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(readWriteOnce)}}
	_, err := node.Controller().CreateVolume(timeout(t), request)
	wantCode(t, err, codes.Unauthenticated, r.Host)
	request.Secrets = v.Secrets
	_, err = node.Controller().CreateVolume(timeout(t), request)
	must(t, err)
}

// TestTagsArePinned moves a tag under a claim and under a pod.
func TestTagsArePinned(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{})
	old := pushImage(t, r, "a:1", map[string]string{"f": "old"})
	_, oldDigest, _ := strings.Cut(old, "@")
	ref := "oci://" + r.Host + "/a:1"
	kept := claim("kept", readWriteOnce, "layers", ref)
	request := func(mode csi.VolumeCapability_AccessMode_Mode) *csi.CreateVolumeRequest {
		return &csi.CreateVolumeRequest{Name: "made-" + mode.String(), Parameters: map[string]string{"layers": ref},
			VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(mode)}}
	}
	made := map[csi.VolumeCapability_AccessMode_Mode]*csi.Volume{}
	for _, mode := range []csi.VolumeCapability_AccessMode_Mode{readWriteOnce, csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY} {
		response, err := node.Controller().CreateVolume(timeout(t), request(mode))
		must(t, err)
		made[mode] = response.GetVolume()
		if layers := made[mode].GetVolumeContext()["layers"]; layers != ref+"@"+oldDigest {
			t.Errorf("layers %q of a claim that was made when the tag was %s", layers, oldDigest)
		}
	}
	pod := newPod(t, node, "early")
	v := inline("layers", ref)
	publish(t, pod, v)
	publish(t, pod, kept)

	pushImage(t, r, "a:1", map[string]string{"f": "new"})
	// Asked again, a claim that was made is what it was.
	response, err := node.Controller().CreateVolume(timeout(t), request(readWriteOnce))
	must(t, err)
	if again := response.GetVolume().GetVolumeContext()["layers"]; again != made[readWriteOnce].GetVolumeContext()["layers"] {
		t.Errorf("layers %q when it was asked for again", again)
	}
	// The pod's view comes back after its node was down, and so does the upper of a claim.
	must(t, drivertest.UnmountBeneath(node.KubeletDir))
	wantFile(t, filepath.Join(publish(t, pod, v), "f"), "old")
	wantFile(t, filepath.Join(publish(t, pod, kept), "f"), "old")
	for mode, volume := range made {
		later := drivertest.Volume{Name: volume.GetVolumeId(), ID: volume.GetVolumeId(), Claim: true, Mode: mode,
			Attributes: volume.GetVolumeContext()}
		wantFile(t, filepath.Join(publish(t, pod, later), "f"), "old")
	}
	late := newPod(t, node, "late")
	wantFile(t, filepath.Join(publish(t, late, v), "f"), "new")

	if log := node.Log(); !strings.Contains(log, oldDigest) {
		t.Errorf("the log does not have %s", oldDigest)
	}
	described, err := node.Admin().Volume(timeout(t), pod.Request(v).GetVolumeId())
	must(t, err)
	if described.Resolved[ref].String() != oldDigest {
		t.Errorf("the volume's state has %v", described.Resolved)
	}
}

// TestArchiveVolume has archives in place of a registry.
func TestArchiveVolume(t *testing.T) {
	node := startNode(t)
	rootfs := func(content string) []byte {
		data, err := registrytest.Tar(registrytest.Dir("etc"), registrytest.File("etc/hostname", content))
		must(t, err)
		return registrytest.Zstd(data)
	}
	path := filepath.Join(node.LayerDir, "images", "rootfs.tar.zst")
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, rootfs("first"), 0o644))
	ref := "archive://layers/images/rootfs.tar.zst"
	kept := claim("kept", readWriteOnce, "layers", ref)
	pod := newPod(t, node, "pod")
	target := publish(t, pod, kept)
	wantFile(t, filepath.Join(target, "etc/hostname"), "first")
	write(t, filepath.Join(target, "mine"), "mine")
	unpublish(t, pod, kept)

	// The archive is replaced, and then its layer is collected, which a volume that needs it does not let happen.
	must(t, os.WriteFile(path, rootfs("second"), 0o644))
	collected, err := node.Admin().GC(timeout(t), false, true)
	must(t, err)
	if len(collected.Layers) != 0 {
		t.Errorf("a layer that a claim needs was collected: %+v", collected)
	}
	wantFile(t, filepath.Join(publish(t, pod, kept), "etc/hostname"), "first")
	wantFile(t, filepath.Join(target, "mine"), "mine")
	unpublish(t, pod, kept)
	v := inline("layers", ref)
	wantFile(t, filepath.Join(publish(t, pod, v), "etc/hostname"), "second")
	unpublish(t, pod, v)

	// Somebody removes the layer with his own hands: what the volume was made on cannot be had any more.
	must(t, node.Stop())
	must(t, os.RemoveAll(filepath.Join(node.DataRoot, "layers")))
	start(t, node)
	_, err = pod.Publish(timeout(t), kept)
	wantCode(t, err, codes.FailedPrecondition, "was changed", ref)
	must(t, os.WriteFile(path, rootfs("first"), 0o644))
	wantFile(t, filepath.Join(publish(t, pod, kept), "mine"), "mine")
	unpublish(t, pod, kept)
	for _, bad := range []string{"archive://layers/images/missing.tar", "archive://layers/images/rootfs.tar.zst/x"} {
		if _, err := pod.Publish(timeout(t), inline("layers", bad)); err == nil {
			t.Errorf("%s was published", bad)
		}
	}
}

// TestManyPodsOneColdImage counts the downloads at the registry.
func TestManyPodsOneColdImage(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{})
	pinned := pushImage(t, r, "a:1", map[string]string{"a": strings.Repeat("a", 1<<20)}, map[string]string{"b": strings.Repeat("b", 1<<20)},
		map[string]string{"c": "c"})
	v := inline("layers", pinned)
	var group sync.WaitGroup
	var pods []*drivertest.Pod
	for i := range 50 {
		pods = append(pods, newPod(t, node, fmt.Sprint("pod-", i)))
	}
	for _, pod := range pods {
		group.Go(func() {
			if _, err := pod.Publish(timeout(t), v); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	downloads := map[string]int{}
	for _, request := range r.Requests() {
		if strings.HasPrefix(request, "GET ") && strings.Contains(request, "/blobs/") {
			downloads[request]++
		}
	}
	// Three layers and a configuration.
	if len(downloads) != 4 {
		t.Errorf("%d blobs were downloaded: %v", len(downloads), downloads)
	}
	for request, count := range downloads {
		if count != 1 {
			t.Errorf("%d times %s", count, request)
		}
	}
	for _, pod := range pods {
		wantFile(t, filepath.Join(pod.Target(v.Name), "c"), "c")
		unpublish(t, pod, v)
	}
	wantNothingLeft(t, node)
}

// TestSlowPullIsToldAndGoesOn has kubelet give up before the registry is done.
func TestSlowPullIsToldAndGoesOn(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{})
	pinned := pushImage(t, r, "a:1", map[string]string{"a": "a"})
	release := make(chan struct{})
	r.SetFault(func(_ http.ResponseWriter, request *http.Request) bool {
		if registrytest.IsBlob(request, "") {
			<-release
		}
		return false
	})
	pod := newPod(t, node, "pod")
	v := inline("layers", pinned)
	ctx, cancel := contextWithTimeout(t, 2*time.Second)
	defer cancel()
	_, err := pod.Publish(ctx, v)
	wantCode(t, err, codes.Unavailable, "still being pulled", r.Host)
	close(release)
	publish(t, pod, v)
	unpublish(t, pod, v)
	wantNothingLeft(t, node)
}

func TestPrefetch(t *testing.T) {
	node := newNode(t)
	r := startRegistry(t, node, registrytest.Options{User: "u", Password: "p"})
	config := filepath.Join(node.Dir, "config.json")
	must(t, os.WriteFile(config, []byte(r.DockerConfig("u", "p")), 0o600))
	pinned := pushImage(t, r, "a:1", map[string]string{"f": "f"})
	node.AddArgs("--prefetch="+r.Host+"/a:1", "--registry-config="+config, "--layer-gc-min-age=0s")
	start(t, node)
	eventually(t, "the image is here", func() bool {
		images, err := node.Admin().Images(timeout(t))
		return err == nil && len(images) == 1
	})
	collected, err := node.Admin().GC(timeout(t), false, true)
	must(t, err)
	if len(collected.Layers) > 0 {
		t.Errorf("what is to be kept was collected")
	}
	r.Close()
	pod := newPod(t, node, "pod")
	v := inline("layers", pinned)
	publish(t, pod, v)
	unpublish(t, pod, v)
}

// TestTooManyLayersTogether stacks images that have more layers together than overlayfs takes.
func TestTooManyLayersTogether(t *testing.T) {
	node := startNode(t)
	r := startRegistry(t, node, registrytest.Options{})
	for _, name := range []string{"a", "b"} {
		var layers []map[string]string
		for i := range 251 {
			layers = append(layers, map[string]string{"f": fmt.Sprint(name, i)})
		}
		pushImage(t, r, name+":1", layers...)
	}
	pod := newPod(t, node, "pod")
	_, err := pod.Publish(timeout(t), inline("layers", fmt.Sprintf("oci://%s/a:1\noci://%s/b:1", r.Host, r.Host)))
	wantCode(t, err, codes.InvalidArgument, "502 layers", "500")
	wantNothingLeft(t, node)
}

// TestAdminConnectionsEnd asks more often than a process may have files open.
func TestAdminConnectionsEnd(t *testing.T) {
	node := startNode(t)
	open := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", node.PID()))
		must(t, err)
		return len(entries)
	}
	before := open()
	for range 200 {
		if _, err := node.Admin().Layers(timeout(t)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the driver has closed its connections", func() bool { return open() < before+20 })
}
