package integration

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// TestNodeCredentialsOfNamespaces limits the node's credentials to a namespace.
func TestNodeCredentialsOfNamespaces(t *testing.T) {
	node := newNode(t)
	r := startRegistry(t, node, registrytest.Options{TLS: true, User: "u", Password: "p"})
	config := filepath.Join(node.Dir, "config.json")
	must(t, os.WriteFile(config, []byte(r.DockerConfig("u", "p")), 0o600))
	node.AddArgs("--registry-config="+config, "--registry-config-namespaces=trusted,other")
	start(t, node)
	ref := pushImage(t, r, "team/a:1", map[string]string{"f": "private"})
	create := func(name, namespace string) error {
		_, err := node.Controller().CreateVolume(timeout(t), &csi.CreateVolumeRequest{
			Name:               name,
			Parameters:         map[string]string{"layers": "oci://" + r.Host + "/team/a:1", "csi.storage.k8s.io/pvc/namespace": namespace},
			VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(readWriteOnce)},
		})
		return err
	}
	for _, namespace := range []string{"default", "", "trusted"} {
		pod := newPod(t, node, "pod-of-"+namespace)
		v := inline("layers", ref, "csi.storage.k8s.io/pod.namespace", namespace)
		target, err := pod.Publish(timeout(t), v)
		created := create("claim-of-"+namespace, namespace)
		if namespace != "trusted" {
			wantCode(t, err, codes.Unauthenticated, namespace, "may not use the node's")
			wantCode(t, created, codes.Unauthenticated, namespace, "may not use the node's")
			continue
		}
		must(t, err)
		must(t, created)
		wantFile(t, filepath.Join(target, "f"), "private")
		unpublish(t, pod, v)
	}
}
