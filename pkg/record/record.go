package record

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/rebase"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// The versions of records. An earlier driver could misread what has version 2: it would mount the volume without its frozen uppers. A
// volume that has none keeps version 1.
const (
	version       = 1
	frozenVersion = 2
)

// Record describes one volume on this node.
type Record struct {
	Version int       `json:"version"`
	ID      string    `json:"id"`
	Spec    spec.Spec `json:"spec"`
	// Inline is set if the volume lives as long as its pod.
	Inline bool `json:"inline,omitempty"`
	// Provisioned is set if CreateVolume created the volume, and nil for inline and static volumes.
	Provisioned *Provisioned `json:"provisioned,omitempty"`
	// Backend stores the volume's uppers, "" until the first one was requested.
	Backend upper.Backend `json:"backend,omitempty"`
	// Size is the limit of each upper in bytes, 0 for none: the size in Spec, or what it was expanded to.
	Size int64 `json:"sizeBytes,omitempty"`
	// Made is set once the persistent upper exists. If it does not exist later, it is lost.
	Made bool `json:"made,omitempty"`
	// Group is the group of the files of a volume with a persistent upper, nil until it had a pod with an fsGroup.
	Group *Group `json:"group,omitempty"`
	// Frozen are the volume's frozen uppers, the topmost first. They lie between its upper and its layers.
	Frozen []Frozen `json:"frozen,omitempty"`
	// Freezing is set while the upper becomes the first of Frozen. Whoever loads the record to work on the volume finishes that.
	Freezing bool `json:"freezing,omitempty"`
	// Caches has the frozen uppers of the caches among the layers, by the name of the cache. They were its newest version when the
	// volume was published, and may be none.
	Caches map[string][]CacheVersion `json:"caches,omitempty"`
	// Committing is set while the upper becomes a version of a cache.
	Committing *Committing `json:"committing,omitempty"`
	// Resolved has the image digests that references to images and archives were resolved to, and Layers the layers of
	// these images by diff ID: garbage collection leaves them in the layer store.
	Resolved reference.Digests `json:"resolved,omitempty"`
	Layers   []digest.Digest   `json:"layers,omitempty"`
	// Publications are the targets at which the volume is mounted, is about to be, or was when the node went down.
	Publications []Publication `json:"publications,omitempty"`
}

// Provisioned says how CreateVolume was called.
type Provisioned struct {
	Name string `json:"name"`
	// RequestedLayers are the layers as requested, nil if they are those of the spec: there, tags are replaced by digests.
	RequestedLayers []reference.Reference `json:"requestedLayers,omitempty"`
	Access          spec.AccessMode       `json:"access"`
	// Source is what the volume was cloned from, nil for one that began with an empty upper.
	Source *Source `json:"source,omitempty"`
	// Rebased is set if the source has other layers.
	Rebased *rebase.Report `json:"rebased,omitempty"`
}

// Source is what a volume is cloned from: a snapshot or a volume. The other one is "".
type Source struct {
	Snapshot string `json:"snapshot,omitempty"`
	Volume   string `json:"volume,omitempty"`
}

// Group is the group of a volume's files, which is the fsGroup of the last pod that had one. Files in the upper stay as they were
// stored, and the kernel shows them with that group.
type Group struct {
	// ID is the fsGroup of the last pod that had one, First that of the first.
	ID    uint32 `json:"id"`
	First uint32 `json:"first"`
	// Stored is the ID by which the upper has the volume's group: First, or, of an upper that is older than that, the group that its
	// root had. Group Stored is stored as First then.
	Stored uint32 `json:"stored"`
}

// Swaps returns how the upper's groups have to be exchanged so that pods see the volume's group, nil if they need not.
func (g *Group) Swaps() []overlay.Swap {
	if g == nil || g.ID == g.Stored {
		return nil
	}
	return []overlay.Swap{{A: g.Stored, B: g.First}, {A: g.First, B: g.ID}}
}

// Frozen is a frozen upper in a record: what is needed to mount it as a lower.
type Frozen struct {
	// ID names its directory in the data root.
	ID      string        `json:"id"`
	Backend upper.Backend `json:"backend"`
	// Group is the group of its files when it was frozen, nil if they had none.
	Group *Group `json:"group,omitempty"`
	// Metacopy is set if it has files of which only the metadata was copied up. Views of it must be mounted with metacopy.
	Metacopy bool `json:"metacopy,omitempty"`
}

// Swaps returns how the frozen upper's groups have to be exchanged in a view whose files belong to a group, nil if they need not. stored
// is the group of the upper's root.
func (f Frozen) Swaps(group *uint32, stored uint32) []overlay.Swap {
	switch {
	case group == nil:
		return f.Group.Swaps()
	case f.Group == nil:
		return (&Group{ID: *group, First: *group, Stored: stored}).Swaps()
	}
	return (&Group{ID: *group, First: f.Group.First, Stored: f.Group.Stored}).Swaps()
}

// Committing says which version of a cache an upper becomes.
type Committing struct {
	CacheVersion
	// Generation is that of the cache with this version. A cache that has it already has this version, or one that was committed later.
	Generation int64 `json:"generation"`
}

// AllFrozen returns all frozen uppers that the record lists.
func (r *Record) AllFrozen() []Frozen {
	all := slices.Clone(r.Frozen)
	for _, versions := range r.Caches {
		all = append(all, frozenOf(versions)...)
	}
	if r.Committing != nil {
		all = append(all, r.Committing.Frozen)
	}
	return all
}

// HasMetacopy reports whether one of the volume's uppers, frozen or not, may have files of which only the metadata was copied up.
func (r *Record) HasMetacopy() bool {
	return r.Spec.Ownership == spec.OwnershipChown || slices.ContainsFunc(r.Frozen, func(f Frozen) bool { return f.Metacopy })
}

// Publication is a volume at one target path.
type Publication struct {
	Target     string             `json:"target"`
	Pod        kubelet.Pod        `json:"pod"`
	Access     spec.AccessMode    `json:"access,omitempty"`
	Attributes overlay.Attributes `json:"attributes"`
	// Group is the pod's fsGroup. Where a pod has none, it is that of the volume's files, nil if these have none either.
	Group *uint32 `json:"group,omitempty"`
	// BootID identifies the boot of the node in which the volume was published.
	BootID string `json:"bootID"`
	// LowerDirs are the paths of the lower directories, the topmost first. Fingerprints are theirs at that time, "" for a
	// directory that may change.
	LowerDirs    []string            `json:"lowerDirs,omitempty"`
	Fingerprints []linux.Fingerprint `json:"fingerprints,omitempty"`
	// PodVolume is the directory of the upper if that is in another volume of the pod.
	PodVolume upper.PodVolumePath `json:"podVolume,omitzero"`
}

// Limit returns the limit of each of the volume's uppers.
func (r *Record) Limit() upper.Limit {
	if r.Spec.SizeEnforcement == spec.EnforceNone {
		return upper.Limit{}
	}
	return upper.LimitOf(r.Size)
}

// Publication returns the publication at a target, nil if there is none.
func (r *Record) Publication(target string) *Publication {
	for i := range r.Publications {
		if r.Publications[i].Target == target {
			return &r.Publications[i]
		}
	}
	return nil
}

// With returns a copy of the record with a publication added, or replaced if there is one with the same target.
func (r *Record) With(p Publication) *Record {
	changed := r.Without(p.Target)
	changed.Publications = append(changed.Publications, p)
	return changed
}

// Without returns a copy of the record without the publication at a target.
func (r *Record) Without(target string) *Record {
	changed := *r
	changed.Publications = nil
	for _, p := range r.Publications {
		if p.Target != target {
			changed.Publications = append(changed.Publications, p)
		}
	}
	return &changed
}

// maxID is the maximal length of a volume handle in bytes (CSI spec, "Size Limits").
const maxID = 128

// CheckID returns ErrInvalidArgument if a volume handle cannot be the name of a directory.
func CheckID(id string) error {
	bad := func(r rune) bool { return r < ' ' || r == '/' || r == '\x7f' || r == '\uFFFD' }
	switch {
	case id == "":
		return fmt.Errorf("%w: the volume ID is missing", errdefs.ErrInvalidArgument)
	case len(id) > maxID:
		return fmt.Errorf("%w: the volume ID has %d bytes, the maximum is %d", errdefs.ErrInvalidArgument, len(id), maxID)
	case strings.HasPrefix(id, "."), strings.ContainsFunc(id, bad):
		return fmt.Errorf("%w: volume ID %q begins with '.', or has '/' or control characters; choose another volumeHandle",
			errdefs.ErrInvalidArgument, id)
	}
	return nil
}
