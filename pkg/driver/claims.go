package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/rebase"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// claims reads claims from the API server.
type claims interface {
	ClaimAnnotations(ctx context.Context, namespace, name string) (map[string]string, error)
	ClaimReference(ctx context.Context, namespace, name string) (*corev1.ObjectReference, error)
}

// claimLayers reads the layers that claims name in their annotation, for StorageClasses with layersFrom: claim.
type claimLayers struct {
	api        claims
	annotation string
}

func newClaimLayers(api claims, driverName string) claimLayers {
	return claimLayers{api, driverName + "/layers"}
}

// readOf returns the layers that the claim of a request names in its annotation. A claim that is made from a source need not name any, and
// then readOf returns none: they are the source's.
func (c claimLayers) readOf(ctx context.Context, req *csi.CreateVolumeRequest) ([]reference.Reference, error) {
	layers, err := c.read(ctx, req.GetParameters()[keyClaimNamespace], req.GetParameters()[keyClaimName])
	if errors.Is(err, errNoLayers) && req.GetVolumeContentSource() != nil {
		return nil, nil
	}
	return layers, err
}

// errNoLayers is the error of a claim that names no layers.
var errNoLayers = fmt.Errorf("%w: its StorageClass requires each claim to name its layers there", errdefs.ErrInvalidArgument)

// read returns the layers that a claim names in its annotation.
func (c claimLayers) read(ctx context.Context, namespace, name string) ([]reference.Reference, error) {
	if namespace == "" || name == "" {
		return nil, fmt.Errorf("%w: key %q: the request does not name the claim; start external-provisioner with --extra-create-metadata",
			errdefs.ErrFailedPrecondition, spec.KeyLayersFrom)
	}
	annotations, err := c.api.ClaimAnnotations(ctx, namespace, name)
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", spec.KeyLayersFrom, err)
	}
	text, ok := annotations[c.annotation]
	if !ok {
		return nil, fmt.Errorf("claim %s/%s has no annotation %s: %w", namespace, name, c.annotation, errNoLayers)
	}
	layers, err := reference.ParseList(text)
	if err != nil {
		return nil, fmt.Errorf("annotation %s of claim %s/%s: %w", c.annotation, namespace, name, err)
	}
	return layers, nil
}

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
