//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiwait "k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/e2e-framework/klient/k8s"
	"sigs.k8s.io/e2e-framework/klient/k8s/resources"
	"sigs.k8s.io/e2e-framework/klient/wait"
	"sigs.k8s.io/e2e-framework/klient/wait/conditions"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

const (
	driverName      = "overlay-csi.github.io"
	driverNamespace = "overlay-csi"
	release         = "overlay-csi"
	controllerName  = release + "-controller"
	dataRoot        = "/var/lib/overlay-csi"
	topologyKey     = driverName + "/node"
	layersKey       = driverName + "/layers"
)

// layersScript puts the layers of the tests and of deploy/examples on a node, beneath the layer root "layers". On kind
// /var is a volume of its own, on a file system that stacks.
const layersScript = `set -e
mkdir -p /var/lib/layers && cd /var/lib/layers
layer() { mkdir -p "$1"; }
file() { mkdir -p "$(dirname "$1")"; printf '%s\n' "$2" > "$1"; }
file top/f top; file top/top top
file middle/f middle; file middle/middle middle
file bottom/f bottom; file bottom/bottom bottom; file bottom/dir/nested nested
layer shared; chmod 1777 shared; file shared/config shared; chmod 666 shared/config
file datasets/images/labels.csv 'cat,1'
file models/base/config.yaml 'learning_rate: 0.1'; file models/base/weights.bin weights
file models/tuning/config.yaml 'learning_rate: 0.01'
file databases/golden/orders.csv '1,first order'
file caches/npm/left-pad/index.js 'module.exports = 1'
file toolchains/go/bin/go go
find /var/lib/layers -maxdepth 3 -type d ! -name shared -exec chmod 755 {} +
`

// kindCluster is a kind cluster: the Kubernetes API, and its nodes as containers.
type kindCluster struct {
	*resources.Resources
	name    string
	nodes   []string
	workers []string
	// registry runs beside the tests, where the nodes reach it. valuesFile tells the chart of it.
	registry   *registrytest.Registry
	valuesFile string
}

// onNode runs a shell script on a node, as root, and returns what it prints.
func (c *kindCluster) onNode(node, script string) (string, error) {
	return command("docker", "exec", node, "sh", "-c", script)
}

func command(name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return strings.TrimSpace(stdout.String()), nil
}

// chart is the path of the chart from this directory, where go test runs.
const chart = "../../charts/overlay-csi"

// chartValues are what the tests install the chart with.
func chartValues() []string {
	repository, tag := splitImage(os.Getenv(envImage))
	return []string{
		"--set", "image.repository=" + repository + ",image.tag=" + tag,
		"--set", "layerRoots[0].name=layers,layerRoots[0].hostPath=/var/lib/layers",
		"--set", "provisioner.capacityPollInterval=5s,provisioner.immediateBindingDelay=1s",
		"--set", "updateStrategy.rollingUpdate.maxUnavailable=2",
		"--set", "admissionPolicy.enabled=true,provisioner.secrets[0]=" + provisionerSecret,
		"--set", "snapshotter.enabled=true,snapshotter.secrets[0]=" + snapshotterSecret,
		// An RPC for a node that does not answer is repeated sooner than with the chart's value.
		"--set", "provisioner.extraArgs[0]=--timeout=20s",
		"--set", "provisioner.mode=" + mode() + ",controller.nodeGracePeriod=" + graceOfNodes.String(),
		"--values", cluster.valuesFile,
	}
}

func splitImage(image string) (repository, tag string) {
	colon := strings.LastIndex(image, ":")
	if colon < strings.LastIndex(image, "/") || colon < 0 {
		return image, "latest"
	}
	return image[:colon], image[colon+1:]
}

// helmInstall installs the chart or upgrades to it, and waits until the driver is ready on all nodes.
func helmInstall(extra ...string) error {
	args := slices.Concat([]string{"upgrade", "--install", release, chart, "--namespace", driverNamespace}, chartValues(), extra)
	if _, err := command("helm", args...); err != nil {
		return err
	}
	if err := cluster.waitDriver(); err != nil {
		return err
	}
	return cluster.waitController()
}

// waitDriver waits until the newest driver runs on every node, and has registered with kubelet there.
func (c *kindCluster) waitDriver() error {
	daemonSet := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: release, Namespace: driverNamespace}}
	ready := func(object k8s.Object) bool {
		d := object.(*appsv1.DaemonSet)
		return d.Status.ObservedGeneration == d.Generation && int(d.Status.UpdatedNumberScheduled) == len(c.nodes) &&
			int(d.Status.NumberReady) == len(c.nodes) && int(d.Status.NumberAvailable) == len(c.nodes)
	}
	condition := conditions.New(c.Resources).ResourceMatch(daemonSet, ready)
	if err := waitFor(condition); err != nil {
		return fmt.Errorf("wait for the driver on %d nodes: %w (status %+v)", len(c.nodes), err, daemonSet.Status)
	}
	return nil
}

// waitController waits until the newest controllers are ready, if there are any.
func (c *kindCluster) waitController() error {
	deployment := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: controllerName, Namespace: driverNamespace}}
	err := c.Get(context.Background(), deployment.Name, deployment.Namespace, deployment)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	ready := func(object k8s.Object) bool {
		d := object.(*appsv1.Deployment)
		return d.Status.ObservedGeneration == d.Generation && d.Status.UpdatedReplicas == *d.Spec.Replicas &&
			d.Status.Replicas == *d.Spec.Replicas && d.Status.AvailableReplicas == *d.Spec.Replicas
	}
	condition := conditions.New(c.Resources).ResourceMatch(deployment, ready)
	if err := waitFor(condition); err != nil {
		return fmt.Errorf("wait for the controllers: %w (status %+v)", err, deployment.Status)
	}
	return nil
}

// driverPod is the driver's pod on a node.
func (c *kindCluster) driverPod(t *testing.T, node string) *corev1.Pod {
	t.Helper()
	var pods corev1.PodList
	must(
		t,
		c.WithNamespace(driverNamespace).List(context.Background(), &pods, resources.WithLabelSelector("app.kubernetes.io/name=overlay-csi"),
			resources.WithFieldSelector("spec.nodeName="+node)),
	)
	for i := range pods.Items {
		if pods.Items[i].DeletionTimestamp == nil {
			return &pods.Items[i]
		}
	}
	t.Fatalf("there is no driver pod on node %s", node)
	return nil
}

// overlayctl runs the operator's command in the driver's pod on a node, and returns what it printed.
func (c *kindCluster) overlayctl(t *testing.T, node string, args ...string) string {
	t.Helper()
	exec := []string{"--namespace", driverNamespace, "exec", c.driverPod(t, node).Name, "--container", "driver", "--", "overlayctl"}
	output, err := command("kubectl", append(exec, args...)...)
	must(t, err)
	return output
}

// leftoversScript prints what there is of the driver's on a node: views, state, rubbish.
const leftoversScript = `grep ' - overlay overlay ' /proc/self/mountinfo | grep ` + "'kubernetes.io~csi'" + ` | cut -d' ' -f5
cd ` + dataRoot + ` && find volumes snapshots frozen trash -mindepth 1 -maxdepth 1 2>/dev/null || true`

// nothingIsLeft waits for the namespaces of the tests to be gone, and then for the driver's mounts and directories.
func (c *kindCluster) nothingIsLeft() error {
	deadline := time.Now().Add(timeout)
	for {
		left, err := c.leftovers()
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("left behind:\n%s", strings.Join(left, "\n"))
		}
		time.Sleep(time.Second)
	}
}

func (c *kindCluster) leftovers() ([]string, error) {
	var left []string
	var namespaces corev1.NamespaceList
	if err := c.List(context.Background(), &namespaces, resources.WithLabelSelector(testLabel)); err != nil {
		return nil, err
	}
	for _, namespace := range namespaces.Items {
		left = append(left, "namespace "+namespace.Name)
	}
	var volumes corev1.PersistentVolumeList
	if err := c.List(context.Background(), &volumes); err != nil {
		return nil, err
	}
	for _, volume := range volumes.Items {
		if volume.Spec.CSI != nil && volume.Spec.CSI.Driver == driverName {
			left = append(left, "PersistentVolume "+volume.Name)
		}
	}
	var contents snapshotv1.VolumeSnapshotContentList
	if err := c.List(context.Background(), &contents); err != nil {
		return nil, err
	}
	for _, content := range contents.Items {
		left = append(left, "VolumeSnapshotContent "+content.Name)
	}
	unanswered, err := c.unansweredRequests()
	if err != nil {
		return nil, err
	}
	left = append(left, unanswered...)
	for _, node := range c.nodes {
		output, err := c.onNode(node, leftoversScript)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(output) {
			left = append(left, node+": "+strings.TrimSpace(line))
		}
	}
	return left, nil
}

// nothingWasForbidden looks for rights that the driver and its sidecars lack: the API server's answers are in their logs.
func (c *kindCluster) nothingWasForbidden() error {
	containers := [][2]string{{release, "driver"}, {release, "provisioner"}, {release, "resizer"}, {release, "snapshotter"}}
	if mode() == modeCentral {
		containers = [][2]string{
			{release, "driver"}, {controllerName, "controller"}, {controllerName, "provisioner"}, {controllerName, "resizer"},
			{controllerName, "snapshotter"},
		}
	}
	for _, c := range containers {
		log, err := command(
			"kubectl",
			"--namespace",
			driverNamespace,
			"logs",
			"--selector=app.kubernetes.io/name="+c[0],
			"--container",
			c[1],
			"--tail=-1",
		)
		if err != nil {
			return err
		}
		for line := range strings.Lines(log) {
			if strings.Contains(line, "forbidden") {
				return fmt.Errorf("a right is missing: %s: %s", c[1], line)
			}
		}
	}
	return nil
}

func ignoreExists(err error) error {
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// waitFor waits for a condition. e2e-framework looks every 5 seconds where nothing else is said.
func waitFor(condition apiwait.ConditionWithContextFunc) error {
	return wait.For(condition, wait.WithTimeout(timeout), wait.WithInterval(250*time.Millisecond), wait.WithImmediate())
}

// eventually waits until check finds nothing wrong.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	within(t, timeout, what, check)
}

func within(t *testing.T, timeout time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: after %s still: %v", what, timeout, err)
		}
		time.Sleep(250 * time.Millisecond)
	}
}

var errNot = errors.New("not so")
