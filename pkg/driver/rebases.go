package driver

import (
	"context"
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/rebase"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// maxMessage is how many bytes the message of an event has at most.
const maxMessage = 1024

// rebases reads from claims what is to become of conflicts with other layers, and tells them what did.
type rebases struct {
	api claims
	// events may be nil.
	events     events
	annotation string
}

// policy returns what becomes of conflicts: what the claim says in its annotation, where claims name their layers, or else its class.
func (r rebases) policy(ctx context.Context, req *csi.CreateVolumeRequest, ofClass rebase.Policy) (rebase.Policy, error) {
	if req.GetVolumeContentSource() == nil || req.GetParameters()[spec.KeyLayersFrom] != spec.LayersFromClaim {
		return ofClass, nil
	}
	namespace, name := req.GetParameters()[keyClaimNamespace], req.GetParameters()[keyClaimName]
	annotations, err := r.api.ClaimAnnotations(ctx, namespace, name)
	if err != nil {
		return "", fmt.Errorf("key %q: %w", spec.KeyLayersFrom, err)
	}
	text, ok := annotations[r.annotation]
	if !ok {
		return ofClass, nil
	}
	policy, err := rebase.ParsePolicy(text)
	if err != nil {
		return "", fmt.Errorf("annotation %s of claim %s/%s: %w", r.annotation, namespace, name, err)
	}
	return policy, nil
}

// rebaseMessage returns the message of the event about conflicts.
func rebaseMessage(report *rebase.Report) string {
	return fmt.Sprintf("Moved to other layers with onConflict: %s: %s", report.Policy, report)
}

// report writes an event on the claim of a request. A repeated request repeats it, which counts as the same event.
func (r rebases) report(ctx context.Context, req *csi.CreateVolumeRequest, message string) {
	message = strings.ToValidUTF8(message[:min(len(message), maxMessage)], "")
	logger := klog.FromContext(ctx)
	namespace, name := req.GetParameters()[keyClaimNamespace], req.GetParameters()[keyClaimName]
	logger.Info("Rebased with conflicts", logVolume, req.GetName(), "conflicts", message)
	if r.events == nil || name == "" {
		return
	}
	claim, err := r.api.ClaimReference(ctx, namespace, name)
	if err != nil {
		logger.Error(err, "Could not find the claim for an event")
		return
	}
	r.events.Eventf(claim, corev1.EventTypeWarning, "RebaseConflicts", "%s", message)
}
