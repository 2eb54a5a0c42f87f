//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/klient/k8s/resources"
	"sigs.k8s.io/e2e-framework/klient/wait/conditions"
)

// TestLostNode: the volumes of a node that is gone can be deleted, and it deletes their uppers when it comes back.
func TestLostNode(t *testing.T) {
	onlyCentral(t)
	n := newNamespace(t, "baseline")
	node := cluster.workers[1]
	n.claim("lost", class(immediateOn(t, node)))
	n.claim("kept", class(immediateOn(t, node)))
	p := n.run("pod", withVolume(claimVolume("work", "kept")))
	p.want("echo written >> /work/f && sync && cat /work/f", "top\nwritten")
	p.delete()
	lost, kept := n.volumeOf("lost"), n.volumeOf("kept")

	_, err := command("docker", "stop", "-t", "0", node)
	must(t, err)
	back := func() {
		if _, err := command("docker", "start", node); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(back)
	n.deleteClaim("lost")
	// As long as there is a Node, it may come back and answer.
	time.Sleep(graceOfNodes + 5*time.Second)
	if err := cluster.Get(context.Background(), lost.Name, "", &corev1.PersistentVolume{}); err != nil {
		t.Errorf("the PersistentVolume of a node that is there: %v", err)
	}
	begun := time.Now()
	must(t, cluster.Delete(context.Background(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}))
	// The provisioner waits longer after each failure, at most 5 minutes.
	within(t, 3*timeout, "PersistentVolume "+lost.Name+" is gone", func() error {
		err := cluster.Get(context.Background(), lost.Name, "", &corev1.PersistentVolume{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("%w: %v", errNot, err)
	})
	if taken := time.Since(begun); taken < graceOfNodes {
		t.Errorf("the PersistentVolume is gone after %s already", taken)
	}
	eventually(t, "an event says what became of the volume", func() error {
		var events corev1.EventList
		// Events about objects without a namespace are in this one.
		of := resources.WithFieldSelector("type=Warning,involvedObject.kind=PersistentVolume,involvedObject.name=" + lost.Name)
		must(t, cluster.WithNamespace(metav1.NamespaceDefault).List(context.Background(), &events, of))
		for _, event := range events.Items {
			if strings.Contains(event.Message, lost.Spec.CSI.VolumeHandle) && strings.Contains(event.Message, node) {
				t.Logf("%s: %s", event.Reason, event.Message)
				return nil
			}
		}
		return fmt.Errorf("%w: %d events", errNot, len(events.Items))
	})

	back()
	ready := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}
	must(t, waitFor(conditions.New(cluster.Resources).ResourceMatch(ready, nodeIsReady)))
	must(t, cluster.waitDriver())
	eventually(t, "the node has deleted the volume", func() error {
		if left, err := cluster.onNode(node, "ls -d "+keptOf(lost)); err == nil {
			return fmt.Errorf("%w: %s", errNot, left)
		}
		return nil
	})
	eventually(t, "the node is not gone any more", func() error {
		if o := cluster.overlayNode(t, node); o.Spec.NodeGoneSince != "" {
			return fmt.Errorf("%w: since %s", errNot, o.Spec.NodeGoneSince)
		}
		return nil
	})
	waitAnswered(t, node)
	again := n.run("again", withVolume(claimVolume("work", "kept")))
	again.want("cat /work/f", "top\nwritten")
	again.delete()
	n.deleteClaim("kept")
	waitVolumeGone(t, kept.Name)
}

// switchMode installs the chart in a mode as docs/operations.md says: without a controller until the nodes' drivers are replaced.
func switchMode(t *testing.T, to string) {
	t.Helper()
	must(t, helmInstall("--set", "provisioner.mode=central,controller.replicas=0"))
	eventually(t, "there is no controller", func() error {
		const controllers = "--selector=app.kubernetes.io/name=" + controllerName
		output, err := command("kubectl", "--namespace", driverNamespace, "get", "pods", controllers, "--output=name")
		if err == nil && output != "" {
			err = fmt.Errorf("%w: %s", errNot, output)
		}
		return err
	})
	must(t, helmInstall("--set", "provisioner.mode="+to))
	if to == modeCentral {
		_, err := command("kubectl", "--namespace", driverNamespace, "delete", "csistoragecapacities",
			"--selector=csi.storage.k8s.io/drivername="+driverName+",csi.storage.k8s.io/managed-by!=external-provisioner")
		must(t, err)
	}
}

// TestModesAreSwitched: volumes of one mode are used and deleted in the other one.
func TestModesAreSwitched(t *testing.T) {
	n := newNamespace(t, "baseline")
	l := n.startLoad()
	restoreChart(t)
	from, to := mode(), modeNode
	if from == modeNode {
		to = modeCentral
	}
	// used uses a claim, and has its pod away.
	used := func(name, pod, want string) string {
		p := n.run(pod, withVolume(claimVolume("work", name)))
		p.want("echo "+pod+" >> /work/f && cat /work/f", want)
		p.delete()
		return p.Spec.NodeName
	}
	// deleted deletes a claim, and looks whether its node has deleted the volume.
	deleted := func(name, node string, volume *corev1.PersistentVolume) {
		n.deleteClaim(name)
		waitVolumeGone(t, volume.Name)
		if left, err := cluster.onNode(node, "ls -d "+keptOf(volume)); err == nil {
			t.Errorf("%s is left of claim %s", left, name)
		}
	}
	worker := cluster.workers[0]
	n.claim("first")
	n.claim("unused", class(immediateOn(t, worker)))
	node := used("first", "before", "top\nbefore")
	first, unused := n.volumeOf("first"), n.volumeOf("unused")
	old := n.retained("retained", worker)

	switchMode(t, to)
	l.wentOn()
	used("first", "between", "top\nbefore\nbetween")
	deleted("unused", worker, unused)
	deleted("again", worker, n.bindAgain("again", old))
	n.claim("second")
	other := used("second", "made", "top\nmade")
	second := n.volumeOf("second")
	old = n.retained("retained-too", worker)

	switchMode(t, from)
	l.wentOn()
	used("first", "after", "top\nbefore\nbetween\nafter")
	used("second", "again", "top\nmade\nagain")
	deleted("first", node, first)
	deleted("second", other, second)
	deleted("again-too", worker, n.bindAgain("again-too", old))
}

// retained makes a claim with the policy Retain, deletes it and its PersistentVolume, and returns that.
func (n *namespace) retained(name, node string) *corev1.PersistentVolume {
	n.t.Helper()
	retain := storageClass(n.t, func(c *storagev1.StorageClass) {
		policy, mode := corev1.PersistentVolumeReclaimRetain, storagev1.VolumeBindingImmediate
		c.ReclaimPolicy, c.VolumeBindingMode = &policy, &mode
		c.AllowedTopologies = []corev1.TopologySelectorTerm{{MatchLabelExpressions: []corev1.TopologySelectorLabelRequirement{
			{Key: topologyKey, Values: []string{node}},
		}}}
	}, "layers", threeLayers)
	n.claim(name, class(retain))
	volume := n.volumeOf(name)
	n.deleteClaim(name)
	must(n.t, cluster.Delete(context.Background(), volume))
	waitVolumeGone(n.t, volume.Name)
	return volume
}

// bindAgain binds a claim to a volume that was retained, by a PersistentVolume of another name.
func (n *namespace) bindAgain(claim string, old *corev1.PersistentVolume) *corev1.PersistentVolume {
	n.t.Helper()
	static := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: n.name + "-" + claim, Annotations: map[string]string{"pv.kubernetes.io/provisioned-by": driverName}},
		Spec:       *old.Spec.DeepCopy(),
	}
	static.Spec.ClaimRef = &corev1.ObjectReference{Namespace: n.name, Name: claim}
	static.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete
	must(n.t, cluster.Create(context.Background(), static))
	n.claim(claim, class(old.Spec.StorageClassName), volumeName(static.Name))
	return n.volumeOf(claim)
}
