//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
)

// defaultClass is the StorageClass of the chart's default values: claims name their layers.
const defaultClass = "overlay-csi"

type claimOption func(*corev1.PersistentVolumeClaim)

func class(name string) claimOption {
	return func(c *corev1.PersistentVolumeClaim) { c.Spec.StorageClassName = &name }
}

func layers(references string) claimOption {
	return func(c *corev1.PersistentVolumeClaim) { c.Annotations = map[string]string{layersKey: references} }
}

func access(mode corev1.PersistentVolumeAccessMode) claimOption {
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{mode}
	}
}

func volumeName(name string) claimOption {
	return func(c *corev1.PersistentVolumeClaim) { c.Spec.VolumeName = name }
}

// claim makes a claim of the default class, ReadWriteOnce, of the three layers, where nothing else is said.
func (n *namespace) claim(name string, options ...claimOption) *corev1.PersistentVolumeClaim {
	n.t.Helper()
	c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: claimSpec()}
	layers(threeLayers)(c)
	for _, option := range options {
		option(c)
	}
	n.create(c)
	return c
}

func claimSpec() corev1.PersistentVolumeClaimSpec {
	className := defaultClass
	return corev1.PersistentVolumeClaimSpec{
		StorageClassName: &className,
		AccessModes:      []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		Resources:        corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Mi")}},
	}
}

// storageClass makes a StorageClass of the driver for one test.
func storageClass(t *testing.T, change func(*storagev1.StorageClass), parameters ...string) string {
	t.Helper()
	late, reclaim := storagev1.VolumeBindingWaitForFirstConsumer, corev1.PersistentVolumeReclaimDelete
	c := &storagev1.StorageClass{
		ObjectMeta:        metav1.ObjectMeta{Name: envconf.RandomName("e2e", 12)},
		Provisioner:       driverName,
		Parameters:        pairs(parameters),
		VolumeBindingMode: &late,
		ReclaimPolicy:     &reclaim,
	}
	if change != nil {
		change(c)
	}
	must(t, cluster.Create(context.Background(), c))
	t.Cleanup(func() {
		if err := cluster.Delete(context.Background(), c); err != nil {
			t.Error(err)
		}
	})
	return c.Name
}

// volumeOf is the PersistentVolume that a claim is bound to.
func (n *namespace) volumeOf(claim string) *corev1.PersistentVolume {
	n.t.Helper()
	var c corev1.PersistentVolumeClaim
	var volume corev1.PersistentVolume
	eventually(n.t, "claim "+claim+" is bound", func() error {
		if err := cluster.Get(context.Background(), claim, n.name, &c); err != nil {
			return err
		}
		if c.Status.Phase != corev1.ClaimBound {
			return fmt.Errorf("%w: %s: %s", errNot, c.Status.Phase, strings.Join(eventsOf(n.t, n.name, c.UID), "\n"))
		}
		return cluster.Get(context.Background(), c.Spec.VolumeName, "", &volume)
	})
	return &volume
}

func (n *namespace) deleteClaim(name string) {
	n.t.Helper()
	must(
		n.t,
		cluster.Delete(context.Background(), &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: n.name}}),
	)
}

func waitVolumeGone(t *testing.T, name string) {
	t.Helper()
	eventually(t, "PersistentVolume "+name+" is gone", func() error {
		var volume corev1.PersistentVolume
		err := cluster.Get(context.Background(), name, "", &volume)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("%w: %s %s (%v)", errNot, volume.Status.Phase, volume.Status.Message, err)
	})
}

// keptOf is the directory on a node where a claim's volume is kept.
func keptOf(volume *corev1.PersistentVolume) string {
	return dataRoot + "/volumes/" + volume.Spec.CSI.VolumeHandle
}

func TestPersistentClaim(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	n.claim("workspace")
	first := n.run("first", withVolume(claimVolume("work", "workspace")))
	first.want("cat /work/f && echo first >> /work/f && rm /work/bottom && sync", "top")
	node, volume := first.Spec.NodeName, n.volumeOf("workspace")

	// The annotation is the claim's to change, and the volume stays what it was made of.
	var c corev1.PersistentVolumeClaim
	must(t, cluster.Get(context.Background(), "workspace", n.name, &c))
	c.Annotations[layersKey] = "dir://layers/bottom"
	must(t, cluster.Update(context.Background(), &c))

	first.delete()
	second := n.run("second", withVolume(claimVolume("work", "workspace")))
	if second.Spec.NodeName != node {
		t.Errorf("the second pod is on %s, and its volume on %s", second.Spec.NodeName, node)
	}
	second.want("cat /work/f && ls /work", "top\nfirst\ndir\nf\nmiddle\ntop")
	second.delete()
	n.deleteClaim("workspace")
	waitVolumeGone(t, volume.Name)
	if left, err := cluster.onNode(node, "ls -d "+keptOf(volume)); err == nil {
		t.Errorf("reclaim policy Delete leaves %s", left)
	}
}

func TestImmediateBinding(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	immediate := storageClass(t, func(c *storagev1.StorageClass) {
		mode := storagev1.VolumeBindingImmediate
		c.VolumeBindingMode = &mode
		// No pod is asked: any node may be chosen, the tainted control plane too.
		c.AllowedTopologies = []corev1.TopologySelectorTerm{{MatchLabelExpressions: []corev1.TopologySelectorLabelRequirement{
			{Key: topologyKey, Values: cluster.workers},
		}}}
	}, "layers", threeLayers)
	n.claim("workspace", class(immediate))
	volume := n.volumeOf("workspace")
	p := n.run("pod", withVolume(claimVolume("work", "workspace")))
	if node := volume.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0]; p.Spec.NodeName != node {
		t.Errorf("the pod is on %s, and its volume on %s", p.Spec.NodeName, node)
	}
	p.want("cat /work/f", "top")
	p.delete()
}

// TestRetainedVolume: what a claim leaves with Retain is bound again, as the same PersistentVolume and as a static one.
func TestRetainedVolume(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	retain := storageClass(t, func(c *storagev1.StorageClass) {
		policy := corev1.PersistentVolumeReclaimRetain
		c.ReclaimPolicy = &policy
	}, "layers", threeLayers)
	n.claim("first", class(retain))
	p := n.run("first", withVolume(claimVolume("work", "first")))
	p.want("echo kept > /work/kept && sync && cat /work/kept", "kept")
	old, node := n.volumeOf("first"), p.Spec.NodeName
	p.delete()
	n.deleteClaim("first")
	eventually(t, "the volume is released", func() error {
		must(t, cluster.Get(context.Background(), old.Name, "", old))
		if old.Status.Phase != corev1.VolumeReleased {
			return fmt.Errorf("%w: %s", errNot, old.Status.Phase)
		}
		return nil
	})
	must(t, cluster.Delete(context.Background(), old))
	waitVolumeGone(t, old.Name)
	// What is in it is read when it is bound again.
	got, err := cluster.onNode(node, "ls "+keptOf(old)+" | grep -x -e upper -e data -e disk.img")
	must(t, err)
	if got == "" {
		t.Errorf("reclaim policy Retain leaves no upper")
	}

	static := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: n.name + "-static", Annotations: map[string]string{"pv.kubernetes.io/provisioned-by": driverName}},
		Spec:       *old.Spec.DeepCopy(),
	}
	static.Spec.ClaimRef = &corev1.ObjectReference{Namespace: n.name, Name: "again"}
	static.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete
	must(t, cluster.Create(context.Background(), static))
	n.claim("again", class(retain), volumeName(static.Name))
	again := n.run("again", withVolume(claimVolume("work", "again")))
	again.want("cat /work/kept /work/f", "kept\ntop")
	again.delete()
	n.deleteClaim("again")
	waitVolumeGone(t, static.Name)
}

func TestReadWriteOncePod(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	n.claim("one-pod", access(corev1.ReadWriteOncePod))
	first := n.run("first", withVolume(claimVolume("work", "one-pod")))
	scheduled := n.start("scheduled", withVolume(claimVolume("work", "one-pod")))
	scheduled.waitEvent("ReadWriteOncePod")
	// What goes past the scheduler is refused too, by kubelet or the driver.
	past := n.start("past", withVolume(claimVolume("work", "one-pod")), func(p *corev1.Pod) { p.Spec.NodeName = first.Spec.NodeName })
	eventually(t, "the pod that went past the scheduler is refused", func() error {
		past.refresh()
		events := strings.Join(past.events(), "\n")
		if past.Status.Phase == corev1.PodFailed || strings.Contains(events, "one pod") || strings.Contains(events, "ReadWriteOncePod") {
			return nil
		}
		return fmt.Errorf("%w: %s: %s", errNot, past.Status.Phase, events)
	})
	first.want("echo first > /work/f && cat /work/f", "first")
	past.delete()
	first.delete()
	scheduled.waitReady()
	scheduled.want("cat /work/f", "first")
	scheduled.delete()
}

func TestPodsOfANodeShareAClaim(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	n.claim("shared")
	one := n.run("one", withVolume(claimVolume("work", "shared")))
	two := n.run("two", withVolume(claimVolume("work", "shared")))
	reader := n.run("reader", withVolume(claimVolume("work", "shared"), readOnlyMount))
	if one.Spec.NodeName != two.Spec.NodeName {
		t.Fatalf("the pods are on %s and %s", one.Spec.NodeName, two.Spec.NodeName)
	}
	one.want("echo one > /work/f && echo one > /work/one && cat /work/f", "one")
	two.want("cat /work/f && echo two > /work/f", "one")
	one.want("cat /work/f", "two")
	reader.want("cat /work/f /work/one", "two\none")
	reader.refused("echo x > /work/f", "Read-only file system")
	one.delete()
	two.want("cat /work/f && echo more > /work/more && cat /work/more", "two\nmore")
	reader.want("cat /work/more", "more")
	reader.delete()
	two.delete()
}

func TestReadOnlyManyClaim(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	n.claim("dataset", access(corev1.ReadOnlyMany))
	var pods []*pod
	for i, node := range cluster.workers[:2] {
		p := n.run(fmt.Sprintf("reader-%d", i), withVolume(claimVolume("data", "dataset")), onNode(node))
		p.want("cat /data/f /data/bottom", "top\nbottom")
		p.refused("echo x > /data/f", "Read-only file system")
		pods = append(pods, p)
	}
	volume := n.volumeOf("dataset")
	if volume.Spec.NodeAffinity != nil {
		t.Errorf("a read-only volume is bound to nodes: %v", volume.Spec.NodeAffinity)
	}
	for _, p := range pods {
		p.delete()
	}
	n.deleteClaim("dataset")
	waitVolumeGone(t, volume.Name)
}

func TestReadWriteManyClaimWithAnUpperForEachPod(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	each := storageClass(t, nil, "layers", threeLayers, "upper", "pod")
	n.claim("each", class(each), access(corev1.ReadWriteMany))
	var pods []*pod
	for i, node := range []string{cluster.workers[0], cluster.workers[1], cluster.workers[1]} {
		p := n.run(fmt.Sprintf("pod-%d", i), withVolume(claimVolume("work", "each")), onNode(node))
		p.want(fmt.Sprintf("cat /work/f && echo %d > /work/f", i), "top")
		pods = append(pods, p)
	}
	for i, p := range pods {
		p.want("cat /work/f", fmt.Sprint(i))
		p.delete()
		wantNothingOf(t, p.Spec.NodeName, p.UID)
	}

	// Without upper: pod nobody takes private writes for shared ones.
	n.claim("unsaid", access(corev1.ReadWriteMany))
	p := n.start("unsaid", withVolume(claimVolume("work", "unsaid")))
	var c corev1.PersistentVolumeClaim
	must(t, cluster.Get(context.Background(), "unsaid", n.name, &c))
	eventually(t, "the claim is told to say upper: pod", func() error {
		if events := strings.Join(eventsOf(t, n.name, c.UID), "\n"); !strings.Contains(events, "upper: pod") {
			return fmt.Errorf("%w: %s", errNot, events)
		}
		return nil
	})
	p.delete()
}

func TestGenericEphemeralVolume(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	template := &corev1.PersistentVolumeClaimTemplate{
		ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{layersKey: threeLayers}},
		Spec:       claimSpec(),
	}
	p := n.run(
		"pod",
		withVolume(
			corev1.Volume{Name: "work", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{VolumeClaimTemplate: template}}},
		),
	)
	p.want("cat /work/f && echo more >> /work/f && cat /work/f", "top\ntop\nmore")
	volume := n.volumeOf("pod-work")
	p.delete()
	waitVolumeGone(t, volume.Name)
	if left, err := cluster.onNode(p.Spec.NodeName, "ls -d "+keptOf(volume)); err == nil {
		t.Errorf("a generic ephemeral volume leaves %s", left)
	}
}

func TestClaimThatNamesItsLayersWrongly(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	for name, c := range map[string]struct{ layers, word string }{
		"none":    {"", "annotation " + layersKey},
		"escape":  {"dir://layers/../etc", "annotation " + layersKey},
		"missing": {"dir://layers/no/such", "no/such"},
	} {
		claim := n.claim(name, layers(c.layers))
		p := n.start(name, withVolume(claimVolume("work", name)))
		eventually(t, "claim "+name+" says "+c.word, func() error {
			if events := strings.Join(eventsOf(t, n.name, claim.UID), "\n"); !strings.Contains(events, c.word) {
				return fmt.Errorf("%w: %s", errNot, events)
			}
			return nil
		})
		p.delete()
	}
}

// TestCapacity: each node has a CSIStorageCapacity object for each class, and it says what df says there, less what is
// promised to volumes that may not have written it yet.
func TestCapacity(t *testing.T) {
	t.Parallel()
	name := storageClass(t, nil, "layers", threeLayers)
	for _, node := range cluster.nodes {
		eventually(t, "capacity of "+node, func() error {
			var capacities storagev1.CSIStorageCapacityList
			must(t, cluster.WithNamespace(driverNamespace).List(context.Background(), &capacities))
			output, err := cluster.onNode(node, "df --output=avail -B1 "+dataRoot+" | tail -1")
			must(t, err)
			free := resource.MustParse(strings.TrimSpace(output))
			promised := promisedTo(t, node)
			for _, c := range capacities.Items {
				if c.StorageClassName != name || c.NodeTopology.MatchLabels[topologyKey] != node {
					continue
				}
				said, most := c.Capacity.AsApproximateFloat64(), free.AsApproximateFloat64()
				if said < 0.95*most-promised || said > 1.05*most {
					return fmt.Errorf("%w: %s is said and %s is free, of which %g bytes are promised", errNot, c.Capacity, &free, promised)
				}
				return nil
			}
			return fmt.Errorf("%w: there is none among %d", errNot, len(capacities.Items))
		})
	}
}

// promisedTo is the size of all volumes of the driver that live on a node.
func promisedTo(t *testing.T, node string) (bytes float64) {
	t.Helper()
	var volumes corev1.PersistentVolumeList
	must(t, cluster.List(context.Background(), &volumes))
	for _, v := range volumes.Items {
		if v.Spec.CSI == nil || v.Spec.CSI.Driver != driverName || v.Spec.NodeAffinity == nil ||
			!strings.Contains(fmt.Sprint(v.Spec.NodeAffinity.Required), node) {
			continue
		}
		size := v.Spec.Capacity[corev1.ResourceStorage]
		bytes += size.AsApproximateFloat64()
	}
	return bytes
}

func TestClaimLargerThanANode(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	n.claim("huge", func(c *corev1.PersistentVolumeClaim) {
		c.Spec.Resources.Requests[corev1.ResourceStorage] = resource.MustParse("1Pi")
	})
	p := n.start("pod", withVolume(claimVolume("work", "huge")))
	p.waitEvent("did not have enough free storage")
	p.delete()
}
