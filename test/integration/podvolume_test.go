package integration

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

func TestLayerInAnotherVolumeOfThePod(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		pod := newPod(t, node, "pod")
		scratch, err := pod.EmptyDir("scratch")
		must(t, err)
		fill(t, scratch, map[string]string{"a/f": "emptyDir", "a/e": "e"})
		must(t, pod.ConfigMap("settings", map[string]string{"f": "ConfigMap"}))
		data, err := pod.CSIVolume("data", "Ephemeral")
		must(t, err)
		mountTmpfs(t, data)
		fill(t, data, map[string]string{"f": "CSI", "c": "c"})

		v := inline("layers", "volume://settings\nvolume://scratch/a\nvolume://data")
		target := publish(t, pod, v)
		wantFile(t, filepath.Join(target, "f"), "ConfigMap")
		wantFile(t, filepath.Join(target, "e"), "e")
		wantFile(t, filepath.Join(target, "c"), "c")
		// A layer needs no pin: kubelet may unmount the volume first, and the view goes on.
		must(t, unix.Unmount(data, 0))
		wantFile(t, filepath.Join(target, "c"), "c")
		unpublish(t, pod, v)
	})
}

func TestLayerInAnotherVolumeStaysWithinIt(t *testing.T) {
	node := startNode(t, "--pod-volume-wait=10ms")
	pod := newPod(t, node, "pod")
	scratch, err := pod.EmptyDir("scratch")
	must(t, err)
	must(t, os.Symlink("/etc", filepath.Join(scratch, "etc")))
	must(t, os.Symlink("../..", filepath.Join(scratch, "up")))
	fill(t, scratch, map[string]string{"file": ""})
	other, err := pod.CSIVolume("pv-of-somebody", "Persistent")
	must(t, err)
	mountTmpfs(t, other)
	for ref, want := range map[string]codes.Code{
		"volume://scratch/etc":     codes.InvalidArgument,
		"volume://scratch/up":      codes.InvalidArgument,
		"volume://scratch/file":    codes.InvalidArgument,
		"volume://scratch/missing": codes.NotFound,
		"volume://scratch/../x":    codes.InvalidArgument,
		"volume://missing":         codes.Unavailable,
		// Kubelet keeps it under the PersistentVolume's name: that is no name of the pod's.
		"volume://pv-of-somebody": codes.Unavailable,
	} {
		t.Run(ref, func(t *testing.T) {
			_, err := pod.Publish(timeout(t), inline("layers", ref))
			wantCode(t, err, want)
		})
	}
	wantNoViews(t, node)
}

func TestPublishWaitsForKubeletToMountTheVolume(t *testing.T) {
	node := startNode(t)
	pod := newPod(t, node, "pod")
	go func() {
		time.Sleep(300 * time.Millisecond)
		if scratch, err := pod.EmptyDir("scratch"); err == nil {
			_ = os.WriteFile(filepath.Join(scratch, "late"), nil, 0o644)
		}
	}()
	target := publish(t, pod, inline("layers", "volume://scratch"))
	eventually(t, "the file in the volume is in the view", func() bool {
		_, err := os.Stat(filepath.Join(target, "late"))
		return err == nil
	})
}

// TestTimedOutPublishDoesNotPoisonTheNext is csi-driver-nfs #1271: an RPC that timed out left work behind which made
// every later one fail.
func TestTimedOutPublishDoesNotPoisonTheNext(t *testing.T) {
	node := startNode(t, "--pod-volume-wait=1h")
	pod := newPod(t, node, "pod")
	v := inline("layers", "volume://scratch")
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		_, err := pod.Publish(ctx, v)
		cancel()
		wantCode(t, err, codes.DeadlineExceeded)
	}
	eventually(t, "nothing is left of the publishes that timed out", func() bool {
		left, err := node.Leftovers()
		return err == nil && len(left) == 0
	})
	scratch, err := pod.EmptyDir("scratch")
	must(t, err)
	fill(t, scratch, map[string]string{"f": "f"})
	wantFile(t, filepath.Join(publish(t, pod, v), "f"), "f")
	unpublish(t, pod, v)
	wantNothingLeft(t, node)
}

// apiServer answers what the driver asks of an API server: one pod and its claims.
func apiServer(t *testing.T, pod *corev1.Pod, claims map[string]*corev1.PersistentVolumeClaim) (kubeconfig string) {
	t.Helper()
	answer := func(w http.ResponseWriter, object any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(object)
	}
	missing := metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure",
		Reason: metav1.StatusReasonNotFound, Code: http.StatusNotFound}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/namespaces/default/pods/{name}", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("name") != pod.Name {
			w.WriteHeader(http.StatusNotFound)
			answer(w, missing)
			return
		}
		answer(w, pod)
	})
	mux.HandleFunc("GET /api/v1/namespaces/default/persistentvolumeclaims/{name}", func(w http.ResponseWriter, r *http.Request) {
		if claim, ok := claims[r.PathValue("name")]; ok {
			answer(w, claim)
			return
		}
		w.WriteHeader(http.StatusNotFound)
		answer(w, missing)
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return kubeconfigOf(t, server.URL)
}

func kubeconfigOf(t *testing.T, url string) (path string) {
	t.Helper()
	config := clientcmdapi.NewConfig()
	config.Clusters["test"] = &clientcmdapi.Cluster{Server: url}
	config.Contexts["test"] = &clientcmdapi.Context{Cluster: "test"}
	config.CurrentContext = "test"
	path = filepath.Join(t.TempDir(), "kubeconfig")
	must(t, clientcmd.WriteToFile(*config, path))
	return path
}

func TestVolumesOfClaimsAreFoundThroughTheAPIServer(t *testing.T) {
	object := &corev1.Pod{TypeMeta: metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Name: "pod", Namespace: "default"}}
	object.Spec.Volumes = []corev1.Volume{
		{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "bound"}}},
		{Name: "waiting", VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "unbound"},
		}},
		{Name: "generic", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}},
		{Name: "host", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/etc"}}},
		{Name: "nfs", VolumeSource: corev1.VolumeSource{NFS: &corev1.NFSVolumeSource{Server: "s", Path: "/"}}},
	}
	for _, volume := range object.Spec.Volumes {
		object.Spec.Containers = append(object.Spec.Containers, corev1.Container{VolumeMounts: []corev1.VolumeMount{{Name: volume.Name}}})
	}
	object.Spec.Volumes = append(object.Spec.Volumes, corev1.Volume{Name: "unused"})
	claimOf := func(name, pv string) *corev1.PersistentVolumeClaim {
		c := &corev1.PersistentVolumeClaim{TypeMeta: metav1.TypeMeta{Kind: "PersistentVolumeClaim", APIVersion: "v1"},
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"}}
		c.Spec.VolumeName = pv
		return c
	}
	controlled := claimOf("pod-generic", "pv-generic")
	kubeconfig := apiServer(t, object, map[string]*corev1.PersistentVolumeClaim{"bound": claimOf("bound", "pv-1"),
		"unbound": claimOf("unbound", ""), "pod-generic": controlled})
	node := startNode(t, "--kubeconfig="+kubeconfig, "--pod-volume-wait=10ms")
	pod := newPod(t, node, "pod")
	object.UID = types.UID(pod.UID)
	yes := true
	controlled.OwnerReferences = []metav1.OwnerReference{{UID: object.UID, Controller: &yes}}
	for _, name := range []string{"pv-1", "pv-generic"} {
		data, err := pod.CSIVolume(name, "Persistent")
		must(t, err)
		mountTmpfs(t, data)
		fill(t, data, map[string]string{"f": name})
	}
	inTree := filepath.Join(pod.Dir(), "volumes/kubernetes.io~nfs/nfs")
	must(t, os.MkdirAll(inTree, 0o755))
	mountTmpfs(t, inTree)
	fill(t, inTree, map[string]string{"f": "nfs"})

	for ref, want := range map[string]string{"volume://data": "pv-1", "volume://generic": "pv-generic", "volume://nfs": "nfs"} {
		t.Run(ref, func(t *testing.T) {
			v := inline("layers", ref)
			wantFile(t, filepath.Join(publish(t, pod, v), "f"), want)
			unpublish(t, pod, v)
		})
	}
	for ref, want := range map[string]struct {
		code codes.Code
		word string
	}{
		"volume://waiting": {codes.Unavailable, "not bound"},
		"volume://host":    {codes.InvalidArgument, "layer root"},
		"volume://pv-1":    {codes.InvalidArgument, "no volume"},
		// Kubelet would never set it up: there is nothing to wait for.
		"volume://unused": {codes.InvalidArgument, "volumeMounts"},
	} {
		t.Run(ref, func(t *testing.T) {
			_, err := pod.Publish(timeout(t), inline("layers", ref))
			wantCode(t, err, want.code, want.word)
		})
	}
	wantNoViews(t, node)
}

// TestSlowAPIServer: an API server that does not answer is not taken for a file system that does not.
func TestSlowAPIServer(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, request *http.Request) {
		asked.Add(1)
		<-request.Context().Done()
	}))
	t.Cleanup(server.Close)
	node := startNode(t, "--kubeconfig="+kubeconfigOf(t, server.URL), "--pod-volume-wait=10ms")
	pod := newPod(t, node, "pod")
	v := inline("layers", "volume://data")
	for range 2 {
		_, err := pod.Publish(timeout(t), v)
		wantCode(t, err, codes.Unavailable, "API server")
		if strings.Contains(err.Error(), "file system") {
			t.Errorf("the error blames a file system: %v", err)
		}
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("the API server was asked %d times", n)
	}
}

// TestEmptyDirInMemoryAfterAReboot: a reboot leaves kubelet's file "ready" and the directory, but not the tmpfs on it.
func TestEmptyDirInMemoryAfterAReboot(t *testing.T) {
	memory, disk := corev1.StorageMediumMemory, corev1.StorageMediumDefault
	for name, c := range map[string]struct {
		// medium is what the API server says; nil: there is none.
		medium *corev1.StorageMedium
		// args take the API server's place.
		args []string
		// content is what lies in the directory on the disk.
		content map[string]string
		// word is in the message as long as nothing is mounted, "" if the volume is taken.
		word string
	}{
		"memory":                          {medium: &memory, word: "medium"},
		"memory, and data of older times": {medium: &memory, content: map[string]string{"old": ""}, word: "medium"},
		"huge pages":                      {medium: new(corev1.StorageMediumHugePages), word: "medium"},
		"disk":                            {medium: &disk},
		"nobody knows":                    {word: "--kubeconfig"},
		"API server does not answer":      {args: []string{"--kubeconfig=" + kubeconfigOf(t, "http://"+freeAddress(t))}, word: "get pod"},
		"a tmpfs has no data on the disk": {content: map[string]string{"data": ""}},
	} {
		t.Run(name, func(t *testing.T) {
			object := &corev1.Pod{TypeMeta: metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"},
				ObjectMeta: metav1.ObjectMeta{Name: "pod", Namespace: "default"}}
			object.Spec.Containers = []corev1.Container{{VolumeMounts: []corev1.VolumeMount{{Name: "scratch"}}}}
			args := append(c.args, "--pod-volume-wait=10ms")
			if c.medium != nil {
				object.Spec.Volumes = []corev1.Volume{
					{Name: "scratch", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: *c.medium}}},
				}
				args = append(args, "--kubeconfig="+apiServer(t, object, nil))
			}
			node := startNode(t, args...)
			pod := newPod(t, node, "pod")
			object.UID = types.UID(pod.UID)
			scratch, err := pod.EmptyDir("scratch")
			must(t, err)
			fill(t, scratch, c.content)
			earlier := time.Unix(1_000_000_000, 0)
			must(t, os.Chtimes(filepath.Join(pod.Dir(), "plugins/kubernetes.io~empty-dir/scratch/ready"), earlier, earlier))

			v := inline("layers", layersOf(t, node, map[string]string{"f": "layer"}), "upper", "volume://scratch/over")
			if c.word != "" {
				_, err := pod.Publish(timeout(t), v)
				wantCode(t, err, codes.Unavailable, c.word)
				wantAbsent(t, filepath.Join(scratch, "over"))
				wantNoViews(t, node)
				// Kubelet mounts it, and tries again.
				mountTmpfs(t, scratch)
			}
			write(t, filepath.Join(publish(t, pod, v), "f"), "pod")
			wantFile(t, filepath.Join(scratch, "over/upper/f"), "pod")
			unpublish(t, pod, v)
			wantNoViews(t, node)
		})
	}
}

// wantNoViews is for nodes whose pods have other volumes: nothing of the driver's is left.
func wantNoViews(t *testing.T, node *drivertest.Node) {
	t.Helper()
	mounts, err := drivertest.Mounts(node.KubeletDir)
	must(t, err)
	for _, mount := range mounts {
		if mount.FSType == "overlay" {
			t.Errorf("a view is left at %s", mount.Mountpoint)
		}
	}
	entries, err := os.ReadDir(filepath.Join(node.DataRoot, "volumes"))
	must(t, err)
	for _, entry := range entries {
		t.Errorf("volume %s is left", entry.Name())
	}
}
