package volume

import (
	"context"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Description describes a volume on this node.
type Description struct {
	ID   string
	Spec spec.Spec
	// Inline is set if the volume lives as long as its pod.
	Inline bool
	// SizeBytes is the limit of each upper, which is not enforced with sizeEnforcement: none, and Backend stores the uppers.
	SizeBytes int64
	Backend   upper.Backend
	// Resolved has the image digests that references were resolved to, and Layers the layers of these images by diff ID.
	Resolved reference.Digests
	Layers   []digest.Digest
	// Frozen are the paths of the volume's frozen uppers in the data root, the topmost first.
	Frozen       []string
	Publications []Publication
	Conditions   []Condition
}

// Publication describes a volume at one target. Data has the form of GraphDriver.Data of docker image inspect.
type Publication struct {
	Target  string
	Pod     kubelet.Pod
	Mounted bool
	Options string
	Data    map[string]string
}

// Describe describes a volume. It returns ErrNotFound if there is none.
func (m *Manager) Describe(ctx context.Context, id string) (Description, error) {
	if err := record.CheckID(id); err != nil {
		return Description{}, err
	}
	r, err := m.records.Load(id)
	if err != nil {
		return Description{}, err
	}
	d := Description{
		ID: r.ID, Spec: r.Spec, Inline: r.Inline, SizeBytes: r.Size, Backend: r.Backend, Resolved: r.Resolved, Layers: r.Layers,
		Frozen: m.uppers.frozenPaths(r),
	}
	for i := range r.Publications {
		p := &r.Publications[i]
		mounted, err := m.views.isLive(p)
		if err != nil {
			return Description{}, err
		}
		d.Publications = append(d.Publications, Publication{
			Target: p.Target, Pod: p.Pod, Mounted: mounted, Options: p.Attributes.String(), Data: m.uppers.graphDriverData(r, p),
		})
	}
	d.Conditions, err = m.checker.check(ctx, r, "")
	return d, err
}

// graphDriverData returns the directories of a view.
func (u uppers) graphDriverData(r *record.Record, p *record.Publication) map[string]string {
	lowers := slices.Concat(u.frozenPaths(r), p.LowerDirs)
	data := map[string]string{"LowerDir": strings.Join(lowers, ":"), "MergedDir": p.Target}
	if hasUpper(r) {
		data["UpperDir"], data["WorkDir"] = u.open(r, p).Paths()
	}
	return data
}

// frozenPaths returns where the frozen uppers of a volume are.
func (u uppers) frozenPaths(r *record.Record) []string {
	var paths []string
	for _, frozen := range r.Frozen {
		paths = append(paths, filepath.Join(u.root, upper.FrozenPath(frozen.Backend, frozen.ID)))
	}
	return paths
}

// IDs returns the IDs of all volumes on this node in order.
func (m *Manager) IDs() ([]string, error) {
	ids, err := m.records.List()
	slices.Sort(ids)
	return ids, err
}

// SnapshotDescription describes a snapshot on this node.
type SnapshotDescription struct {
	Snapshot
	// IsDamaged is set if its record cannot be read. All but its ID is unknown then.
	IsDamaged bool
	// Volumes are the IDs of the volumes that have one of its frozen uppers.
	Volumes []string
}

// DescribeSnapshots describes all snapshots on this node, by ID. While the record of a volume cannot be read, the error is that of
// [record.Store.FrozenInUse], and the volumes that have the snapshots are missing.
func (s *snapshots) DescribeSnapshots() (list []SnapshotDescription, err error) {
	ids, err := s.records.List()
	if err != nil {
		return nil, err
	}
	users, err := s.volumes.FrozenInUse()
	for _, id := range ids {
		made, err := s.records.Load(id)
		switch {
		case errdefs.IsNotFound(err):
			continue
		case err != nil:
			list = append(list, SnapshotDescription{Snapshot: Snapshot{ID: id}, IsDamaged: true})
			continue
		}
		described := SnapshotDescription{Snapshot: toSnapshot(made)}
		for _, frozen := range made.Frozen {
			for _, user := range users[frozen.ID] {
				// Other users are snapshots/ID and caches/NAMESPACE/NAME.
				if !strings.Contains(user, "/") && !slices.Contains(described.Volumes, user) {
					described.Volumes = append(described.Volumes, user)
				}
			}
		}
		list = append(list, described)
	}
	return list, err
}
