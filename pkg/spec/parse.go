package spec

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// LayersFromClaim is the value of KeyLayersFrom with which each claim names its own layers.
const LayersFromClaim = "claim"

// Scope says where the keys of a volume come from. The allowed values and the defaults depend on it.
type Scope struct {
	// Create: the keys are those of a StorageClass, and a claim is being created.
	Create bool
	// Inline: the keys are in a pod's own specification, and the volume lives as long as the pod.
	Inline bool
	// Access is the access mode of a volume that is not inline.
	Access AccessMode
}

// Parse parses the keys of a volume. It does not look for the layers. The spec has none if each claim names its own
// (KeyLayersFrom). Parse returns ErrInvalidArgument if a key or a value is unknown, or if values exclude each other.
func Parse(parameters map[string]string, scope Scope) (Spec, error) {
	for _, key := range slices.Sorted(maps.Keys(parameters)) {
		if !slices.Contains(keys, key) {
			return Spec{}, fmt.Errorf("%w: unknown key %q; the keys are %s",
				errdefs.ErrInvalidArgument, key, strings.Join(slices.Sorted(slices.Values(keys)), ", "))
		}
	}
	if _, given := parameters[KeyOnConflict]; given && !scope.Create {
		return Spec{}, fmt.Errorf("%w: key %q is for StorageClasses only: a volume moves to other layers when it is created",
			errdefs.ErrInvalidArgument, KeyOnConflict)
	}
	var spec Spec
	var err error
	if from, ok := parameters[KeyLayersFrom]; ok {
		err = checkLayersFrom(from, parameters, scope)
	} else if spec.Layers, err = reference.ParseList(parameters[KeyLayers]); err != nil {
		err = fmt.Errorf("key %q: %w", KeyLayers, err)
	}
	if err != nil {
		return Spec{}, err
	}
	if spec.Upper, spec.UpperRef, err = parseUpper(parameters[KeyUpper], scope); err != nil {
		return Spec{}, fmt.Errorf("key %q: %w", KeyUpper, err)
	}
	return spec, spec.parseLimits(parameters, scope)
}

func checkLayersFrom(from string, parameters map[string]string, scope Scope) error {
	_, both := parameters[KeyLayers]
	switch {
	case from != LayersFromClaim:
		return fmt.Errorf("%w: key %q: unknown value %q; the value is %s", errdefs.ErrInvalidArgument, KeyLayersFrom, from, LayersFromClaim)
	case !scope.Create:
		return fmt.Errorf("%w: key %q is for StorageClasses only; name the layers of this volume with the key %q",
			errdefs.ErrInvalidArgument, KeyLayersFrom, KeyLayers)
	case both:
		return fmt.Errorf("%w: keys %q and %q exclude each other; write one of them", errdefs.ErrInvalidArgument, KeyLayers, KeyLayersFrom)
	}
	return nil
}

func parseUpper(text string, scope Scope) (Policy, *reference.Reference, error) {
	switch policy := Policy(text); {
	case text == "":
		policy, err := defaultPolicy(scope)
		return policy, nil, err
	case strings.HasPrefix(text, string(UpperPodVolume)):
		ref, err := reference.Parse(text)
		if err != nil {
			return "", nil, err
		}
		if !scope.Inline && scope.Access.readsOnly() {
			return "", nil, fmt.Errorf("%w: %q cannot be used with a read-only volume; leave it out or write none", errdefs.ErrInvalidArgument, text)
		}
		return UpperPodVolume, &ref, nil
	case policy == UpperPod || policy == UpperNone:
		return policy, nil, nil
	case policy == UpperClaim && scope.Inline:
		return "", nil, fmt.Errorf("%w: an inline volume has no claim; write pod, none or volume://NAME", errdefs.ErrInvalidArgument)
	case policy == UpperClaim && scope.Access.manyNodes():
		return "", nil, fmt.Errorf("%w: claim cannot be used with %s, because the upper is on one node; write pod or none, or use ReadWriteOnce",
			errdefs.ErrInvalidArgument, scope.Access)
	case policy == UpperClaim:
		return policy, nil, nil
	}
	return "", nil, fmt.Errorf("%w: unknown policy %q; the policies are pod, claim, none and volume://NAME/path",
		errdefs.ErrInvalidArgument, text)
}

func defaultPolicy(scope Scope) (Policy, error) {
	switch {
	case scope.Inline:
		return UpperPod, nil
	case scope.Access.readsOnly():
		return UpperNone, nil
	case scope.Access == ReadWriteMany:
		return "", fmt.Errorf("%w: a ReadWriteMany volume must say upper: pod, because each pod's writes are its own and no other pod sees them",
			errdefs.ErrInvalidArgument)
	}
	return UpperClaim, nil
}
