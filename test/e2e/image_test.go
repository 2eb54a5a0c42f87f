//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/overlay-csi/overlay-csi/test/registrytest"
)

const (
	registryUser     = "puller"
	registryPassword = "swordfish"
	// debianImage is the root file system that a pod has a view of.
	debianImage = "debian:bookworm-slim"
)

// startRegistry starts a registry on the address that kind's nodes have the host by, with TLS, and a password for what is
// beneath private. The chart's values name it, and have it stand in for registry.example.com, which the examples are of.
func startRegistry() (stop func(), err error) {
	output, err := command("docker", "network", "inspect", "kind", "--format", "{{range .IPAM.Config}}{{.Gateway}} {{end}}")
	if err != nil {
		return nil, err
	}
	var address string
	for field := range strings.FieldsSeq(output) {
		if ip := net.ParseIP(field); ip != nil && ip.To4() != nil {
			address = field
		}
	}
	if address == "" {
		return nil, fmt.Errorf("docker's network kind has no IPv4 gateway: %q", output)
	}
	dir, err := os.MkdirTemp("", "overlay-csi-e2e-")
	if err != nil {
		return nil, err
	}
	cluster.registry, err = registrytest.Start(
		registrytest.Options{Address: address + ":0", TLS: true, User: registryUser, Password: registryPassword, Private: "private/"},
	)
	if err != nil {
		return nil, err
	}
	host := cluster.registry.Host
	_, port, err := net.SplitHostPort(host)
	if err != nil {
		return nil, err
	}
	hosts := map[string]any{
		"hosts": fmt.Sprintf("server = \"https://%s\"\nca = \"ca.crt\"\n", host),
		"files": map[string]string{"ca.crt": string(cluster.registry.CA())},
	}
	values, err := yaml.Marshal(map[string]any{
		"registries":    map[string]any{host: hosts, "registry.example.com": hosts},
		"networkPolicy": map[string]any{"registryPorts": []string{port}},
	})
	if err != nil {
		return nil, err
	}
	// A port is a number in the chart.
	values = []byte(strings.Replace(string(values), fmt.Sprintf("- %q", port), "- "+port, 1))
	cluster.valuesFile = filepath.Join(dir, "values.yaml")
	return func() { cluster.registry.Close(); os.RemoveAll(dir) }, os.WriteFile(cluster.valuesFile, values, 0o600)
}

// pushImage pushes an image of one layer and returns its digest.
func pushImage(t *testing.T, name string, entries ...registrytest.Entry) string {
	t.Helper()
	layer, err := registrytest.Layer(entries...)
	must(t, err)
	image, err := registrytest.Image(layer)
	must(t, err)
	return push(t, name, image)
}

func push(t *testing.T, name string, what remote.Taggable) string {
	t.Helper()
	pinned, err := cluster.registry.Push(context.Background(), name, what)
	must(t, err)
	_, digest, _ := strings.Cut(pinned, "@")
	return digest
}

// imageRef names an image of the registry.
func imageRef(name string) string { return "oci://" + cluster.registry.Host + "/" + name }

// pullSecret makes a Secret as kubectl create secret docker-registry does.
func (n *namespace) pullSecret(name, password string) {
	n.t.Helper()
	n.create(&corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Type:       corev1.SecretTypeDockerConfigJson,
		StringData: map[string]string{corev1.DockerConfigJsonKey: cluster.registry.DockerConfig(registryUser, password)},
	})
}

func withSecret(volume corev1.Volume, secret string) corev1.Volume {
	volume.CSI.NodePublishSecretRef = &corev1.LocalObjectReference{Name: secret}
	return volume
}

// TestImageOfPrivateRegistry stacks an image on a directory, and tells a pod what is wrong with its secret.
func TestImageOfPrivateRegistry(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	pushImage(t, "private/data:1", registrytest.File("private", "private"), registrytest.File("f", "image"))
	layers := imageRef("private/data:1") + "\ndir://layers/bottom"
	n.pullSecret("wrong", "guess")
	n.pullSecret("right", registryPassword)
	refused := n.start("wrong", withVolume(withSecret(inlineVolume("data", "layers", layers), "wrong")))
	refused.waitEvent(cluster.registry.Host)
	refused.waitEvent(fmt.Sprintf("as user %q", registryUser))
	anonymous := n.start("anonymous", withVolume(inlineVolume("data", "layers", layers)))
	anonymous.waitEvent("without credentials")
	p := n.run("right", withVolume(withSecret(inlineVolume("data", "layers", layers), "right")))
	p.want("cat /data/private; echo; cat /data/f; echo; cat /data/bottom; echo mine > /data/f; cat /data/f", "private\nimage\nbottom\nmine")
	refused.delete()
	anonymous.delete()
}

// TestClaimStaysOnItsDigest moves a tag under a claim.
func TestClaimStaysOnItsDigest(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	old := pushImage(t, "moving:latest", registrytest.File("f", "old"))
	n.claim("kept", layers(imageRef("moving:latest")))
	first := n.run("first", withVolume(claimVolume("data", "kept")))
	first.want("cat /data/f; echo written > /data/mine", "old")
	attributes := n.volumeOf("kept").Spec.CSI.VolumeAttributes["layers"]
	if !strings.HasSuffix(attributes, "@"+old) {
		t.Errorf("the PersistentVolume has layers %q, and the tag was %s", attributes, old)
	}
	first.delete()
	pushImage(t, "moving:latest", registrytest.File("f", "new"))
	second := n.run("second", withVolume(claimVolume("data", "kept")))
	second.want("cat /data/f; echo; cat /data/mine", "old\nwritten")
	n.run("inline", withVolume(inlineVolume("data", "layers", imageRef("moving:latest")))).want("cat /data/f", "new")

	// What an operator sees of it on the node.
	node := second.Spec.NodeName
	output := cluster.overlayctl(t, node, "inspect", n.volumeOf("kept").Spec.CSI.VolumeHandle)
	if !strings.Contains(output, old) || !strings.Contains(output, `"UpperDir"`) {
		t.Errorf("overlayctl inspect says %s", output)
	}
	output = cluster.overlayctl(t, node, "layers")
	if !strings.Contains(output, n.volumeOf("kept").Spec.CSI.VolumeHandle) {
		t.Errorf("overlayctl layers says %s", output)
	}
	second.delete()
	n.deleteClaim("kept")
}

// TestRootFileSystem has a pod without privileges work in a root file system of its own.
func TestRootFileSystem(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	archive := filepath.Join(t.TempDir(), "debian.tar")
	if _, err := command("docker", "image", "inspect", debianImage); err != nil {
		_, err := command("docker", "pull", debianImage)
		must(t, err)
	}
	_, err := command("docker", "save", "--output", archive, debianImage)
	must(t, err)
	image, err := tarball.ImageFromPath(archive, nil)
	must(t, err)
	push(t, "debian:12", image)
	p := n.run("debian", withVolume(inlineVolume("root", "layers", imageRef("debian:12"))))
	p.want("chroot /root sh -c '. /etc/os-release; echo $ID; dpkg-query --show --showformat \"\\${Package}\\n\" dpkg'", "debian\ndpkg")
	p.want("chroot /root sh -c 'useradd --create-home somebody && stat --format %U /home/somebody'", "somebody")
}

// TestClaimOfPrivateRegistry has the tag of a private image resolved with a Secret that the StorageClass names.
func TestClaimOfPrivateRegistry(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	digest := pushImage(t, "private/claimed:1", registrytest.File("f", "private"))
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: provisionerSecret, Namespace: driverNamespace},
		Type:       corev1.SecretTypeDockerConfigJson,
		StringData: map[string]string{corev1.DockerConfigJsonKey: cluster.registry.DockerConfig(registryUser, registryPassword)},
	}
	must(t, cluster.Create(context.Background(), secret))
	t.Cleanup(func() { must(t, cluster.Delete(context.Background(), secret)) })
	private := storageClass(t, nil, "layersFrom", "claim",
		"csi.storage.k8s.io/provisioner-secret-name", provisionerSecret, "csi.storage.k8s.io/provisioner-secret-namespace", driverNamespace,
		"csi.storage.k8s.io/node-publish-secret-name", provisionerSecret, "csi.storage.k8s.io/node-publish-secret-namespace", driverNamespace)
	n.claim("private", class(private), layers(imageRef("private/claimed:1")))
	p := n.run("pod", withVolume(claimVolume("data", "private")))
	p.want("cat /data/f", "private")
	volume := n.volumeOf("private")
	if attributes := volume.Spec.CSI.VolumeAttributes["layers"]; !strings.HasSuffix(attributes, "@"+digest) {
		t.Errorf("the PersistentVolume has layers %q, and the tag was %s", attributes, digest)
	}
	if mode() == modeCentral {
		output, err := command("kubectl", "--namespace", driverNamespace, "get", "overlaynodes", "--output", "yaml")
		must(t, err)
		if strings.Contains(output, registryPassword) {
			t.Error("an OverlayNode has the password")
		}
	}
	p.delete()

	n.claim("anonymous", layers(imageRef("private/claimed:1")))
	waits := n.start("waits", withVolume(claimVolume("data", "anonymous")))
	var c corev1.PersistentVolumeClaim
	must(t, cluster.Get(context.Background(), "anonymous", n.name, &c))
	eventually(t, "the claim says that there are no credentials", func() error {
		if events := strings.Join(eventsOf(t, n.name, c.UID), "\n"); !strings.Contains(events, "without credentials") {
			return fmt.Errorf("%w: %s", errNot, events)
		}
		return nil
	})
	waits.delete()
	// The provisioner needs the Secret for the deletion too.
	n.deleteClaim("private")
	waitVolumeGone(t, volume.Name)
}
