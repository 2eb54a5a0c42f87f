package spec

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// The keys of a volume.
const (
	KeyLayers          = "layers"
	KeyLayersFrom      = "layersFrom"
	KeyUpper           = "upper"
	KeyMedium          = "medium"
	KeySizeLimit       = "sizeLimit"
	KeySizeEnforcement = "sizeEnforcement"
	KeyLayerOwner      = "layerOwner"
	KeyOwnership       = "ownership"
	KeyCommit          = "commit"
	KeyOnConflict      = "onConflict"
)

var keys = []string{
	KeyLayers, KeyLayersFrom, KeyUpper, KeyMedium, KeySizeLimit, KeySizeEnforcement, KeyLayerOwner, KeyOwnership, KeyCommit,
	KeyOnConflict,
}

// Spec is what a volume consists of. Two volumes with equal specs are made alike.
type Spec struct {
	// Layers are the references to the layers, the topmost first.
	Layers []reference.Reference `json:"layers"`
	// Upper is the upper policy. UpperRef names the other volume of the pod if that is UpperPodVolume, and is nil otherwise.
	Upper    Policy               `json:"upper"`
	UpperRef *reference.Reference `json:"upperRef,omitempty"`
	// Size is the limit of each upper in bytes, 0 for none, and SizeEnforcement how it is enforced. The size of a claim is
	// the one that was requested when the claim was created: growth since then is not part of the spec.
	Size            int64           `json:"size,omitempty"`
	SizeEnforcement SizeEnforcement `json:"sizeEnforcement,omitempty"`
	Medium          Medium          `json:"medium,omitempty"`
	// LayerOwner owns the layers' files that belong to root, nil for root. Ownership is how files get their owner and group.
	LayerOwner *IDs      `json:"layerOwner,omitempty"`
	Ownership  Ownership `json:"ownership,omitempty"`
	// Commit is the cache whose newest version the upper becomes when its pod has succeeded, "" for none.
	Commit string `json:"commit,omitempty"`
}

// Policy says where the writes to a volume go.
type Policy string

// The upper policies.
const (
	UpperPod       Policy = "pod"       // each pod has its own upper, which is deleted with the pod
	UpperClaim     Policy = "claim"     // the claim has one upper, which is persistent and on one node
	UpperNone      Policy = "none"      // the volume is read-only
	UpperPodVolume Policy = "volume://" // the upper is in another volume of the pod
)

// SizeEnforcement says how the limit of an upper is enforced.
type SizeEnforcement string

// The ways to enforce a size. EnforceBest is the best of those that the node supports.
const (
	EnforceBest  SizeEnforcement = ""
	EnforceQuota SizeEnforcement = "quota"
	EnforceImage SizeEnforcement = "image"
	EnforceNone  SizeEnforcement = "none"
)

// Medium says what stores an upper.
type Medium string

// The media.
const (
	MediumDisk   Medium = ""
	MediumMemory Medium = "memory"
)

// Ownership says how the layers' files get the owner and the group that the volume and the pod ask for.
type Ownership string

// OwnershipIDMap lets the kernel show other owners (ID-mapped layers) and leaves modes as they are. OwnershipChown changes
// owners, groups and modes of all files once; overlayfs copies up their metadata alone. OwnershipNone leaves the layers'
// files as they are.
const (
	OwnershipIDMap Ownership = ""
	OwnershipChown Ownership = "chown"
	OwnershipNone  Ownership = "none"
)

// IDs are the IDs of a user and a group.
type IDs struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
}

// MinSize is the smallest size of a volume in bytes. A persistent upper has at least MinPersistentSize: its disk image has
// a journal.
const (
	MinSize           = 1 << 20
	MinPersistentSize = 8 << 20
)

// Equal reports whether two specs are equal.
func (s Spec) Equal(other Spec) bool {
	return s.Upper == other.Upper && equal(s.UpperRef, other.UpperRef) && slices.Equal(s.Layers, other.Layers) &&
		s.Size == other.Size && s.SizeEnforcement == other.SizeEnforcement && s.Medium == other.Medium &&
		equal(s.LayerOwner, other.LayerOwner) && s.Ownership == other.Ownership && s.Commit == other.Commit
}

func equal[T comparable](a, b *T) bool {
	return (a == nil) == (b == nil) && (a == nil || *a == *b)
}

// Parameters returns the keys that Parse parses to this spec in every scope.
func (s Spec) Parameters() map[string]string {
	policy := string(s.Upper)
	if s.UpperRef != nil {
		policy = s.UpperRef.String()
	}
	parameters := map[string]string{KeyLayers: strings.Join(s.LayerNames(), "\n"), KeyUpper: policy}
	for key, value := range map[string]string{
		KeySizeEnforcement: string(s.SizeEnforcement), KeyMedium: string(s.Medium), KeyOwnership: string(s.Ownership), KeyCommit: s.Commit,
	} {
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

// LayerNames returns the layer references as text.
func (s Spec) LayerNames() []string {
	names := make([]string, len(s.Layers))
	for i, ref := range s.Layers {
		names[i] = ref.String()
	}
	return names
}

// UsesCaches reports whether the volume has a cache for a layer, or becomes a version of one.
func (s Spec) UsesCaches() bool { return s.Commit != "" || slices.ContainsFunc(s.Layers, isCache) }

func isCache(ref reference.Reference) bool { return ref.Scheme() == reference.Cache }

// Ephemeral reports whether an upper is deleted with its pod.
func (s Spec) Ephemeral() bool { return s.Upper == UpperPod }

// Persistent reports whether the volume has an upper that outlives its pods.
func (s Spec) Persistent() bool { return s.Upper == UpperClaim }

// ManagesUpper reports whether the volume's uppers are in the data root.
func (s Spec) ManagesUpper() bool { return s.Ephemeral() || s.Persistent() }
