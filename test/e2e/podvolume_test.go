//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
)

// otherDriver makes a StorageClass and a volume of another driver on nodes: Kubernetes' own local volumes, which kubelet
// mounts into the pod's directory as it does those of any CSI driver. dir is where its bytes are on them.
func otherDriver(t *testing.T, mode corev1.PersistentVolumeAccessMode, nodes ...string) (className, dir string) {
	t.Helper()
	name := envconf.RandomName("e2e-local", 16)
	dir = "/var/lib/" + name
	for _, node := range nodes {
		_, err := cluster.onNode(node, "mkdir -p "+dir)
		must(t, err)
	}
	late := storagev1.VolumeBindingWaitForFirstConsumer
	sc := &storagev1.StorageClass{
		ObjectMeta:        metav1.ObjectMeta{Name: name},
		Provisioner:       "kubernetes.io/no-provisioner",
		VolumeBindingMode: &late,
	}
	must(t, cluster.Create(context.Background(), sc))
	volume := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeSpec{
			StorageClassName:              name,
			AccessModes:                   []corev1.PersistentVolumeAccessMode{mode},
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")},
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			PersistentVolumeSource:        corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: dir}},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "kubernetes.io/hostname", Operator: corev1.NodeSelectorOpIn, Values: nodes}},
			}}}},
		},
	}
	must(t, cluster.Create(context.Background(), volume))
	t.Cleanup(func() {
		for _, err := range []error{cluster.Delete(context.Background(), sc), cluster.Delete(context.Background(), volume)} {
			if err != nil {
				t.Error(err)
			}
		}
		for _, node := range nodes {
			if _, err := cluster.onNode(node, "rm -rf "+dir); err != nil {
				t.Error(err)
			}
		}
	})
	return name, dir
}

func (n *namespace) configMap(name string, data map[string]string) {
	n.t.Helper()
	n.create(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data})
}

func TestLayersInOtherVolumesOfThePod(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	node := cluster.workers[0]
	className, dir := otherDriver(t, corev1.ReadOnlyMany, node)
	_, err := cluster.onNode(node, "cd "+dir+" && mkdir a b && echo a > a/f && echo b > b/f && echo b > b/b")
	must(t, err)
	n.claim("readonly", class(className), access(corev1.ReadOnlyMany))
	n.claim("view", access(corev1.ReadOnlyMany))
	n.configMap("settings", map[string]string{"settings.yaml": "a: 1"})

	// Layers of every kind in one view: a ConfigMap, an emptyDir that another container of the pod has filled, a claim of
	// another driver, and a read-only view of this driver's own.
	p := n.run(
		"pod",
		onNode(node),
		withVolume(
			inlineVolume("work", "layers", "volume://settings\nvolume://scratch\nvolume://readonly/a\nvolume://readonly/b\nvolume://view"),
		),
		withVolume(configMapVolume("settings", "settings")),
		withVolume(emptyDirVolume("scratch", "")),
		withVolume(claimVolume("readonly", "readonly"), readOnlyMount),
		withVolume(claimVolume("view", "view"), readOnlyMount),
	)
	p.want("cat /work/settings.yaml /work/f /work/b /work/bottom", "a: 1a\nb\nbottom")
	p.want("echo changed > /work/f && echo changed > /work/bottom && cat /work/f /readonly/a/f /view/bottom", "changed\na\nbottom")
	p.delete()
	wantNothingOf(t, node, p.UID)
	if got, err := cluster.onNode(node, "cat "+dir+"/a/f"); err != nil || got != "a" {
		t.Errorf("the layer is %q now, %v", got, err)
	}
}

func TestLayerInAVolumeThatNobodyMounts(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	n.configMap("settings", map[string]string{"a": "1"})
	p := n.start("pod", withVolume(inlineVolume("work", "layers", "volume://settings")), func(p *corev1.Pod) {
		p.Spec.Volumes = append(p.Spec.Volumes, configMapVolume("settings", "settings"))
	})
	p.waitEvent("volumeMounts")
	p.delete()
}

func TestUpperInAnEmptyDirWithASizeLimit(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	p := n.run("pod",
		withVolume(inlineVolume("work", "layers", threeLayers, "upper", "volume://scratch")),
		withVolume(emptyDirVolume("scratch", "8Mi")))
	p.want("cat /work/f && echo more >> /work/f && cat /scratch/overlay-csi/upper/f", "top\ntop\nmore")
	// Kubelet counts the upper with the emptyDir that it lies in, and evicts what writes too much.
	_, err := p.exec("dd if=/dev/zero of=/work/big bs=1M count=64 && sync")
	must(t, err)
	eventually(t, "the pod is evicted", func() error {
		p.refresh()
		if p.Status.Reason != "Evicted" {
			return fmt.Errorf("%w: %s %s", errNot, p.Status.Phase, p.Status.Reason)
		}
		return nil
	})
	p.delete()
	wantNothingOf(t, p.Spec.NodeName, p.UID)
}

func TestUpperInAClaimOfAnotherDriver(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	node := cluster.workers[1]
	className, dir := otherDriver(t, corev1.ReadWriteOnce, node)
	n.claim("data", class(className))
	view := inlineVolume("work", "layers", threeLayers, "upper", "volume://data/views/work")
	options := []podOption{withVolume(view), withVolume(claimVolume("data", "data"))}
	p := n.run("first", options...)
	p.want("echo first >> /work/f && sync && cat /work/f", "top\nfirst")

	// A second pod of the node has the claim, and not its upper.
	second := n.start("second", options...)
	second.waitEvent("two overlays never")
	second.delete()
	p.want("cat /work/f", "top\nfirst")
	p.delete()
	wantNothingOf(t, node, p.UID)
	got, err := cluster.onNode(node, "cat "+dir+"/views/work/upper/f")
	must(t, err)
	if got != "top\nfirst" {
		t.Errorf("the claim holds %q", got)
	}
	again := n.run("again", options...)
	again.want("cat /work/f", "top\nfirst")
	again.delete()
}

// TestVolumeIsNotUnmountedUnderAView holds the driver while kubelet takes a pod down, so that kubelet comes to the claim
// first: its unmount is refused as long as the view is there, and nothing that was written is lost.
func TestVolumeIsNotUnmountedUnderAView(t *testing.T) {
	n := newNamespace(t, "baseline")
	node := cluster.workers[1]
	className, dir := otherDriver(t, corev1.ReadWriteOnce, node)
	n.claim("data", class(className))
	p := n.run("pod",
		withVolume(inlineVolume("work", "layers", threeLayers, "upper", "volume://data/upper")),
		withVolume(claimVolume("data", "data")))
	p.want("echo more >> /work/f && cat /work/f", "top\nmore")

	_, err := cluster.onNode(node, "pkill -STOP -x overlay-csi")
	must(t, err)
	hold := true
	release := func() {
		if hold {
			hold = false
			_, err := cluster.onNode(node, "pkill -CONT -x overlay-csi")
			must(t, err)
		}
	}
	defer release()
	p.deleteInBackground()
	mounted := fmt.Sprintf("grep -c 'pods/%s/volumes/kubernetes.io~local-volume' /proc/self/mountinfo || true", p.UID)
	eventually(t, "kubelet tries to unmount the claim", func() error {
		log, err := cluster.onNode(
			node,
			"journalctl -u kubelet --since -3min --no-pager | grep 'local-volume' | grep -i 'busy' | grep -c "+string(p.UID)+" || true",
		)
		must(t, err)
		if log == "0" {
			return fmt.Errorf("%w: nothing in kubelet's log", errNot)
		}
		return nil
	})
	if count, err := cluster.onNode(node, mounted); err != nil || strings.TrimSpace(count) == "0" {
		t.Errorf("the claim is unmounted under the view: %s, %v", count, err)
	}
	release()
	p.waitGone()
	wantNothingOf(t, node, p.UID)
	if got, err := cluster.onNode(node, "cat "+dir+"/upper/upper/f"); err != nil || got != "top\nmore" {
		t.Errorf("the claim holds %q, %v", got, err)
	}
}
