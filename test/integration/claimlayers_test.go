package integration

import (
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

const layersAnnotation = drivertest.DriverName + "/layers"

// createForClaim calls CreateVolume as external-provisioner does with --extra-create-metadata.
func createForClaim(t *testing.T, node *drivertest.Node, name, claim string, parameters map[string]string) (drivertest.Volume, error) {
	t.Helper()
	all := map[string]string{"csi.storage.k8s.io/pvc/name": claim, "csi.storage.k8s.io/pvc/namespace": "default",
		"csi.storage.k8s.io/pv/name": name}
	maps.Copy(all, parameters)
	response, err := node.Controller().CreateVolume(timeout(t), &csi.CreateVolumeRequest{
		Name:               name,
		VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(readWriteOnce)},
		Parameters:         all,
	})
	v := response.GetVolume()
	return drivertest.Volume{Name: name, ID: v.GetVolumeId(), Claim: true, Mode: readWriteOnce, Attributes: v.GetVolumeContext()}, err
}

func claimWithAnnotations(annotations map[string]string) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{
		TypeMeta:   metav1.TypeMeta{Kind: "PersistentVolumeClaim", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Annotations: annotations},
	}
}

func TestClaimNamesItsLayers(t *testing.T) {
	annotated := claimWithAnnotations(map[string]string{layersAnnotation: drivertest.Layers("a", "b")})
	kubeconfig := apiServer(t, &corev1.Pod{}, map[string]*corev1.PersistentVolumeClaim{"annotated": annotated})
	node := startNode(t, "--kubeconfig="+kubeconfig)
	for _, name := range []string{"a", "b"} {
		fill(t, filepath.Join(node.LayerDir, name), map[string]string{"f": name, name: name})
	}
	fromClaim := map[string]string{"layersFrom": "claim"}

	v, err := createForClaim(t, node, "pvc-1", "annotated", fromClaim)
	must(t, err)
	if got := v.Attributes["layers"]; got != drivertest.Layers("a", "b") || v.Attributes["layersFrom"] != "" {
		t.Errorf("the volume is of %v", v.Attributes)
	}
	pod := newPod(t, node, "pod")
	target := publish(t, pod, v)
	wantFile(t, filepath.Join(target, "f"), "a")
	wantFile(t, filepath.Join(target, "b"), "b")
	unpublish(t, pod, v)

	// Asked again the driver answers with the volume that is there, whatever has become of the annotation.
	for _, now := range []map[string]string{{layersAnnotation: drivertest.Layers("b")}, {layersAnnotation: "nonsense"}, nil} {
		annotated.Annotations = now
		again, err := createForClaim(t, node, "pvc-1", "annotated", fromClaim)
		must(t, err)
		if !maps.Equal(again.Attributes, v.Attributes) {
			t.Errorf("created again with the annotations %v: %v", now, again.Attributes)
		}
	}
	deleteVolume(t, node, v)
	wantNothingLeft(t, node)
}

func TestClaimNamesItsLayersWrongly(t *testing.T) {
	kubeconfig := apiServer(t, &corev1.Pod{}, map[string]*corev1.PersistentVolumeClaim{
		"plain":   claimWithAnnotations(nil),
		"empty":   claimWithAnnotations(map[string]string{layersAnnotation: ""}),
		"escape":  claimWithAnnotations(map[string]string{layersAnnotation: "dir://layers/../x"}),
		"missing": claimWithAnnotations(map[string]string{layersAnnotation: drivertest.Layers("missing")}),
	})
	node := startNode(t, "--kubeconfig="+kubeconfig)
	fromClaim := map[string]string{"layersFrom": "claim"}
	for name, c := range map[string]struct {
		claim      string
		parameters map[string]string
		code       codes.Code
		word       string
	}{
		"no annotation":      {"plain", fromClaim, codes.InvalidArgument, "default/plain has no annotation " + layersAnnotation},
		"empty annotation":   {"empty", fromClaim, codes.InvalidArgument, "annotation " + layersAnnotation},
		"bad reference":      {"escape", fromClaim, codes.InvalidArgument, "default/escape"},
		"missing directory":  {"missing", fromClaim, codes.NotFound, "missing"},
		"claim that is gone": {"gone", fromClaim, codes.NotFound, "default/gone"},
		"no metadata":        {"", fromClaim, codes.FailedPrecondition, "--extra-create-metadata"},
		"other source":       {"plain", map[string]string{"layersFrom": "pod"}, codes.InvalidArgument, "the value is claim"},
		"both": {"plain", map[string]string{"layersFrom": "claim", "layers": drivertest.Layers("a")}, codes.InvalidArgument,
			"write one"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := createForClaim(t, node, "pvc-bad", c.claim, c.parameters)
			wantCode(t, err, c.code, c.word)
		})
	}
	_, err := newPod(t, node, "pod").Publish(timeout(t), inline("layersFrom", "claim"))
	wantCode(t, err, codes.InvalidArgument, "StorageClasses only")
	wantNothingLeft(t, node)
	must(t, node.Stop())

	alone := startNode(t)
	_, err = createForClaim(t, alone, "pvc-alone", "plain", fromClaim)
	wantCode(t, err, codes.FailedPrecondition, "--kubeconfig")
}

// TestVolumeWithoutATopologyLeavesNothingOnTheNodeThatMadeIt: any node's provisioner may delete it, and no other one
// is ever asked.
func TestVolumeWithoutATopologyLeavesNothingOnTheNodeThatMadeIt(t *testing.T) {
	node := startNode(t)
	layers := layersOf(t, node, map[string]string{"f": "layer"})
	for _, v := range []drivertest.Volume{
		create(t, node, "rox", csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY, "layers", layers),
		create(t, node, "rwx", readWriteMany, "layers", layers, "upper", "pod"),
		create(t, node, "sibling", readWriteOnce, "layers", layers, "upper", "volume://data"),
	} {
		if _, err := os.Lstat(filepath.Join(node.DataRoot, "volumes", v.ID)); err == nil {
			t.Errorf("volume %s has a state on the node that made it", v.ID)
		}
	}
	wantNothingLeft(t, node)
}
