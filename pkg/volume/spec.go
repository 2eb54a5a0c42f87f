// Package volume is a volume's life on one node: what it is made of, its publishing and unpublishing for pods, its
// state on disk, and what is made good after a crash.
package volume

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Keys of a volume: the same in StorageClass parameters, a PersistentVolume's volumeAttributes and an inline volume's.
const (
	KeyLayers     = "layers"
	KeyLayersFrom = "layersFrom"
	KeyUpper      = "upper"
	KeyMedium     = "medium"
	KeySizeLimit  = "sizeLimit"
	KeyLimit      = "limit"
	KeyLayerOwner = "layerOwner"
	KeyOwnership  = "ownership"
)

var keys = []string{KeyLayers, KeyLayersFrom, KeyUpper, KeyMedium, KeySizeLimit, KeyLimit, KeyLayerOwner, KeyOwnership}

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
	Layers []reference.Reference `json:"layers"`
	// Upper is the policy; UpperRef names the other volume of the pod for UpperPodVolume, and is zero otherwise.
	Upper    Policy               `json:"upper"`
	UpperRef *reference.Reference `json:"upperRef,omitempty"`
	// Size is the limit of the upper in bytes, 0 for none, and Limit how it is kept. Of a claim it is what was asked for
	// when it was made: what it has grown to since is not part of what it is made of.
	Size   int64  `json:"size,omitempty"`
	Limit  Limit  `json:"limit,omitempty"`
	Medium Medium `json:"medium,omitempty"`
	// LayerOwner is whom root's files of the layers appear to belong to, and Ownership how that is done.
	LayerOwner *Owner    `json:"layerOwner,omitempty"`
	Ownership  Ownership `json:"ownership,omitempty"`
}

// Limit is how a size is kept.
type Limit string

// How a size is kept: in the best way that the node has, or in one that the volume insists on, or not at all.
const (
	LimitBest  Limit = ""
	LimitQuota Limit = "quota"
	LimitImage Limit = "image"
	LimitNone  Limit = "none"
)

// Medium is what an upper is kept on.
type Medium string

// The media.
const (
	MediumDisk   Medium = ""
	MediumMemory Medium = "memory"
)

// Ownership is how the layers' files get the owner and group that the volume and the pod ask for.
type Ownership string

// OwnershipMap has the kernel show other owners (ID-mapped layers), and leaves modes as they are. OwnershipWalk goes over
// the files once, and changes owners, groups and modes by copying up their metadata alone. OwnershipNone leaves the layers'
// files as they are.
const (
	OwnershipMap  Ownership = ""
	OwnershipWalk Ownership = "walk"
	OwnershipNone Ownership = "none"
)

// Owner is a user and a group.
type Owner struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
}

// MinSize is the smallest size of a volume in bytes, and MinKeptSize that of one whose upper is kept: there is a journal
// in its disk image.
const (
	MinSize     = 1 << 20
	MinKeptSize = 8 << 20
)

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
// to name them (KeyLayersFrom). Every error is an InvalidArgument, and says what to write instead.
func ParseSpec(parameters map[string]string, usage Usage) (Spec, error) {
	for _, key := range slices.Sorted(maps.Keys(parameters)) {
		if !slices.Contains(keys, key) {
			return Spec{}, fmt.Errorf("%w: unknown key %q: known are %s", errdefs.ErrInvalidArgument, key, strings.Join(slices.Sorted(slices.Values(keys)), ", "))
		}
	}
	var spec Spec
	var err error
	if from, ok := parameters[KeyLayersFrom]; ok {
		err = checkLayersFrom(from, parameters, usage)
	} else if spec.Layers, err = reference.ParseList(parameters[KeyLayers]); err != nil {
		err = fmt.Errorf("key %q: %w", KeyLayers, err)
	}
	if err != nil {
		return Spec{}, err
	}
	if spec.Upper, spec.UpperRef, err = parseUpper(parameters[KeyUpper], usage); err != nil {
		return Spec{}, fmt.Errorf("key %q: %w", KeyUpper, err)
	}
	return spec, spec.parseLimits(parameters, usage)
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

func parseUpper(text string, usage Usage) (Policy, *reference.Reference, error) {
	switch policy := Policy(text); {
	case text == "":
		policy, err := defaultPolicy(usage)
		return policy, nil, err
	case strings.HasPrefix(text, string(UpperPodVolume)):
		ref, err := reference.Parse(text)
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

// Equal reports whether two volumes are made of the same.
func (s Spec) Equal(other Spec) bool {
	if (s.UpperRef == nil) != (other.UpperRef == nil) || (s.UpperRef != nil && *s.UpperRef != *other.UpperRef) {
		return false
	}
	if (s.LayerOwner == nil) != (other.LayerOwner == nil) || (s.LayerOwner != nil && *s.LayerOwner != *other.LayerOwner) {
		return false
	}
	return s.Upper == other.Upper && slices.Equal(s.Layers, other.Layers) && s.Size == other.Size && s.Limit == other.Limit && s.Medium == other.Medium && s.Ownership == other.Ownership
}

// Parameters are the keys that ParseSpec reads back to this spec, however the volume is used.
func (s Spec) Parameters() map[string]string {
	policy := string(s.Upper)
	if s.UpperRef != nil {
		policy = s.UpperRef.String()
	}
	parameters := map[string]string{KeyLayers: strings.Join(s.layerStrings(), "\n"), KeyUpper: policy}
	for key, value := range map[string]string{KeyLimit: string(s.Limit), KeyMedium: string(s.Medium), KeyOwnership: string(s.Ownership)} {
		if value != "" {
			parameters[key] = value
		}
	}
	if s.Size > 0 {
		parameters[KeySizeLimit] = strconv.FormatInt(s.Size, 10)
	}
	if s.LayerOwner != nil {
		parameters[KeyLayerOwner] = fmt.Sprintf("%d:%d", s.LayerOwner.UID, s.LayerOwner.GID)
	}
	return parameters
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

// hasUpper reports whether the driver itself keeps the volume's uppers.
func (s Spec) hasUpper() bool { return s.Upper == UpperPod || s.Upper == UpperVolume }
