//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

// snapshotterSecret is the Secret that the sidecar may read.
const snapshotterSecret = "snapshotter-registry"

// secretOfDriver makes a Secret with a login for the registry in the driver's namespace, for the time of a test.
func secretOfDriver(t *testing.T, name, password string) *corev1.Secret {
	t.Helper()
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: driverNamespace}, Type: corev1.SecretTypeDockerConfigJson,
		StringData: map[string]string{corev1.DockerConfigJsonKey: cluster.registry.DockerConfig(registryUser, password)},
	}
	must(t, cluster.Create(context.Background(), secret))
	t.Cleanup(func() { must(t, cluster.Delete(context.Background(), secret)) })
	return secret
}

// TestPortableSnapshot pushes a snapshot to a registry, deletes its claim, and restores it on the other worker.
func TestPortableSnapshot(t *testing.T) {
	n := newNamespace(t, "baseline")
	pushImage(t, "private/portable:1", registrytest.File("f", "layer\n"), registrytest.File("gone", "layer"))
	secretOfDriver(t, provisionerSecret, registryPassword)
	login := secretOfDriver(t, snapshotterSecret, "wrong")
	setLogin := func(config string) {
		login.StringData = map[string]string{corev1.DockerConfigJsonKey: config}
		must(t, cluster.Update(context.Background(), login))
	}
	private := storageClass(t, nil, "layers", imageRef("private/portable:1"),
		"csi.storage.k8s.io/provisioner-secret-name", provisionerSecret, "csi.storage.k8s.io/provisioner-secret-namespace", driverNamespace,
		"csi.storage.k8s.io/node-publish-secret-name", provisionerSecret, "csi.storage.k8s.io/node-publish-secret-namespace", driverNamespace)
	portable := snapshotClass(t, "push", cluster.registry.Host+"/private/snapshots",
		"csi.storage.k8s.io/snapshotter-secret-name", snapshotterSecret, "csi.storage.k8s.io/snapshotter-secret-namespace", driverNamespace,
		"csi.storage.k8s.io/snapshotter-list-secret-name", snapshotterSecret,
		"csi.storage.k8s.io/snapshotter-list-secret-namespace", driverNamespace)
	from0, to1 := cluster.workers[0], cluster.workers[1]
	n.claim("source", class(private))
	p := n.run("writer", withVolume(claimVolume("work", "source")), onNode(from0))
	p.want("echo pod >> /work/f && rm /work/gone && mkdir /work/new && sync && cat /work/f", "layer\npod")
	p.delete()
	source := n.volumeOf("source")

	// Who asks is told which registry refuses.
	n.snapshot("portable", portable, "source")
	n.waitSnapshotError("portable", cluster.registry.Host)
	n.waitSnapshotError("portable", "as user ")
	n.waitSnapshotEvent("portable", cluster.registry.Host)
	setLogin(`{"auths":{}}`)
	n.waitSnapshotError("portable", "without credentials")
	setLogin(cluster.registry.DockerConfig(registryUser, registryPassword))
	if ready := n.waitSnapshot("portable"); ready.Status.RestoreSize.String() != "8Mi" {
		t.Errorf("the snapshot has %s", ready.Status.RestoreSize)
	}
	n.deleteClaim("source")
	waitVolumeGone(t, source.Name)

	n.claim("restored", class(private), from("VolumeSnapshot", "portable"))
	p = n.run("restored", withVolume(claimVolume("work", "restored")), onNode(to1))
	p.want("cat /work/f && ls /work", "layer\npod\nf\nnew")
	p.want("echo again >> /work/f && cat /work/f", "layer\npod\nagain")
	if on := nodeOf(n.volumeOf("restored")); on != to1 {
		t.Errorf("the claim is on %s, and not on %s", on, to1)
	}
	if mode() == modeCentral {
		output, err := command("kubectl", "--namespace", driverNamespace, "get", "overlaynodes", "--output", "yaml")
		must(t, err)
		if strings.Contains(output, registryPassword) || strings.Contains(output, "auths") {
			t.Error("an OverlayNode has the password")
		}
	}
	n.deleteSnapshot("portable")
	p.want("cat /work/f", "layer\npod\nagain")
	p.delete()
}

// waitSnapshotEvent waits for an event of a snapshot, or of its VolumeSnapshotContent, which external-snapshotter reports errors on.
func (n *namespace) waitSnapshotEvent(name, word string) {
	n.t.Helper()
	eventually(n.t, "an event of snapshot "+name+" says "+word, func() error {
		var s snapshotv1.VolumeSnapshot
		if err := cluster.Get(context.Background(), name, n.name, &s); err != nil {
			return err
		}
		events := eventsOf(n.t, n.name, s.UID)
		if s.Status != nil && s.Status.BoundVolumeSnapshotContentName != nil {
			var content snapshotv1.VolumeSnapshotContent
			if err := cluster.Get(context.Background(), *s.Status.BoundVolumeSnapshotContentName, "", &content); err != nil {
				return err
			}
			events = append(events, eventsOf(n.t, metav1.NamespaceDefault, content.UID)...)
		}
		if all := strings.Join(events, "\n"); !strings.Contains(all, word) {
			return fmt.Errorf("%w: %s", errNot, all)
		}
		return nil
	})
}
