package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// centralMode is the chart with provisioner.mode=central: one controller of the driver, one external-provisioner and one
// external-resizer for the cluster, and the driver alone on the nodes. These three are the real programs, with the arguments of the
// chart's Deployment and the rights of its ServiceAccount. Of each node's driver the part that they reach is real too: its agent.
type centralMode struct{ provisioner, resizer, driver, helm string }

const (
	overlayNodes = "overlay-csi.github.io/v1alpha1/overlaynodes"
	deployment   = "overlay-csi-controller"
)

func (m *centralMode) manifests(ctx context.Context) ([]byte, error) {
	return renderChart(ctx, m.helm, "central")
}

// renderChart returns what the chart makes of its values in a mode.
func renderChart(ctx context.Context, program, mode string) ([]byte, error) {
	tree, err := sourceTree()
	if err != nil {
		return nil, err
	}
	helm := exec.CommandContext(ctx, program, "template", "overlay-csi", "charts/overlay-csi", "--include-crds", "--namespace", namespace,
		"--values", "deploy/values.yaml", "--set", "provisioner.mode="+mode)
	helm.Dir = tree
	var problems bytes.Buffer
	helm.Stderr = &problems
	manifests, err := helm.Output()
	if err != nil {
		return nil, fmt.Errorf("helm template: %w\n%s", err, &problems)
	}
	return manifests, nil
}

// start starts the programs of the chart's Deployment, each as the chart has it, and returns once they run.
func (m *centralMode) start(ctx context.Context, c *cluster) error {
	if err := c.waitServed(ctx, overlayNodes); err != nil {
		return err
	}
	made, err := c.admin.AppsV1().Deployments(namespace).Get(ctx, deployment, metav1.GetOptions{})
	if err != nil {
		return err
	}
	pod, err := c.addPodOf(ctx, made)
	if err != nil {
		return err
	}
	token, err := c.tokenOf(ctx, made.Spec.Template.Spec.ServiceAccountName)
	if err != nil {
		return err
	}
	kubeconfig, socket := filepath.Join(c.dir, "controller.kubeconfig"), filepath.Join(c.dir, "csi.sock")
	if err := c.writeKubeconfig(kubeconfig, token); err != nil {
		return err
	}
	paths := map[string]string{"controller": m.driver, "provisioner": m.provisioner, "resizer": m.resizer}
	env := []string{"NAMESPACE=" + namespace, "POD_NAME=" + pod}
	c.central = map[string]*exec.Cmd{}
	for _, container := range made.Spec.Template.Spec.Containers {
		path, ok := paths[container.Name]
		if !ok {
			return fmt.Errorf("deployment %s has a container %s that this test does not run", deployment, container.Name)
		}
		args := slices.Clone(container.Args)
		for i, arg := range args {
			args[i] = strings.ReplaceAll(arg, "/csi/csi.sock", socket)
			if strings.HasPrefix(arg, "--http-endpoint=") {
				args[i] = "--http-endpoint="
			}
		}
		if c.central[container.Name], err = c.startWith(ctx, env, path, append(args, "--kubeconfig="+kubeconfig)...); err != nil {
			return err
		}
	}
	return nil
}

// addPodOf makes a ReplicaSet and a pod of a Deployment, which no controller makes here. external-provisioner finds by them what its
// CSIStorageCapacity objects belong to.
func (c *cluster) addPodOf(ctx context.Context, of *appsv1.Deployment) (string, error) {
	owner := func(kind, name string, object metav1.Object) []metav1.OwnerReference {
		yes := true
		return []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: kind, Name: name, UID: object.GetUID(), Controller: &yes}}
	}
	set := &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Name: of.Name + "-0", OwnerReferences: owner("Deployment", of.Name, of)},
		Spec:       appsv1.ReplicaSetSpec{Selector: of.Spec.Selector, Template: of.Spec.Template},
	}
	set, err := c.admin.AppsV1().ReplicaSets(namespace).Create(ctx, set, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	pod := newPod(set.Name+"-0", nil)
	pod.OwnerReferences = owner("ReplicaSet", set.Name, set)
	// No kubelet would run it where the scheduler puts it.
	pod.Spec.NodeName = "control-plane"
	_, err = c.admin.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{})
	return pod.Name, err
}

func (m *centralMode) node(c *cluster, i int) player { return newAgentNode(c, nodeName(i)) }

// findSidecars finds the sidecars as the servers are found.
func (m *centralMode) findSidecars(ctx context.Context) error {
	return findAll(ctx, []program{
		{&m.provisioner, "csi-provisioner", "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner", provisionerModule},
		{&m.resizer, "csi-resizer", "github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer", serversModule},
	})
}

// findDriver builds the driver of this source tree where no flag names it.
func (m *centralMode) findDriver(ctx context.Context) error {
	if m.driver != "" {
		return nil
	}
	tree, err := sourceTree()
	if err != nil {
		return err
	}
	m.driver = filepath.Join(tree, "bin", "scale", "overlay-csi")
	build := exec.CommandContext(ctx, "go", "build", "-o", m.driver, "./cmd/overlay-csi")
	build.Dir = tree
	if output, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build overlay-csi: %w\n%s", err, output)
	}
	return nil
}
