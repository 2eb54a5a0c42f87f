package driver

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/overlay-csi/overlay-csi/pkg/rebase"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// annotatedClaims are claims that all have the same annotations.
type annotatedClaims map[string]string

func (c annotatedClaims) ClaimAnnotations(context.Context, string, string) (map[string]string, error) {
	return c, nil
}

func (c annotatedClaims) ClaimReference(_ context.Context, namespace, name string) (*corev1.ObjectReference, error) {
	return &corev1.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: namespace, Name: name, UID: "uid"}, nil
}

// eventLog has events as text.
type eventLog struct{ lines []string }

func (l *eventLog) Eventf(object runtime.Object, eventType, reason, message string, args ...any) {
	claim := object.(*corev1.ObjectReference)
	l.lines = append(l.lines, fmt.Sprintf("%s %s/%s %s %s %s", claim.UID, claim.Namespace, claim.Name, eventType, reason,
		fmt.Sprintf(message, args...)))
}

func rebaseRequest(layersFrom string) *csi.CreateVolumeRequest {
	request := &csi.CreateVolumeRequest{
		Parameters:          map[string]string{keyClaimNamespace: "ns", keyClaimName: "claim"},
		VolumeContentSource: &csi.VolumeContentSource{},
	}
	if layersFrom != "" {
		request.Parameters[spec.KeyLayersFrom] = layersFrom
	}
	return request
}

// TestPolicyOfClaim: the annotation counts where claims name their layers.
func TestPolicyOfClaim(t *testing.T) {
	for _, c := range []struct {
		from, annotation string
		want             rebase.Policy
		fails            bool
	}{
		{"", "take-layers", rebase.KeepUpper, false},
		{spec.LayersFromClaim, "take-layers", rebase.TakeLayers, false},
		{spec.LayersFromClaim, "", rebase.Fail, false},
		{spec.LayersFromClaim, "both", "", true},
	} {
		r := rebases{api: annotatedClaims{"a": c.annotation}, annotation: "a"}
		got, err := r.policy(t.Context(), rebaseRequest(c.from), rebase.KeepUpper)
		if got != c.want || (err != nil) != c.fails {
			t.Errorf("%+v: policy %q, error %v", c, got, err)
		}
	}
	r := rebases{api: annotatedClaims{}, annotation: "a"}
	if got, err := r.policy(t.Context(), rebaseRequest(spec.LayersFromClaim), rebase.KeepUpper); got != rebase.KeepUpper || err != nil {
		t.Errorf("without an annotation: policy %q, error %v", got, err)
	}
}

// TestEventOnClaim: the event names the claim, and its message is bounded and taken literally.
func TestEventOnClaim(t *testing.T) {
	log := &eventLog{}
	r := rebases{api: annotatedClaims{}, events: log}
	report := &rebase.Report{Policy: rebase.KeepUpper}
	for i := range 20 {
		report.Add(rebase.Conflict{Path: fmt.Sprintf("%d/100%%d/%s", i, strings.Repeat("x", 4000)), Upper: 'C', Layers: 'C'})
	}
	r.report(t.Context(), rebaseRequest(""), rebaseMessage(report))
	r.report(t.Context(), &csi.CreateVolumeRequest{}, rebaseMessage(report))
	const begin = "uid ns/claim Warning RebaseConflicts Moved to other layers with onConflict: keep-upper: 20 conflicts: "
	if len(log.lines) != 1 || !strings.HasPrefix(log.lines[0], begin) || len(log.lines[0]) > maxMessage+100 {
		t.Errorf("events %q", log.lines)
	}
}
