package integration

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// startController runs a central controller that talks to an API server, until the test ends, and returns a connection to it.
func startController(t *testing.T, apiServer string) *grpc.ClientConn {
	t.Helper()
	dir := t.TempDir()
	kubeconfig, socket := filepath.Join(dir, "kubeconfig"), filepath.Join(dir, "csi.sock")
	config := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}],
clusters: [{name: a, cluster: {server: %q}}], users: [{name: a, user: {}}]}`, apiServer)
	if err := os.WriteFile(kubeconfig, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	controller := exec.Command(driverBinary(t), "controller", "--endpoint=unix://"+socket, "--namespace=storage", "--kubeconfig="+kubeconfig,
		"--http-endpoint=")
	controller.Stdout, controller.Stderr = t.Output(), t.Output()
	if err := controller.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = controller.Process.Kill()
		_ = controller.Wait()
	})
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// TestControllerAnswersSidecars asks a central controller what external-provisioner and external-resizer ask it before they work. They exit
// if there is no answer.
func TestControllerAnswersSidecars(t *testing.T) {
	conn := startController(t, "https://127.0.0.1:1")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()

	probe, err := csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true))
	if err != nil || !probe.GetReady().GetValue() {
		t.Fatalf("Probe: ready %v, error %v", probe.GetReady(), err)
	}
	capabilities, err := csi.NewControllerClient(conn).ControllerGetCapabilities(ctx, &csi.ControllerGetCapabilitiesRequest{})
	if err != nil {
		t.Fatalf("ControllerGetCapabilities: %v", err)
	}
	for _, capability := range capabilities.GetCapabilities() {
		if capability.GetRpc().GetType() == csi.ControllerServiceCapability_RPC_EXPAND_VOLUME {
			t.Error("the controller has EXPAND_VOLUME, and volumes grow on their nodes alone")
		}
	}
	// Without that capability, external-resizer asks whether nodes have it.
	ofNodes, err := csi.NewNodeClient(conn).NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{})
	if err != nil {
		t.Fatalf("NodeGetCapabilities: %v", err)
	}
	grows := false
	for _, capability := range ofNodes.GetCapabilities() {
		grows = grows || capability.GetRpc().GetType() == csi.NodeServiceCapability_RPC_EXPAND_VOLUME
	}
	if !grows {
		t.Errorf("the nodes' capabilities are %v, without EXPAND_VOLUME", ofNodes.GetCapabilities())
	}
}

// TestControllerReadsClaims has a central controller create many volumes at once whose layers are in annotations of their claims.
func TestControllerReadsClaims(t *testing.T) {
	claims := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, err := fmt.Fprintf(w, `{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": %q, "annotations":
{"overlay-csi.github.io/layers": "dir://layers/base"}}}`, path.Base(r.URL.Path))
		if err != nil {
			t.Error(err)
		}
	})
	server := httptest.NewServer(claims)
	t.Cleanup(server.Close)
	conn := startController(t, server.URL)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()

	const volumes = 100
	began := time.Now()
	var work sync.WaitGroup
	for i := range volumes {
		work.Go(func() {
			response, err := csi.NewControllerClient(conn).CreateVolume(ctx, &csi.CreateVolumeRequest{
				Name: fmt.Sprintf("pvc-%d", i),
				VolumeCapabilities: []*csi.VolumeCapability{{
					AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
					AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
				}},
				Parameters: map[string]string{
					"layersFrom": "claim", "upper": "pod",
					"csi.storage.k8s.io/pvc/namespace": "default", "csi.storage.k8s.io/pvc/name": fmt.Sprintf("claim-%d", i),
				},
			}, grpc.WaitForReady(true))
			if err != nil || response.GetVolume().GetVolumeContext()["layers"] != "dir://layers/base" {
				t.Errorf("volume %d: got %v, error %v", i, response, err)
			}
		})
	}
	work.Wait()
	// The default of client-go, 5 requests a second after the first 10, takes 18 s.
	if took := time.Since(began); took > 9*time.Second {
		t.Errorf("%d volumes took %s", volumes, took.Round(time.Second/10))
	}
}
