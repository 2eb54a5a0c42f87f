package driver

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// claims reads claims from the API server.
type claims interface {
	ClaimAnnotations(ctx context.Context, namespace, name string) (map[string]string, error)
}

// claimLayers reads the layers that claims name in their annotation, for StorageClasses with layersFrom: claim.
type claimLayers struct {
	api        claims
	annotation string
}

func newClaimLayers(api claims, driverName string) claimLayers {
	return claimLayers{api, driverName + "/layers"}
}

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
		return nil, fmt.Errorf("%w: claim %s/%s has no annotation %s; its StorageClass requires each claim to name its layers there",
			errdefs.ErrInvalidArgument, namespace, name, c.annotation)
	}
	layers, err := reference.ParseList(text)
	if err != nil {
		return nil, fmt.Errorf("annotation %s of claim %s/%s: %w", c.annotation, namespace, name, err)
	}
	return layers, nil
}
