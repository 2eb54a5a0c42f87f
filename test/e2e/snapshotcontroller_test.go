//go:build e2e

package e2e

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
)

// snapshotModule has the CustomResourceDefinitions. go.mod has its version.
const snapshotModule = "github.com/kubernetes-csi/external-snapshotter/client/v8"

//go:embed snapshot-controller.yaml
var snapshotController string

// prepareSnapshots gives the cluster what VolumeSnapshots need beside the driver.
func prepareSnapshots() error {
	dir, err := command("go", "list", "-m", "-f", "{{.Dir}}", snapshotModule)
	if err != nil {
		return err
	}
	kinds, err := filepath.Glob(filepath.Join(dir, "config/crd/snapshot.storage.k8s.io_*.yaml"))
	if err != nil || len(kinds) != 3 {
		return fmt.Errorf("the kinds of VolumeSnapshots in %s: %q, %w", dir, kinds, err)
	}
	image := os.Getenv("E2E_SNAPSHOT_CONTROLLER_IMAGE")
	if image == "" {
		image = "registry.k8s.io/sig-storage/snapshot-controller:v8.7.0"
	}
	manifest, err := os.CreateTemp("", "snapshot-controller-*.yaml")
	if err != nil {
		return err
	}
	defer os.Remove(manifest.Name())
	_, err = manifest.WriteString(strings.Replace(snapshotController, "image: IMAGE", "image: "+image, 1))
	if err := errors.Join(err, manifest.Close()); err != nil {
		return err
	}
	args := []string{"apply", "--server-side", "--force-conflicts", "--filename", manifest.Name()}
	for _, file := range kinds {
		args = append(args, "--filename", file)
	}
	if _, err := command("kubectl", args...); err != nil {
		return err
	}
	if _, err := command("kubectl", "wait", "--for=condition=Established", "--timeout=60s", "crd/volumesnapshots.snapshot.storage.k8s.io",
		"crd/volumesnapshotcontents.snapshot.storage.k8s.io", "crd/volumesnapshotclasses.snapshot.storage.k8s.io"); err != nil {
		return err
	}
	return snapshotv1.AddToScheme(cluster.GetScheme())
}

// snapshotClass makes a VolumeSnapshotClass of the driver for one test.
func snapshotClass(t *testing.T, parameters ...string) string {
	t.Helper()
	c := &snapshotv1.VolumeSnapshotClass{
		ObjectMeta: metav1.ObjectMeta{Name: envconf.RandomName("e2e", 12)}, Driver: driverName,
		DeletionPolicy: snapshotv1.VolumeSnapshotContentDelete, Parameters: pairs(parameters),
	}
	must(t, cluster.Create(context.Background(), c))
	t.Cleanup(func() {
		if err := cluster.Delete(context.Background(), c); err != nil {
			t.Error(err)
		}
	})
	return c.Name
}

// atOnce makes a StorageClass of volumes that are made before there is a pod, where their sources are.
func atOnce(t *testing.T) string {
	t.Helper()
	return storageClass(t, func(c *storagev1.StorageClass) {
		mode := storagev1.VolumeBindingImmediate
		c.VolumeBindingMode = &mode
	}, "layers", threeLayers)
}

// snapshot asks for a snapshot of a claim, without waiting for it.
func (n *namespace) snapshot(name, class, claim string) {
	n.t.Helper()
	n.create(&snapshotv1.VolumeSnapshot{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: snapshotv1.VolumeSnapshotSpec{
			VolumeSnapshotClassName: &class, Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &claim},
		},
	})
}

// waitSnapshot waits until claims can be made from a snapshot.
func (n *namespace) waitSnapshot(name string) *snapshotv1.VolumeSnapshot {
	n.t.Helper()
	var s snapshotv1.VolumeSnapshot
	eventually(n.t, "snapshot "+name+" is ready", func() error {
		if err := cluster.Get(context.Background(), name, n.name, &s); err != nil {
			return err
		}
		if s.Status == nil || s.Status.ReadyToUse == nil || !*s.Status.ReadyToUse {
			message := ""
			if s.Status != nil && s.Status.Error != nil && s.Status.Error.Message != nil {
				message = *s.Status.Error.Message
			}
			return fmt.Errorf("%w: %s", errNot, message)
		}
		return nil
	})
	return &s
}

// waitSnapshotError waits until a snapshot says why it is not taken.
func (n *namespace) waitSnapshotError(name, word string) {
	n.t.Helper()
	eventually(n.t, "snapshot "+name+" says "+word, func() error {
		var s snapshotv1.VolumeSnapshot
		if err := cluster.Get(context.Background(), name, n.name, &s); err != nil {
			return err
		}
		if s.Status == nil || s.Status.Error == nil || s.Status.Error.Message == nil || !strings.Contains(*s.Status.Error.Message, word) {
			return fmt.Errorf("%w: %+v", errNot, s.Status)
		}
		return nil
	})
}

// deleteSnapshot deletes a snapshot and waits until its node has deleted it.
func (n *namespace) deleteSnapshot(name string) {
	n.t.Helper()
	var s snapshotv1.VolumeSnapshot
	must(n.t, cluster.Get(context.Background(), name, n.name, &s))
	must(n.t, cluster.Delete(context.Background(), &s))
	if s.Status == nil || s.Status.BoundVolumeSnapshotContentName == nil {
		return
	}
	content := *s.Status.BoundVolumeSnapshotContentName
	eventually(n.t, "VolumeSnapshotContent "+content+" is gone", func() error {
		var c snapshotv1.VolumeSnapshotContent
		err := cluster.Get(context.Background(), content, "", &c)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("%w: %+v (%v)", errNot, c.Status, err)
	})
}

// from has a claim made from a VolumeSnapshot or a PersistentVolumeClaim.
func from(kind, name string) claimOption {
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: kind, Name: name}
		if kind == "VolumeSnapshot" {
			group := snapshotv1.GroupName
			c.Spec.DataSource.APIGroup = &group
			// A snapshot says the size that the driver gives a small claim.
			size("8Mi")(c)
		}
	}
}

func size(quantity string) claimOption {
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.Resources.Requests = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(quantity)}
	}
}

// TestSnapshotsAdmissionPolicy asks the API server, as the ServiceAccount that takes snapshots, to change objects of others. That the
// policy lets the sidecars work, all tests of snapshots show.
func TestSnapshotsAdmissionPolicy(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	own, other := cluster.workers[0], cluster.workers[1]
	content := func(driver string) *snapshotv1.VolumeSnapshotContent {
		handle := "none@" + own
		c := &snapshotv1.VolumeSnapshotContent{
			ObjectMeta: metav1.ObjectMeta{
				Name: envconf.RandomName("e2e", 12), Labels: map[string]string{"snapshot.storage.kubernetes.io/managed-by": own},
			},
			Spec: snapshotv1.VolumeSnapshotContentSpec{
				Driver: driver, DeletionPolicy: snapshotv1.VolumeSnapshotContentRetain,
				Source:            snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle},
				VolumeSnapshotRef: corev1.ObjectReference{Namespace: n.name, Name: "none"},
			},
		}
		must(t, cluster.Create(context.Background(), c))
		t.Cleanup(func() { must(t, cluster.Delete(context.Background(), c)) })
		return c
	}
	account := release
	if mode() == modeCentral {
		account = controllerName
	}
	// patch has the API server check a change as the ServiceAccount, with the token of a pod on a node, without storing it.
	patch := func(node, kind, name, change string) error {
		_, err := command("kubectl", "--as=system:serviceaccount:"+driverNamespace+":"+account,
			"--as-user-extra=authentication.kubernetes.io/node-name="+node,
			"--namespace", n.name, "patch", kind, name, "--dry-run=server", "--type=merge", "--patch", change)
		return err
	}
	refused := func(err error, word string) error {
		if err == nil || !strings.Contains(err.Error(), word) {
			return fmt.Errorf("%w: %v; want a refusal with %q", errNot, err, word)
		}
		return nil
	}
	const contents, annotate = "volumesnapshotcontent", `{"metadata":{"annotations":{"a":"b"}}}`
	mine, foreign := content(driverName), content("other.example.com")
	eventually(t, "the API server has the policy", func() error {
		return refused(patch(own, contents, foreign.Name, annotate), "only VolumeSnapshotContents of that driver")
	})
	must(t, patch(own, contents, mine.Name, annotate))
	must(t, refused(patch(own, contents, mine.Name, `{"spec":{"deletionPolicy":"Delete"}}`), "not what they are of"))
	if mode() == modeNode {
		must(t, refused(patch(other, contents, mine.Name, annotate), "of that node alone"))
		const relabel = `{"metadata":{"labels":{"snapshot.storage.kubernetes.io/managed-by":"x"}}}`
		must(t, refused(patch(own, contents, mine.Name, relabel), "of that node"))
		return
	}
	n.snapshot("none", snapshotClass(t), "none")
	// update has the API server check a changed VolumeSnapshot.
	update := func(change func(*snapshotv1.VolumeSnapshot)) error {
		var s snapshotv1.VolumeSnapshot
		must(t, cluster.Get(context.Background(), "none", n.name, &s))
		s.APIVersion, s.Kind = snapshotv1.SchemeGroupVersion.String(), "VolumeSnapshot"
		change(&s)
		encoded, err := json.Marshal(s)
		must(t, err)
		file := filepath.Join(t.TempDir(), "snapshot.json")
		must(t, os.WriteFile(file, encoded, 0o600))
		_, err = command("kubectl", "--as=system:serviceaccount:"+driverNamespace+":"+account,
			"replace", "--dry-run=server", "--filename", file)
		return err
	}
	addFinalizer := func(name string) func(*snapshotv1.VolumeSnapshot) {
		return func(s *snapshotv1.VolumeSnapshot) { s.Finalizers = append(s.Finalizers, name) }
	}
	// The snapshot-controller may change it at the same time.
	eventually(t, "the provisioner may add its finalizer", func() error {
		return update(addFinalizer("provisioner.storage.kubernetes.io/volumesnapshot-as-source-protection"))
	})
	for name, change := range map[string]func(*snapshotv1.VolumeSnapshot){
		"another finalizer": addFinalizer("example.com/mine"),
		"a label":           func(s *snapshotv1.VolumeSnapshot) { s.Labels = map[string]string{"a": "b"} },
		"an annotation":     func(s *snapshotv1.VolumeSnapshot) { s.Annotations = map[string]string{"a": "b"} },
	} {
		eventually(t, name+" is refused", func() error { return refused(update(change), "only its finalizer") })
	}
}
