//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestAdmissionPolicy asks the API server, as the ServiceAccount that provisions, for PersistentVolumes of others. That the policy lets the
// provisioner and the resizer work, all tests of claims show.
func TestAdmissionPolicy(t *testing.T) {
	t.Parallel()
	const volume = `apiVersion: v1
kind: PersistentVolume
metadata: {name: e2e-admission-policy}
spec:
  capacity: {storage: 1Mi}
  accessModes: [ReadWriteOnce]
  claimRef: {apiVersion: v1, kind: PersistentVolumeClaim, namespace: default, name: any}
  `
	// create has the API server check a volume, without storing it.
	create := func(source string, args ...string) error {
		file := filepath.Join(t.TempDir(), "volume.yaml")
		must(t, os.WriteFile(file, []byte(volume+source+"\n"), 0o600))
		_, err := command("kubectl", append([]string{"create", "--dry-run=server", "--filename", file}, args...)...)
		return err
	}
	asDriver := "--as=system:serviceaccount:" + driverNamespace + ":" + release
	if mode() == modeCentral {
		asDriver += "-controller"
	}
	const hostPath = "hostPath: {path: /}"
	// The API server needs a moment to take a policy in.
	deadline := time.Now().Add(timeout)
	for create(hostPath, asDriver) == nil {
		if time.Now().After(deadline) {
			t.Fatal("the ServiceAccount can make a PersistentVolume with a hostPath")
		}
		time.Sleep(time.Second)
	}
	for _, source := range []string{
		hostPath,
		"local: {path: /}\n  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Exists}]}]}}",
		"nfs: {server: nfs.example.com, path: /}",
		"csi: {driver: other.example.com, volumeHandle: x}",
	} {
		if err := create(source, asDriver); err == nil || !strings.Contains(err.Error(), "only PersistentVolumes of that driver") {
			t.Errorf("%s: %v; want a refusal by the policy", source, err)
		}
	}
	if err := create("csi: {driver: "+driverName+", volumeHandle: x}", asDriver); err != nil {
		t.Errorf("a PersistentVolume of the driver: %v", err)
	}
	if err := create(hostPath); err != nil {
		t.Errorf("an administrator, whom the policy does not mean: %v", err)
	}
}
