package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
)

const driverName = "overlay-csi.github.io"

func pod(name, node string, volumes ...corev1.Volume) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name, UID: "uid-of-pod"},
		Spec:       corev1.PodSpec{NodeName: node, Volumes: volumes}, Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
}

func ofClaim(name, claim string) corev1.Volume {
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
		PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim},
	}}
}

func inlineVolume(name, driver string) corev1.Volume {
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{Driver: driver}}}
}

// bound returns a claim and its volume, which is on the node of a segment unless that is "".
func bound(claim, driver, segment string) []runtime.Object {
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv-" + claim}, Spec: corev1.PersistentVolumeSpec{
		PersistentVolumeSource: corev1.PersistentVolumeSource{
			CSI: &corev1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: "handle-of-" + claim},
		},
	}}
	if segment != "" {
		pv.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{
				{Key: driverName + "/node", Operator: corev1.NodeSelectorOpIn, Values: []string{segment}},
			},
		}}}}
	}
	return []runtime.Object{pv, &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: claim}, Spec: corev1.PersistentVolumeClaimSpec{VolumeName: pv.Name},
	}}
}

func driverPodOn(node, name, owner string) *corev1.Pod {
	p := pod(name, node)
	p.Namespace, p.Labels = "overlay-csi", map[string]string{"app.kubernetes.io/name": "overlay-csi"}
	p.OwnerReferences = []metav1.OwnerReference{{Kind: owner, Name: "overlay-csi"}}
	return p
}

func testFinder() *finder {
	objects := []runtime.Object{
		pod("one", "node-1", ofClaim("data", "claim"), inlineVolume("scratch", driverName), inlineVolume("other", "other.example"),
			corev1.Volume{Name: "empty"}, ofClaim("foreign", "foreign"), ofClaim("unbound", "unbound")),
		pod("pending", "", ofClaim("data", "claim")),
		pod("private", "node-2", ofClaim("data", "per-pod")), pod("copy-1", "node-1", ofClaim("data", "copies")),
		pod("copy-2", "node-2", ofClaim("data", "copies")),
		pod("generic", "node-2", corev1.Volume{Name: "data", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}}),
		&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "unbound"}},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "long-node", Labels: map[string]string{driverName + "/node": "digest"}}},
		driverPodOn("node-1", "controller", "ReplicaSet"), driverPodOn("node-1", "driver-1", "DaemonSet"),
	}
	for _, claims := range [][]runtime.Object{
		bound("claim", driverName, "node-1"), bound("foreign", "other.example", ""), bound("per-pod", driverName, ""),
		bound("copies", driverName, ""), bound("long", driverName, "digest"), bound("gone", driverName, "node-9"), bound("idle", driverName, ""),
		bound("generic-data", driverName, ""),
	} {
		objects = append(objects, claims...)
	}
	options := driverOptions{name: driverName, namespace: "overlay-csi", selector: "app.kubernetes.io/name=overlay-csi"}
	return &finder{fake.NewClientset(objects...), "team", options}
}

// TestFind finds volumes by what names them, or says why not.
func TestFind(t *testing.T) {
	for args, c := range map[string]struct {
		want  volume
		wrong string
	}{
		"one data":     {want: volume{"handle-of-claim", "node-1", "uid-of-pod"}},
		"pod/one data": {want: volume{"handle-of-claim", "node-1", "uid-of-pod"}},
		"one scratch":  {want: volume{"csi-0276e55b2d9b26bf2b8d1c7e9c2bcd2ee0a5b1d0", "node-1", "uid-of-pod"}},
		"generic data": {want: volume{"handle-of-generic-data", "node-2", "uid-of-pod"}},
		"pvc/claim":    {want: volume{"handle-of-claim", "node-1", ""}},
		"pvc/per-pod":  {want: volume{"handle-of-per-pod", "node-2", "uid-of-pod"}},
		"pvc/long":     {want: volume{"handle-of-long", "long-node", ""}},
		"pvc/copies":   {wrong: "several pods"},
		"pvc/gone":     {wrong: "no node has that"},
		"pvc/idle":     {wrong: "no running pod"},
		"pvc/foreign":  {wrong: "not one of driver"},
		"pvc/unbound":  {wrong: "not bound"},
		"pvc/nobody":   {wrong: "not found"},
		"nobody data":  {wrong: "not found"},
		"one nothing":  {wrong: "it has data, scratch, other, empty, foreign, unbound"},
		"one other":    {wrong: "not one of driver"},
		"one empty":    {wrong: "not one of driver"},
		"one foreign":  {wrong: "not one of driver"},
		"pending data": {wrong: "on no node"},
		"claim":        {wrong: "pvc/NAME"},
	} {
		t.Run(args, func(t *testing.T) {
			got, err := testFinder().find(t.Context(), strings.Split(args, " "))
			if c.wrong != "" {
				if err == nil || !strings.Contains(err.Error(), c.wrong) {
					t.Errorf("%v", err)
				}
				return
			}
			if strings.HasPrefix(c.want.handle, "csi-") {
				// What kubelet computes.
				c.want.handle = inlineHandle(pod("one", ""), "scratch")
			}
			if err != nil || got != c.want {
				t.Errorf("got %+v, %v, want %+v", got, err, c.want)
			}
		})
	}
}

// TestInlineHandle has the handle that kubelet 1.35 gave a volume.
func TestInlineHandle(t *testing.T) {
	got := inlineHandle(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "a"}}, "b")
	// printf ab | sha256sum
	if want := "csi-fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestDriverPod finds the pod of the DaemonSet, not that of a controller.
func TestDriverPod(t *testing.T) {
	if name, err := testFinder().driverPod(t.Context(), "node-1"); name != "driver-1" || err != nil {
		t.Errorf("%s, %v", name, err)
	}
	if _, err := testFinder().driverPod(t.Context(), "node-2"); err == nil || !strings.Contains(err.Error(), "--driver-namespace") {
		t.Error(err)
	}
}

// TestList lists the volumes of the driver alone.
func TestList(t *testing.T) {
	var out bytes.Buffer
	if err := testFinder().list(t.Context(), []string{"one"}, &out); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(strings.TrimSpace(out.String()), "\n"); len(lines) != 3 || !strings.Contains(lines[1], "handle-of-claim") ||
		!strings.Contains(lines[2], "csi-") {
		t.Errorf("got\n%s", &out)
	}
	out.Reset()
	if err := testFinder().list(t.Context(), nil, &out); err != nil || strings.Count(out.String(), "\n") != 8 {
		t.Errorf("%v, got\n%s", err, &out)
	}
}

// TestTarWithoutItsEnd is no archive, and leaves no file.
func TestTarWithoutItsEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "layer.tar")
	write := func(data []byte) error {
		return writeFile(path, func(to io.Writer) error {
			return runTar(func(out io.Writer) error {
				for chunk := range bytes.SplitSeq(data, nil) {
					if _, err := out.Write(chunk); err != nil {
						return err
					}
				}
				return nil
			}, to)
		})
	}
	for name, data := range map[string][]byte{"nothing": nil, "cut": []byte("x"), "short": make([]byte, 512)} {
		if err := write(data); err == nil {
			t.Errorf("%s is a tar", name)
		}
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if err := write(append([]byte("x"), make([]byte, 1024)...)); err != nil {
		t.Error(err)
	}
	if err := writeFile(path, func(io.Writer) error { return errors.New("no") }); err == nil {
		t.Error("no error")
	}
}
