//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// provisionerSecret is the one Secret that the chart lets the provisioner read.
	provisionerSecret = "e2e-registry"
	// graceOfNodes is how long a Node is gone until its volumes can be deleted.
	graceOfNodes = 10 * time.Second
)

// Processes on the nodes, as pgrep --full has them. A shell that looks for one is none.
const (
	driverProcess     = "^/usr/local/bin/overlay-csi --driver-name"
	controllerProcess = "^/usr/local/bin/overlay-csi controller"
)

// signal sends a signal to the processes on a node. That there are none is no error.
func (c *kindCluster) signal(node, signal, process string) error {
	_, err := c.onNode(node, fmt.Sprintf("pkill -%s --full '%s' || test $? = 1", signal, process))
	return err
}

// signalControllers sends a signal to all controllers.
func (c *kindCluster) signalControllers(signal string) error {
	var errs []error
	for _, node := range c.nodes {
		errs = append(errs, c.signal(node, signal, controllerProcess))
	}
	return errors.Join(errs...)
}

// killControllers kills all controllers, and has their pods replaced: that is sooner than a container that was killed often starts again.
func (c *kindCluster) killControllers() error {
	err := c.signalControllers("KILL")
	return errors.Join(err, replacePods("--selector=app.kubernetes.io/name="+controllerName))
}

// killDriver kills the driver of a node, and has its pod replaced.
func (c *kindCluster) killDriver(node string) error {
	err := c.signal(node, "KILL", driverProcess)
	return errors.Join(err, replacePods("--selector=app.kubernetes.io/name="+release, "--field-selector=spec.nodeName="+node))
}

func replacePods(which ...string) error {
	args := []string{"--namespace", driverNamespace, "delete", "pods", "--grace-period=0", "--force", "--wait=false"}
	_, err := command("kubectl", append(args, which...)...)
	return err
}

// immediateOn makes a StorageClass of volumes that are made at once, on one node.
func immediateOn(t *testing.T, node string) string {
	t.Helper()
	return storageClass(t, func(c *storagev1.StorageClass) {
		mode, yes := storagev1.VolumeBindingImmediate, true
		c.VolumeBindingMode, c.AllowVolumeExpansion = &mode, &yes
		c.AllowedTopologies = []corev1.TopologySelectorTerm{{MatchLabelExpressions: []corev1.TopologySelectorLabelRequirement{
			{Key: topologyKey, Values: []string{node}},
		}}}
	}, "layers", threeLayers)
}

// waitRequests waits until the node was asked for so much that it has not answered, by requests of a method.
func waitRequests(t *testing.T, node, method string, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d requests %s wait for node %s", want, method, node), func() error {
		o := cluster.overlayNode(t, node)
		found := 0
		for _, handle := range o.unanswered() {
			if strings.HasSuffix(o.Spec.Requests[handle].Method, method) {
				found++
			}
		}
		if found != want {
			return fmt.Errorf("%w: %d of %d requests", errNot, found, len(o.Spec.Requests))
		}
		return nil
	})
}

// waitAnswered waits until the node has answered everything.
func waitAnswered(t *testing.T, node string) {
	t.Helper()
	eventually(t, "node "+node+" has answered", func() error {
		o := cluster.overlayNode(t, node)
		if handles := o.unanswered(); len(handles) > 0 {
			return fmt.Errorf("%w: %s", errNot, strings.Join(handles, ", "))
		}
		return nil
	})
}

// keptOn are the directories of volumes on a node.
func keptOn(t *testing.T, node string) []string {
	t.Helper()
	return keptIn(t, node, "volumes")
}

// keptIn is what a directory of a node's data root has.
func keptIn(t *testing.T, node, dir string) []string {
	t.Helper()
	output, err := cluster.onNode(node, "ls "+dataRoot+"/"+dir+" 2>/dev/null || true")
	must(t, err)
	return strings.Fields(output)
}

// TestKilledBetweenTheSteps kills the controller and the node's driver in each state that a request can be in: written and not answered,
// and answered without anybody who took the answer. CI has the last one, which other tests that kill at random hardly meet; make proof
// has all.
func TestKilledBetweenTheSteps(t *testing.T) {
	onlyCentral(t)
	node := cluster.workers[0]
	goOn := func() error { return cluster.signal(node, "CONT", driverProcess) }
	rows := []struct {
		name string
		kill func() error
	}{
		{"controller after the answer", func() error {
			if err := errors.Join(cluster.signalControllers("STOP"), goOn()); err != nil {
				return err
			}
			waitAnswered(t, node)
			return cluster.killControllers()
		}},
		{"controller before the answer", func() error { return errors.Join(cluster.killControllers(), goOn()) }},
		{"driver before the answer", func() error { return cluster.killDriver(node) }},
		{"both before the answer", func() error { return errors.Join(cluster.killControllers(), cluster.killDriver(node)) }},
	}
	for _, row := range rows[:proof(1, len(rows))] {
		t.Run(row.name, func(t *testing.T) {
			t.Cleanup(func() {
				must(t, errors.Join(cluster.signalControllers("CONT"), goOn(), cluster.waitDriver(), cluster.waitController()))
			})
			before := keptOn(t, node)
			n := newNamespace(t, "baseline")
			// kills has the node asked for something that it cannot answer, and kills then.
			kills := func(method string, ask func()) {
				must(t, errors.Join(cluster.waitDriver(), cluster.waitController(), cluster.signal(node, "STOP", driverProcess)))
				ask()
				waitRequests(t, node, method, 1)
				must(t, row.kill())
			}
			onOne := immediateOn(t, node)
			kills("CreateVolume", func() { n.claim("workspace", class(onOne)) })
			volume := n.volumeOf("workspace")
			p := n.run("pod", withVolume(claimVolume("work", "workspace")))
			if p.Spec.NodeName != node {
				t.Errorf("the pod is on %s, not on %s", p.Spec.NodeName, node)
			}
			p.want("cat /work/f", "top")
			p.delete()
			kills("DeleteVolume", func() { n.deleteClaim("workspace") })
			waitVolumeGone(t, volume.Name)
			waitAnswered(t, node)
			if after := keptOn(t, node); !slices.Equal(before, after) {
				t.Errorf("the node had %v, and has %v", before, after)
			}
		})
	}
}

// TestManyClaimsUnderKills makes, grows and deletes claims while controllers and drivers are killed all the time. CI has few claims.
func TestManyClaimsUnderKills(t *testing.T) {
	onlyCentral(t)
	claims, pods, every := proof(8, 24), proof(2, 4), 5*time.Second
	n := newNamespace(t, "baseline")
	classes := []string{immediateOn(t, cluster.workers[0]), immediateOn(t, cluster.workers[1])}
	late := storageClass(t, func(c *storagev1.StorageClass) { yes := true; c.AllowVolumeExpansion = &yes }, "layers", threeLayers)
	before := [][]string{keptOn(t, cluster.workers[0]), keptOn(t, cluster.workers[1])}

	kills := make(chan int)
	done := make(chan struct{})
	go func() {
		random := rand.New(rand.NewPCG(1, 2))
		for count := 0; ; count++ {
			select {
			case <-done:
				kills <- count
				return
			case <-time.After(every/2 + time.Duration(random.Int64N(int64(every)))):
			}
			if err := killOne(random); err != nil {
				t.Error(err)
			}
		}
	}()
	stop := sync.OnceFunc(func() { close(done); t.Logf("%d kills", <-kills) })
	t.Cleanup(func() {
		stop()
		must(t, errors.Join(cluster.waitDriver(), cluster.waitController()))
	})
	var names []string
	for i := range claims {
		name := fmt.Sprintf("claim-%d", i)
		names = append(names, name)
		n.claim(name, class(classes[i%2]))
		time.Sleep(time.Second)
	}
	var started []*pod
	for i := range pods {
		name := fmt.Sprintf("late-%d", i)
		names = append(names, name)
		n.claim(name, class(late))
		started = append(started, n.start(name, withVolume(claimVolume("work", name)), onNode(cluster.workers[i%2])))
	}
	var volumes []string
	for _, name := range names {
		volumes = append(volumes, n.volumeOf(name).Name)
	}
	for _, p := range started {
		p.waitReady()
		p.want("echo written >> /work/f && cat /work/f", "top\nwritten")
		n.setRequest(p.Name, "2Mi")
	}
	for _, name := range names[:claims/2] {
		n.deleteClaim(name)
		time.Sleep(time.Second)
	}
	stop()
	for _, p := range started {
		p.want("cat /work/f", "top\nwritten")
		p.delete()
	}
	for _, name := range names[claims/2:] {
		n.deleteClaim(name)
	}
	for _, volume := range volumes {
		waitVolumeGone(t, volume)
	}
	for i, node := range cluster.workers[:2] {
		waitAnswered(t, node)
		if after := keptOn(t, node); !slices.Equal(before[i], after) {
			t.Errorf("node %s had %v, and has %v", node, before[i], after)
		}
	}
}

// killOne kills all controllers, or those of a worker, or a worker's driver.
func killOne(random *rand.Rand) error {
	node := cluster.workers[random.IntN(2)]
	switch random.IntN(4) {
	case 0:
		return cluster.killControllers()
	case 1:
		return cluster.signal(node, "KILL", controllerProcess)
	default:
		return cluster.killDriver(node)
	}
}

// TestTwoControllersAtOnce has both replicas provision the same claims.
func TestTwoControllersAtOnce(t *testing.T) {
	onlyCentral(t)
	restoreChart(t)
	must(t, helmInstall("--set", "provisioner.extraArgs[1]=--leader-election=false,resizer.extraArgs[0]=--leader-election=false"))
	n := newNamespace(t, "baseline")
	immediate := storageClass(t, func(c *storagev1.StorageClass) {
		mode := storagev1.VolumeBindingImmediate
		c.VolumeBindingMode = &mode
	}, "layers", threeLayers)
	before := map[string][]string{}
	for _, node := range cluster.nodes {
		before[node] = keptOn(t, node)
	}
	each := proof(4, 10)
	var volumes []*corev1.PersistentVolume
	for i := range each {
		n.claim(fmt.Sprintf("immediate-%d", i), class(immediate))
		n.claim(fmt.Sprintf("late-%d", i))
		n.start(fmt.Sprintf("late-%d", i), withVolume(claimVolume("work", fmt.Sprintf("late-%d", i))))
	}
	for i := range each {
		for _, name := range []string{"immediate", "late"} {
			volumes = append(volumes, n.volumeOf(fmt.Sprintf("%s-%d", name, i)))
		}
	}
	for i := range each {
		p := &pod{&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("late-%d", i), Namespace: n.name}}, t}
		p.waitReady()
		p.want("cat /work/f", "top")
		p.deleteInBackground()
	}
	// What is made twice is in no PersistentVolume.
	made := 0
	for _, node := range cluster.nodes {
		made += len(keptOn(t, node)) - len(before[node])
	}
	if made != len(volumes) {
		t.Errorf("there are %d PersistentVolumes, and %d volumes on the nodes", len(volumes), made)
	}
	for i := range each {
		n.deleteClaim(fmt.Sprintf("immediate-%d", i))
		n.deleteClaim(fmt.Sprintf("late-%d", i))
	}
	for _, volume := range volumes {
		waitVolumeGone(t, volume.Name)
	}
	for _, node := range cluster.nodes {
		waitAnswered(t, node)
		if after := keptOn(t, node); !slices.Equal(before[node], after) {
			t.Errorf("node %s had %v, and has %v", node, before[node], after)
		}
	}
}

// TestNodeThatDoesNotAnswer: claims of other nodes do not wait for it, however much it was asked for.
func TestNodeThatDoesNotAnswer(t *testing.T) {
	onlyCentral(t)
	n := newNamespace(t, "baseline")
	frozen, other := cluster.workers[0], cluster.workers[1]
	onFrozen, onOther := immediateOn(t, frozen), immediateOn(t, other)
	many := proof(12, 40)
	for i := range many {
		n.claim(fmt.Sprintf("doomed-%d", i), class(onFrozen))
	}
	var volumes []string
	for i := range many {
		volumes = append(volumes, n.volumeOf(fmt.Sprintf("doomed-%d", i)).Name)
	}
	n.claim("kept", class(onOther))
	volumes = append(volumes, n.volumeOf("kept").Name)

	must(t, cluster.signal(frozen, "STOP", driverProcess))
	t.Cleanup(func() { must(t, errors.Join(cluster.signal(frozen, "CONT", driverProcess), cluster.waitDriver())) })
	for i := range many {
		n.deleteClaim(fmt.Sprintf("doomed-%d", i))
	}
	waitRequests(t, frozen, "DeleteVolume", many)
	begun := time.Now()
	n.claim("made", class(onOther))
	made := n.volumeOf("made").Name
	n.deleteClaim("kept")
	waitVolumeGone(t, volumes[many])
	n.deleteClaim("made")
	waitVolumeGone(t, made)
	if taken := time.Since(begun); taken > 30*time.Second {
		t.Errorf("another node's claims took %s", taken)
	}
	must(t, cluster.signal(frozen, "CONT", driverProcess))
	for _, volume := range volumes {
		waitVolumeGone(t, volume)
	}
	waitAnswered(t, frozen)
}
