package kubeapi

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
)

var testPod = kubelet.Pod{UID: "uid-1", Namespace: "default", Name: "pod"}

// newTestClient returns a client of a server that has these objects by path, answers 403 for a path that ends in "forbidden", and
// 404 for all others.
func newTestClient(t *testing.T, objects map[string]any) *Client {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		status := metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure"}
		var answer any = status
		if object, ok := objects[strings.TrimPrefix(r.URL.Path, "/api/v1/namespaces/default/")]; ok {
			answer = object
		} else if strings.HasSuffix(r.URL.Path, "forbidden") {
			status.Reason, status.Code = metav1.StatusReasonForbidden, http.StatusForbidden
			answer = status
			w.WriteHeader(http.StatusForbidden)
		} else {
			status.Reason, status.Code = metav1.StatusReasonNotFound, http.StatusNotFound
			answer = status
			w.WriteHeader(http.StatusNotFound)
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(server.Close)
	client, err := NewClient(&rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func newClaim(pv string, mutate func(*corev1.PersistentVolumeClaim)) *corev1.PersistentVolumeClaim {
	claim := &corev1.PersistentVolumeClaim{TypeMeta: metav1.TypeMeta{Kind: "PersistentVolumeClaim", APIVersion: "v1"}}
	claim.Spec.VolumeName = pv
	if mutate != nil {
		mutate(claim)
	}
	return claim
}

func TestPodVolume(t *testing.T) {
	claimSource := func(name string) corev1.VolumeSource {
		return corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}}
	}
	pod := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Name: "pod", Namespace: "default", UID: "uid-1"},
	}
	pod.Spec.Volumes = []corev1.Volume{
		{Name: "empty", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		{Name: "memory", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}}},
		{Name: "bound", VolumeSource: claimSource("bound")},
		{Name: "unbound", VolumeSource: claimSource("unbound")},
		{Name: "block", VolumeSource: claimSource("block")},
		{Name: "missing", VolumeSource: claimSource("missing")},
		{Name: "forbidden", VolumeSource: claimSource("forbidden")},
		{Name: "generic", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}},
		{Name: "stolen", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}},
		{Name: "host", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/etc"}}},
		{Name: "image", VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{}}},
	}
	for _, volume := range pod.Spec.Volumes {
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{VolumeMounts: []corev1.VolumeMount{{Name: volume.Name}}})
	}
	pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: "unused"})
	client := newTestClient(t, map[string]any{
		"pods/pod":                       pod,
		"persistentvolumeclaims/bound":   newClaim("pv-1", nil),
		"persistentvolumeclaims/unbound": newClaim("", nil),
		"persistentvolumeclaims/block": newClaim("pv-2", func(c *corev1.PersistentVolumeClaim) {
			mode := corev1.PersistentVolumeBlock
			c.Spec.VolumeMode = &mode
		}),
		"persistentvolumeclaims/pod-generic": newClaim("pv-3", func(c *corev1.PersistentVolumeClaim) {
			yes := true
			c.OwnerReferences = []metav1.OwnerReference{{UID: types.UID(testPod.UID), Controller: &yes}}
		}),
		"persistentvolumeclaims/pod-stolen": newClaim("pv-4", nil),
	})
	recreated := testPod
	recreated.UID = "uid-0"
	for name, c := range map[string]struct {
		pod    kubelet.Pod
		volume string
		want   kubelet.Volume
		is     func(error) bool
		word   string
	}{
		"emptyDir":          {pod: testPod, volume: "empty"},
		"emptyDir, memory":  {pod: testPod, volume: "memory", want: kubelet.Volume{InMemory: true}},
		"claim":             {pod: testPod, volume: "bound", want: kubelet.Volume{Claim: "bound", PersistentVolume: "pv-1"}},
		"unbound claim":     {pod: testPod, volume: "unbound", want: kubelet.Volume{Claim: "unbound"}},
		"generic ephemeral": {pod: testPod, volume: "generic", want: kubelet.Volume{Claim: "pod-generic", PersistentVolume: "pv-3"}},
		"claim of another":  {pod: testPod, volume: "stolen", is: errdefs.IsFailedPrecondition, word: "not created for pod"},
		"missing claim":     {pod: testPod, volume: "missing", is: errdefs.IsUnavailable, word: "get claim default/missing"},
		"forbidden claim":   {pod: testPod, volume: "forbidden", is: errdefs.IsFailedPrecondition, word: "ServiceAccount"},
		"not mounted":       {pod: testPod, volume: "unused", is: errdefs.IsInvalidArgument, word: "volumeMounts"},
		"no such volume":    {pod: testPod, volume: "other", is: errdefs.IsInvalidArgument, word: `no volume "other"`},
		"recreated pod":     {pod: recreated, volume: "empty", is: errdefs.IsUnavailable, word: "UID is uid-1, request is for uid-0"},
		"pod that is deleted": {
			pod: kubelet.Pod{UID: "u", Namespace: "default", Name: "gone"}, volume: "empty", is: errdefs.IsUnavailable, word: "gone",
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := client.PodVolume(t.Context(), c.pod, c.volume)
			switch {
			case c.is == nil && (err != nil || got != c.want):
				t.Errorf("got %+v, %v; want %+v", got, err, c.want)
			case c.is != nil && (err == nil || !c.is(err) || !strings.Contains(err.Error(), c.word)):
				t.Errorf("got error %v; want another kind or %q in it", err, c.word)
			}
		})
	}
	for _, name := range []string{"host", "image", "block"} {
		t.Run("unreachable "+name, func(t *testing.T) {
			got, err := client.PodVolume(t.Context(), testPod, name)
			if err != nil || got.Unreachable == "" {
				t.Errorf("got %+v, %v; want a reason", got, err)
			}
		})
	}
}

func TestClaimAnnotations(t *testing.T) {
	client := newTestClient(t, map[string]any{
		"persistentvolumeclaims/a": newClaim("", func(c *corev1.PersistentVolumeClaim) { c.Annotations = map[string]string{"key": "value"} }),
	})
	if got, err := client.ClaimAnnotations(t.Context(), "default", "a"); err != nil || got["key"] != "value" {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := client.ClaimAnnotations(t.Context(), "default", "gone"); !errdefs.IsNotFound(err) {
		t.Errorf("a missing claim: %v", err)
	}
	if _, err := client.ClaimAnnotations(t.Context(), "default", "forbidden"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a forbidden claim: %v", err)
	}
}

func TestPodPhase(t *testing.T) {
	pod := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Name: "pod", Namespace: "default", UID: "uid-1"},
		Status:     corev1.PodStatus{Phase: corev1.PodSucceeded},
	}
	client := newTestClient(t, map[string]any{"pods/pod": pod})
	if phase, err := client.PodPhase(t.Context(), testPod); phase != corev1.PodSucceeded || err != nil {
		t.Errorf("got %q, %v", phase, err)
	}
	for name, c := range map[string]struct {
		pod kubelet.Pod
		is  func(error) bool
	}{
		"gone":      {kubelet.Pod{UID: "uid-1", Namespace: "default", Name: "gone"}, errdefs.IsNotFound},
		"recreated": {kubelet.Pod{UID: "uid-0", Namespace: "default", Name: "pod"}, errdefs.IsNotFound},
		"forbidden": {kubelet.Pod{UID: "uid-1", Namespace: "default", Name: "forbidden"}, errdefs.IsFailedPrecondition},
	} {
		if phase, err := client.PodPhase(t.Context(), c.pod); phase != "" || !c.is(err) {
			t.Errorf("%s: got %q, %v", name, phase, err)
		}
	}
}

// newPV returns a PersistentVolume of a driver, with a node affinity by a label.
func newPV(name, handle, label, value string) *corev1.PersistentVolume {
	pv := &corev1.PersistentVolume{TypeMeta: metav1.TypeMeta{Kind: "PersistentVolume", APIVersion: "v1"}}
	pv.Name = name
	pv.Spec.CSI = &corev1.CSIPersistentVolumeSource{Driver: "driver", VolumeHandle: handle}
	if label != "" {
		pv.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: label, Operator: corev1.NodeSelectorOpIn, Values: []string{value}}},
		}}}}
	}
	return pv
}

func TestVolumeTopology(t *testing.T) {
	list := &corev1.PersistentVolumeList{TypeMeta: metav1.TypeMeta{Kind: "PersistentVolumeList", APIVersion: "v1"}}
	list.Items = append(list.Items, *newPV("again", "kept", "driver/node", "b"))
	client := newTestClient(t, map[string]any{
		"/api/v1/persistentvolumes":           list,
		"/api/v1/persistentvolumes/pvc-1":     newPV("pvc-1", "pvc-1", "driver/node", "a"),
		"/api/v1/persistentvolumes/anywhere":  newPV("anywhere", "anywhere", "", ""),
		"/api/v1/persistentvolumes/hostname":  newPV("hostname", "hostname", "kubernetes.io/hostname", "a"),
		"/api/v1/persistentvolumes/different": newPV("different", "kept", "driver/node", "c"),
	})
	for handle, c := range map[string]struct {
		want string
		is   func(error) bool
	}{
		"pvc-1":     {want: "a"},
		"kept":      {want: "b"},
		"anywhere":  {},
		"gone":      {},
		"hostname":  {is: errdefs.IsFailedPrecondition},
		"forbidden": {is: errdefs.IsFailedPrecondition},
	} {
		got, err := client.VolumeTopology(t.Context(), "driver", handle, "driver/node")
		if strings.Join(got, ",") != c.want || (c.is == nil) != (err == nil) || c.is != nil && !c.is(err) {
			t.Errorf("%s: got %q, %v", handle, got, err)
		}
	}
}

func TestNone(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	reader, err := New("")
	if err != nil || reader != (None{}) {
		t.Fatalf("outside of a cluster: %v, %v", reader, err)
	}
	_, errVolume := reader.PodVolume(t.Context(), testPod, "data")
	_, errClaim := reader.ClaimAnnotations(t.Context(), "default", "a")
	_, errPhase := reader.PodPhase(t.Context(), testPod)
	for _, err := range []error{errVolume, errClaim, errPhase} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "--kubeconfig") {
			t.Errorf("%v is no precondition with the fix in it", err)
		}
	}
	if _, err := New("/does/not/exist"); err == nil {
		t.Error("a kubeconfig that does not exist was taken")
	}
}
