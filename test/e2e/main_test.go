//go:build e2e

// Package e2e tests the driver on a kind cluster with real pods: make e2e.
//
// It uses Go's own testing, as all tests of the project do, and of sigs.k8s.io/e2e-framework the client, the decoder
// and the conditions to wait for. Ginkgo would bring a second way to write, run and report tests.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/klient/conf"
	"sigs.k8s.io/e2e-framework/klient/k8s/resources"
)

// What test/e2e/run sets.
const (
	envCluster  = "E2E_CLUSTER"
	envImage    = "E2E_IMAGE"
	envWorkload = "E2E_WORKLOAD_IMAGE"
	envMode     = "OVERLAY_CSI_MODE"
)

// Values of provisioner.mode in the chart.
const (
	modeNode    = "node"
	modeCentral = "central"
)

// mode is the one that the tests have the chart in, unless a test is about the other one: the chart's default, if none is set.
func mode() string {
	if value := os.Getenv(envMode); value != "" {
		return value
	}
	return modeCentral
}

// proof is a number for CI, or with OVERLAY_CSI_PROOF=1, as make proof sets it, a larger one.
func proof(short, long int) int {
	if os.Getenv("OVERLAY_CSI_PROOF") == "1" {
		return long
	}
	return short
}

// onlyCentral skips a test of what the mode with a controller has.
func onlyCentral(t *testing.T) {
	t.Helper()
	if mode() != modeCentral {
		t.Skip("for provisioner.mode: central")
	}
}

// cluster is the kind cluster that the tests have. It is the one thing that all of them share, as they share the driver.
var cluster *kindCluster

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if cluster, err = connect(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	stop, err := startRegistry()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e: start a registry:", err)
		return 1
	}
	defer stop()
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: prepare the cluster:", err)
		return 1
	}
	code := m.Run()
	if code == 0 {
		if err := errors.Join(cluster.nothingIsLeft(), cluster.nothingWasForbidden()); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: after all tests:", err)
			code = 1
		}
	}
	return code
}

func connect() (*kindCluster, error) {
	name := os.Getenv(envCluster)
	if name == "" {
		return nil, errors.New(envCluster + " names no kind cluster: run the tests with make e2e")
	}
	config, err := conf.New(os.Getenv("KUBECONFIG"))
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 100, 200
	client, err := resources.New(config)
	if err != nil {
		return nil, err
	}
	c := &kindCluster{Resources: client, name: name}
	var nodes corev1.NodeList
	if err := c.List(context.Background(), &nodes); err != nil {
		return nil, err
	}
	for _, node := range nodes.Items {
		c.nodes = append(c.nodes, node.Name)
		if _, ok := node.Labels["node-role.kubernetes.io/control-plane"]; !ok {
			c.workers = append(c.workers, node.Name)
		}
	}
	if len(c.workers) < 2 {
		return nil, fmt.Errorf("cluster %s has %d workers: the tests need two", name, len(c.workers))
	}
	return c, nil
}

// prepare puts the layers on the nodes and installs the chart.
func prepare() error {
	for _, node := range cluster.nodes {
		if _, err := cluster.onNode(node, layersScript); err != nil {
			return err
		}
	}
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name:   driverNamespace,
		Labels: map[string]string{"pod-security.kubernetes.io/enforce": "privileged"},
	}}
	if err := ignoreExists(cluster.Create(context.Background(), namespace)); err != nil {
		return err
	}
	if err := prepareSnapshots(); err != nil {
		return err
	}
	return helmInstall()
}

// timeout bounds one wait. It is generous: it costs nothing where nothing hangs.
const timeout = 3 * time.Minute
