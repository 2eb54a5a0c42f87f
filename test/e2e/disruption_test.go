//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/klient/k8s"
	"sigs.k8s.io/e2e-framework/klient/k8s/resources"
	"sigs.k8s.io/e2e-framework/klient/wait/conditions"
)

// writerScript writes, reads back and copies up, some ten times a second, and counts what went wrong.
const writerScript = `trap exit TERM
i=0
echo 0 > /tmp/errors
while :; do
  i=$((i+1))
  { echo $i > /work/count.new && mv /work/count.new /work/count && cat /work/count /work/bottom > /dev/null &&
    echo $i >> /work/f && mkdir -p /work/d && mv /work/d /work/e && rmdir /work/e; } 2>> /tmp/log || echo $i >> /tmp/errors
  sleep 0.1 & wait
done`

// load is pods that write all the time.
type load struct {
	t    *testing.T
	pods []*pod
}

// startLoad has a pod with an inline volume and one with a claim write on each of two workers.
func (n *namespace) startLoad() *load {
	n.t.Helper()
	l := &load{t: n.t}
	for i, node := range cluster.workers[:2] {
		name := fmt.Sprintf("writer-%d", i)
		n.claim(name)
		l.pods = append(l.pods,
			n.start(name+"-inline", withVolume(inlineVolume("work", "layers", threeLayers)), withCommand(writerScript), onNode(node)),
			n.start(name+"-claim", withVolume(claimVolume("work", name)), withCommand(writerScript), onNode(node)))
	}
	for _, p := range l.pods {
		p.waitReady()
	}
	return l
}

// wentOn checks that every pod still writes, that nothing went wrong, and that no container was started again.
func (l *load) wentOn() {
	l.t.Helper()
	for _, p := range l.pods {
		before := -1
		eventually(l.t, p.Name+" writes", func() error {
			output, err := p.exec("cat /work/count")
			if err != nil {
				return err
			}
			now, err := strconv.Atoi(output)
			if err != nil {
				return err
			}
			if before < 0 {
				before = now
			}
			if now == before {
				return fmt.Errorf("%w: %d", errNot, now)
			}
			return nil
		})
		p.want("cat /tmp/errors", "0")
		if output, err := p.exec("cat /tmp/log"); err != nil || output != "" {
			l.t.Errorf("pod %s: %s %v", p.Name, output, err)
		}
		p.refresh()
		if restarts := p.Status.ContainerStatuses[0].RestartCount; restarts != 0 {
			l.t.Errorf("pod %s was restarted %d times", p.Name, restarts)
		}
	}
}

// comesAndGoes runs a pod on each worker and deletes it: publish and unpublish work.
func (n *namespace) comesAndGoes(name string) {
	n.t.Helper()
	var pods []*pod
	for i, node := range cluster.workers[:2] {
		pods = append(pods, n.start(fmt.Sprintf("%s-%d", name, i), withVolume(inlineVolume("work", "layers", threeLayers)), onNode(node)))
	}
	for _, p := range pods {
		p.waitReady()
		p.want("cat /work/f", "top")
		p.deleteInBackground()
	}
	for _, p := range pods {
		p.waitGone()
		wantNothingOf(n.t, p.Spec.NodeName, p.UID)
	}
}

func TestDriverPodIsDeletedUnderLoad(t *testing.T) {
	n := newNamespace(t, "baseline")
	l := n.startLoad()
	deletedMeanwhile := n.run("deleted", withVolume(inlineVolume("work", "layers", threeLayers)), onNode(cluster.workers[0]))
	for _, node := range cluster.workers[:2] {
		must(t, cluster.Delete(context.Background(), cluster.driverPod(t, node)))
	}
	// While the driver is away pods are made and deleted: kubelet asks again.
	deletedMeanwhile.deleteInBackground()
	made := n.start("made", withVolume(inlineVolume("work", "layers", threeLayers)), onNode(cluster.workers[1]))
	deletedMeanwhile.waitGone()
	made.waitReady()
	must(t, cluster.waitDriver())
	l.wentOn()
	made.delete()
	wantNothingOf(t, cluster.workers[0], deletedMeanwhile.UID)
	n.comesAndGoes("after")
}

func TestDriverIsKilledUnderLoad(t *testing.T) {
	n := newNamespace(t, "baseline")
	l := n.startLoad()
	for _, node := range cluster.workers[:2] {
		_, err := cluster.onNode(node, "pkill -KILL -x overlay-csi")
		must(t, err)
	}
	n.comesAndGoes("after")
	must(t, cluster.waitDriver())
	l.wentOn()
}

// restoreChart leaves the chart as the other tests have it, whatever becomes of this one.
func restoreChart(t *testing.T) {
	t.Cleanup(func() {
		if err := helmInstall(); err != nil {
			t.Errorf("restore the chart: %v", err)
		}
	})
}

// TestUpgradeUnderLoad adds a layer root to the driver, which a claim offers, and takes it away again.
func TestUpgradeUnderLoad(t *testing.T) {
	n := newNamespace(t, "baseline")
	l := n.startLoad()
	claimedRoot(t, "offered")
	restoreChart(t)
	before := cluster.driverPod(t, cluster.workers[0]).UID
	must(t, helmInstall("--set", "log.level=4,layerRoots[1].name=claimed,layerRoots[1].persistentVolumeClaim=offered"))
	if cluster.driverPod(t, cluster.workers[0]).UID == before {
		t.Error("the upgrade has not replaced the driver")
	}
	l.wentOn()
	n.comesAndGoes("upgraded")
	user := n.run("user", withVolume(inlineVolume("work", "layers", "dir://claimed/layer\ndir://layers/bottom")))
	user.want("cat /work/f /work/bottom && echo changed > /work/f && cat /work/f", "offered\nbottom\nchanged")
	must(t, helmInstall())
	user.want("cat /work/f /work/bottom", "changed\nbottom")
	l.wentOn()
	n.comesAndGoes("back")
}

// TestMountProgramOfTheImage has the driver mount as it does on a kernel before Linux 6.7: with the mount(8) of its image.
func TestMountProgramOfTheImage(t *testing.T) {
	n := newNamespace(t, "baseline")
	restoreChart(t)
	must(t, helmInstall("--set", `driver.extraArgs[0]=--disable-kernel-features=mount-api\,layer-fd\,detached-layer\,statmount`))
	n.comesAndGoes("inline")
	n.claim("kept")
	for i, want := range []string{"top", "top\nmore"} {
		p := n.run(fmt.Sprintf("claimed-%d", i), withVolume(claimVolume("work", "kept")))
		p.want("cat /work/f && echo more >> /work/f", want)
		p.delete()
	}
}

// claimedRoot makes a claim in the driver's namespace that every node can mount, with a directory "layer".
func claimedRoot(t *testing.T, name string) {
	t.Helper()
	className, dir := otherDriver(t, corev1.ReadOnlyMany, cluster.nodes...)
	for _, node := range cluster.nodes {
		_, err := cluster.onNode(node, "mkdir "+dir+"/layer && echo offered > "+dir+"/layer/f")
		must(t, err)
	}
	c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: driverNamespace}, Spec: claimSpec()}
	class(className)(c)
	access(corev1.ReadOnlyMany)(c)
	must(t, cluster.Create(context.Background(), c))
	t.Cleanup(func() {
		if err := cluster.Delete(context.Background(), c); err != nil {
			t.Error(err)
		}
	})
}

// TestChartIsUninstalledAndInstalledAgain: pods go on without the driver, and are cleaned up once it is back.
func TestChartIsUninstalledAndInstalledAgain(t *testing.T) {
	n := newNamespace(t, "baseline")
	l := n.startLoad()
	gone := n.run("gone", withVolume(inlineVolume("work", "layers", threeLayers)), onNode(cluster.workers[0]))
	_, err := command("helm", "uninstall", release, "--namespace", driverNamespace, "--wait")
	must(t, err)
	gone.deleteInBackground()
	eventually(t, "kubelet tries to unmount the volume, and finds no driver", func() error {
		const tried = "journalctl -u kubelet --no-pager | grep -F 'UnmountVolume.TearDown failed' | grep -qF %s"
		_, err := cluster.onNode(cluster.workers[0], fmt.Sprintf(tried, gone.UID))
		return err
	})
	l.wentOn()
	must(t, helmInstall())
	gone.waitGone()
	wantNothingOf(t, cluster.workers[0], gone.UID)
	l.wentOn()
	n.comesAndGoes("again")
}

func TestKubeletIsRestarted(t *testing.T) {
	n := newNamespace(t, "baseline")
	l := n.startLoad()
	for _, node := range cluster.workers[:2] {
		_, err := cluster.onNode(node, "systemctl restart kubelet")
		must(t, err)
	}
	n.comesAndGoes("after")
	l.wentOn()
	for _, p := range l.pods {
		p.deleteInBackground()
	}
	for _, p := range l.pods {
		p.waitGone()
		wantNothingOf(t, p.Spec.NodeName, p.UID)
	}
}

// deployment makes a Deployment of one pod, which comes back whatever happens to it.
func (n *namespace) deployment(name string, options ...podOption) *appsv1.Deployment {
	n.t.Helper()
	template := newPod(name, options...)
	replicas := int32(1)
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Strategy: appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType},
			Selector: &metav1.LabelSelector{MatchLabels: template.Labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: template.Labels}, Spec: template.Spec},
		},
	}
	n.create(d)
	return d
}

// podOf waits for the one ready pod of a Deployment.
func (n *namespace) podOf(d *appsv1.Deployment) *pod {
	n.t.Helper()
	var found *pod
	eventually(n.t, "pod of "+d.Name+" is ready", func() error {
		var list corev1.PodList
		must(n.t, cluster.WithNamespace(n.name).List(context.Background(), &list, resources.WithLabelSelector("app="+d.Name)))
		var states []string
		for i := range list.Items {
			p := &list.Items[i]
			if p.DeletionTimestamp == nil && isReady(p) {
				found = &pod{p, n.t}
				return nil
			}
			states = append(states, fmt.Sprintf("%s: %s", p.Name, p.Status.Phase))
		}
		return fmt.Errorf("%w: %s", errNot, strings.Join(states, ", "))
	})
	return found
}

// TestWorkerIsRestarted: a node goes down and comes back, with pods that were running on it.
func TestWorkerIsRestarted(t *testing.T) {
	n := newNamespace(t, "baseline")
	node := cluster.workers[1]
	n.claim("kept")
	kept := n.deployment("kept", withVolume(claimVolume("work", "kept")), onNode(node))
	scratch := n.deployment("scratch", withVolume(inlineVolume("work", "layers", threeLayers)), onNode(node))
	claimed, inline := n.podOf(kept), n.podOf(scratch)
	claimed.want("echo written >> /work/f && sync && cat /work/f", "top\nwritten")
	inline.want("echo written >> /work/f && cat /work/f", "top\nwritten")
	doomed := n.run("doomed", withVolume(inlineVolume("work", "layers", threeLayers)), onNode(node))

	_, err := command("docker", "stop", "-t", "0", node)
	must(t, err)
	zero := int64(0)
	must(t, cluster.Delete(context.Background(), doomed.Pod.DeepCopy(), func(o *metav1.DeleteOptions) { o.GracePeriodSeconds = &zero }))
	_, err = command("docker", "start", node)
	must(t, err)
	ready := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}
	must(t, waitFor(conditions.New(cluster.Resources).ResourceMatch(ready, nodeIsReady)))
	must(t, cluster.waitDriver())

	after := n.podOf(kept)
	eventually(t, "the claim's bytes are there", func() error {
		got, err := after.exec("cat /work/f")
		if err == nil && got != "top\nwritten" {
			t.Fatalf("the claim has %q", got)
		}
		return err
	})
	eventually(t, "the pod with an inline volume works", func() error {
		got, err := n.podOf(scratch).exec("echo again >> /work/f && head -1 /work/f")
		if err == nil && got != "top" {
			t.Fatalf("the inline volume has %q", got)
		}
		return err
	})
	wantNothingOf(t, node, doomed.UID)
	n.comesAndGoes("after")
}

func TestNodeIsDrained(t *testing.T) {
	n := newNamespace(t, "baseline")
	node := cluster.workers[0]
	n.claim("kept")
	kept := n.deployment("kept", withVolume(claimVolume("work", "kept")), preferNode(node))
	scratch := n.deployment("scratch", withVolume(inlineVolume("work", "layers", threeLayers)), preferNode(node))
	first, inline := n.podOf(kept), n.podOf(scratch)
	if first.Spec.NodeName != node {
		t.Fatalf("the pod is on %s", first.Spec.NodeName)
	}
	first.want("echo kept > /work/kept && cat /work/kept", "kept")

	_, err := command("kubectl", "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s")
	must(t, err)
	t.Cleanup(func() {
		if _, err := command("kubectl", "uncordon", node); err != nil {
			t.Error(err)
		}
	})
	wantNothingOf(t, node, inline.UID)
	moved := n.podOf(scratch)
	if moved.Spec.NodeName == node {
		t.Errorf("the pod is still on %s", node)
	}
	moved.want("cat /work/f", "top")
	// A persistent upper stays on its node, and its pod waits for that.
	var list corev1.PodList
	eventually(t, "the pod with a claim waits", func() error {
		must(t, cluster.WithNamespace(n.name).List(context.Background(), &list, resources.WithLabelSelector("app=kept")))
		for i := range list.Items {
			if list.Items[i].UID != first.UID && list.Items[i].Status.Phase == corev1.PodPending {
				return nil
			}
		}
		return errNot
	})
	_, err = command("kubectl", "uncordon", node)
	must(t, err)
	back := n.podOf(kept)
	back.want("cat /work/kept", "kept")
	if back.Spec.NodeName != node {
		t.Errorf("the pod is on %s, and its volume on %s", back.Spec.NodeName, node)
	}
}

func nodeIsReady(object k8s.Object) bool {
	for _, condition := range object.(*corev1.Node).Status.Conditions {
		if condition.Type == corev1.NodeReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}

// preferNode has the scheduler choose the node where it can.
func preferNode(name string) podOption {
	return func(p *corev1.Pod) {
		p.Spec.Affinity = &corev1.Affinity{
			NodeAffinity: &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{{
				Weight: 100,
				Preference: corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{
					{Key: "kubernetes.io/hostname", Operator: corev1.NodeSelectorOpIn, Values: []string{name}},
				}},
			}}},
		}
	}
}
