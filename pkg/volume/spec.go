// Package volume is a volume's life on one node: what it is made of, its publishing and unpublishing for pods, its
// state on disk, and what is made good after a crash.
package volume

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Keys of a volume: the same in StorageClass parameters, a PersistentVolume's volumeAttributes and an inline volume's.
const (
	KeyLayers     = "layers"
	KeyLayersFrom = "layersFrom"
	KeyUpper      = "upper"
	KeyMedium     = "medium"
	KeySizeLimit  = "sizeLimit"
	KeyLayerOwner = "layerOwner"
)

// keys are the known keys, and what stands where a build does not have what one asks for.
var keys = map[string]struct{ unavailable bool }{
	KeyLayers:     {},
	KeyLayersFrom: {},
	KeyUpper:      {},
	KeyMedium:     {},
	KeySizeLimit:  {unavailable: true},
	KeyLayerOwner: {unavailable: true},
}

// Policy is where the writes to a volume go.
type Policy string

// The upper policies.
const (
	UpperPod       Policy = "pod"    // each pod its own, gone with the pod
	UpperVolume    Policy = "volume" // one for the claim, kept on its node
	UpperNone      Policy = "none"   // read-only
	UpperPodVolume Policy = "volume://"
)

// Spec is what a volume is made of. It is a value: two volumes with equal specs are made alike.
type Spec struct {
	// Layers are the references of the layers, the topmost first.
	Layers []layer.Reference `json:"layers"`
	// Upper is the policy; UpperRef names the other volume of the pod for UpperPodVolume, and is zero otherwise.
	Upper    Policy           `json:"upper"`
	UpperRef *layer.Reference `json:"upperRef,omitempty"`
}

// LayersFromClaim is the value of KeyLayersFrom with which a claim names its layers itself.
const LayersFromClaim = "claim"

// Usage is how a volume is used, which decides what its upper may be and is where nothing is said.
type Usage struct {
	// Create: the volume is being made for a claim, whose layers may be the claim's to name.
	Create bool
	// Inline: the volume is in the pod's own specification and lives as long as the pod.
	Inline bool
	// Access is meaningful where the volume is not inline.
	Access Access
}

// ParseSpec reads a volume's keys. It touches nothing: the layers need not exist, and are left out where the claim is
// to name them (KeyLayersFrom). Every error is an InvalidArgument, or NotImplemented where this build lacks what is
// asked for, and says what to write instead.
func ParseSpec(parameters map[string]string, usage Usage) (Spec, error) {
	for _, key := range slices.Sorted(maps.Keys(parameters)) {
		known, ok := keys[key]
		if !ok {
			return Spec{}, fmt.Errorf("%w: unknown key %q: known are %s", errdefs.ErrInvalidArgument, key, strings.Join(slices.Sorted(maps.Keys(keys)), ", "))
		}
		if known.unavailable {
			return Spec{}, fmt.Errorf("%w: key %q is not available in this build: leave it out", errdefs.ErrNotImplemented, key)
		}
	}
	var spec Spec
	var err error
	if from, ok := parameters[KeyLayersFrom]; ok {
		err = checkLayersFrom(from, parameters, usage)
	} else if spec.Layers, err = ParseLayers(parameters[KeyLayers]); err != nil {
		err = fmt.Errorf("key %q: %w", KeyLayers, err)
	}
	if err != nil {
		return Spec{}, err
	}
	if spec.Upper, spec.UpperRef, err = parseUpper(parameters[KeyUpper], usage); err != nil {
		return Spec{}, fmt.Errorf("key %q: %w", KeyUpper, err)
	}
	return spec, checkMedium(parameters[KeyMedium])
}

// ParseLayers reads the references of a volume's layers. Every error is an InvalidArgument.
func ParseLayers(text string) ([]layer.Reference, error) {
	layers, err := layer.ParseList(text)
	if err != nil {
		return nil, err
	}
	if len(layers) > overlay.MaxLowers {
		return nil, fmt.Errorf("%w: %d layers: overlayfs takes at most %d", errdefs.ErrInvalidArgument, len(layers), overlay.MaxLowers)
	}
	return layers, nil
}

func checkLayersFrom(from string, parameters map[string]string, usage Usage) error {
	_, both := parameters[KeyLayers]
	switch {
	case from != LayersFromClaim:
		return fmt.Errorf("%w: key %q: unknown value %q: there is %s", errdefs.ErrInvalidArgument, KeyLayersFrom, from, LayersFromClaim)
	case !usage.Create:
		return fmt.Errorf("%w: key %q is for StorageClasses alone: name the layers of this volume with the key %q", errdefs.ErrInvalidArgument, KeyLayersFrom, KeyLayers)
	case both:
		return fmt.Errorf("%w: keys %q and %q: write one of them", errdefs.ErrInvalidArgument, KeyLayers, KeyLayersFrom)
	}
	return nil
}

func parseUpper(text string, usage Usage) (Policy, *layer.Reference, error) {
	switch policy := Policy(text); {
	case text == "":
		policy, err := defaultPolicy(usage)
		return policy, nil, err
	case strings.HasPrefix(text, string(UpperPodVolume)):
		ref, err := layer.Parse(text)
		if err != nil {
			return "", nil, err
		}
		if !usage.Inline && usage.Access.readsOnly() {
			return "", nil, fmt.Errorf("%w: %q on a volume that is only read: leave it out or write none", errdefs.ErrInvalidArgument, text)
		}
		return UpperPodVolume, &ref, nil
	case policy == UpperPod || policy == UpperNone:
		return policy, nil, nil
	case policy == UpperVolume && usage.Inline:
		return "", nil, fmt.Errorf("%w: an inline volume has no claim whose upper could be kept: write pod, none or volume://NAME", errdefs.ErrInvalidArgument)
	case policy == UpperVolume && usage.Access.manyNodes():
		return "", nil, fmt.Errorf("%w: an upper is kept on one node, and a volume of access mode %s is used on many: write pod or none, or use ReadWriteOnce", errdefs.ErrInvalidArgument, usage.Access)
	case policy == UpperVolume:
		return policy, nil, nil
	}
	return "", nil, fmt.Errorf("%w: unknown policy %q: there are pod, volume, none and volume://NAME/path", errdefs.ErrInvalidArgument, text)
}

func defaultPolicy(usage Usage) (Policy, error) {
	switch {
	case usage.Inline:
		return UpperPod, nil
	case usage.Access.readsOnly():
		return UpperNone, nil
	case usage.Access == ManyWriters:
		return "", fmt.Errorf("%w: a ReadWriteMany volume must say upper: pod, because each pod's writes are its own and no other pod sees them", errdefs.ErrInvalidArgument)
	}
	return UpperVolume, nil
}

func checkMedium(medium string) error {
	switch medium {
	case "", "disk":
		return nil
	case "memory":
		return fmt.Errorf("%w: key %q: memory is not available in this build: use disk", errdefs.ErrNotImplemented, KeyMedium)
	}
	return fmt.Errorf("%w: key %q: unknown medium %q: there are disk and memory", errdefs.ErrInvalidArgument, KeyMedium, medium)
}

// Equal reports whether two volumes are made of the same.
func (s Spec) Equal(other Spec) bool {
	if (s.UpperRef == nil) != (other.UpperRef == nil) || (s.UpperRef != nil && *s.UpperRef != *other.UpperRef) {
		return false
	}
	return s.Upper == other.Upper && slices.Equal(s.Layers, other.Layers)
}

// Parameters are the keys that ParseSpec reads back to this spec whatever the usage.
func (s Spec) Parameters() map[string]string {
	policy := string(s.Upper)
	if s.UpperRef != nil {
		policy = s.UpperRef.String()
	}
	return map[string]string{KeyLayers: strings.Join(s.layerStrings(), "\n"), KeyUpper: policy}
}

func (s Spec) layerStrings() []string {
	names := make([]string, len(s.Layers))
	for i, ref := range s.Layers {
		names[i] = ref.String()
	}
	return names
}

// upperPath is where in the other volume an upper of policy UpperPodVolume is kept.
func (s Spec) upperPath() string {
	if s.UpperRef.Path() == "" {
		return upper.DefaultPath
	}
	return s.UpperRef.Path()
}

// ephemeral reports whether the upper of a pod goes with the pod.
func (s Spec) ephemeral() bool { return s.Upper == UpperPod }
