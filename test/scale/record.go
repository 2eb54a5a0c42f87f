package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// record runs two nodes with the real driver, external-provisioner and external-resizer, with the chart's flags, makes, grows and deletes
// some claims, and prints what the programs have asked for: the content of testdata/node.txt. It needs root, as the driver does.
func record(ctx context.Context, o options) (err error) {
	s, err := startServers(ctx, o.binaries, auditPolicy)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	c, err := newCluster(ctx, s, sidecarMode{o.central.helm})
	if err != nil {
		return err
	}
	const nodes = 2
	if err := c.addNodes(ctx, nodes); err != nil {
		return err
	}
	if err := c.startControllers(ctx, o.binaries, 0); err != nil {
		return err
	}
	dir, remove, err := drivertest.WorkDir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	binary, err := drivertest.Build(dir)
	if err != nil {
		return err
	}
	kubeconfig := filepath.Join(s.dir, "sidecars.kubeconfig")
	if err := s.writeKubeconfig(kubeconfig, c.token); err != nil {
		return err
	}
	for i := range nodes {
		node, err := startRealNode(ctx, c, o, filepath.Join(dir, nodeName(i)), nodeName(i), binary, kubeconfig)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, node.Stop()) }()
	}
	churn := newChurn(c, 20*time.Second, 1)
	ready := make(chan struct{})
	go churn.watch(ctx, func() { close(ready) })
	<-ready
	churning, end := context.WithTimeout(ctx, 70*time.Second)
	defer end()
	churn.run(churning, "claim", 0.2)
	if err := churn.drain(ctx, time.Minute); err != nil {
		return err
	}
	return printAudit(s.auditLog)
}

// startRealNode starts the driver of a node, and the sidecars as charts/overlay-csi/templates/daemonset.yaml has them.
func startRealNode(ctx context.Context, c *cluster, o options, dir, name, binary, kubeconfig string) (*drivertest.Node, error) {
	node, err := drivertest.NewNode(dir, binary, "--node-id="+name, "--kubeconfig="+kubeconfig)
	if err != nil {
		return nil, err
	}
	for _, layer := range []string{"base", "tuning"} {
		if err := os.MkdirAll(filepath.Join(node.LayerDir, "models", layer), 0o755); err != nil {
			return nil, err
		}
	}
	if err := node.Start(ctx); err != nil {
		return nil, err
	}
	common := []string{"--kubeconfig=" + kubeconfig, "--csi-address=" + node.Socket}
	sidecars := map[string][]string{
		o.central.provisioner: {
			"--node-deployment", "--strict-topology", "--node-deployment-base-delay=5s", "--extra-create-metadata", "--enable-capacity",
			"--capacity-ownerref-level=1", "--capacity-poll-interval=1m", "--timeout=60s",
		},
		o.central.resizer: {"--leader-election", "--leader-election-namespace=" + namespace, "--handle-volume-inuse-error=false"},
	}
	env := []string{"NODE_NAME=" + name, "NAMESPACE=" + namespace, "POD_NAME=" + daemonPod(name)}
	for path, args := range sidecars {
		// The candidates of an election are known by their host names.
		args = append([]string{"--uts", "sh", "-c", `hostname "$0" && exec "$@"`, name, path}, append(args, common...)...)
		if _, err := c.startWith(ctx, env, "unshare", args...); err != nil {
			return nil, errors.Join(err, node.Stop())
		}
	}
	return node, nil
}

// writeKubeconfig writes a kubeconfig file with this token.
func (s *servers) writeKubeconfig(path, token string) error {
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: scale
clusters: [{name: scale, cluster: {server: %q, insecure-skip-tls-verify: true}}]
users: [{name: scale, user: {token: %s}}]
contexts: [{name: scale, context: {cluster: scale, user: scale}}]
`, s.url, strings.TrimSpace(token))
	return os.WriteFile(path, []byte(text), 0o600)
}
