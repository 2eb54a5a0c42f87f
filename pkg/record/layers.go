package record

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// LayersInUse returns who uses each of the layers in the layer store: the IDs of volumes, snapshots as snapshots/ID, and the targets of
// mounted views that are in no record.
//
// Of a record that cannot be read, every digest that still stands in it counts, and the mount table names the layers of mounted views.
// Where it does not, any layer may be one of theirs, and LayersInUse returns ErrFailedPrecondition.
func (s *Store) LayersInUse() (map[digest.Digest][]string, error) {
	// Before the records: a record is saved before its view is mounted.
	views, err := s.views()
	if err != nil {
		return nil, err
	}
	all, err := s.survey()
	if err != nil {
		return nil, err
	}
	for _, view := range views {
		if slices.ContainsFunc(view.Targets, func(target string) bool { return all.targets[target] }) {
			continue
		}
		for _, lower := range view.Lowers {
			if layer := storedLayer.FindStringSubmatch(lower); layer != nil {
				all.add(digest.NewDigestFromEncoded(digest.SHA256, layer[1]), view.Targets[0])
			}
		}
		if len(all.unreadable) == 0 || !slices.ContainsFunc(view.Lowers, s.isUnknown) {
			continue
		}
		// It may have been unmounted since, and its record removed.
		if still, err := s.isMounted(view); err != nil || still {
			return nil, errors.Join(err, fmt.Errorf("%w: the records of volumes %s cannot be read, and the view at %s, whose layers the kernel "+
				"does not name, may be of one of them; restore the record, or delete the pod",
				errdefs.ErrFailedPrecondition, strings.Join(all.unreadable[:min(len(all.unreadable), maxNamed)], ", "), view.Targets[0]))
		}
	}
	return all.layers, nil
}

// maxNamed is how many volumes a message names.
const maxNamed = 10

// views returns the mounted views of the node. Their targets are as in the records: in the mount table, links are resolved.
func (s *Store) views() ([]overlay.View, error) {
	resolved, err := filepath.EvalSymlinks(s.kubeletDir)
	if err != nil {
		return nil, fmt.Errorf("find the views of the node: %w", err)
	}
	views, err := overlay.Views()
	if err != nil {
		return nil, err
	}
	var here []overlay.View
	for _, view := range views {
		var targets []string
		for _, target := range view.Targets {
			if beneath, ok := strings.CutPrefix(target, resolved+"/"); ok {
				targets = append(targets, filepath.Join(s.kubeletDir, beneath))
			}
		}
		if view.Targets = targets; targets != nil {
			here = append(here, view)
		}
	}
	return here, nil
}

// isMounted reports whether a view is still mounted.
func (s *Store) isMounted(view overlay.View) (bool, error) {
	views, err := s.views()
	return slices.ContainsFunc(views, func(other overlay.View) bool { return other.Device == view.Device }), err
}

// Unreadable returns the IDs of the volumes whose records cannot be used, in order, and of those that have an upper and no record.
// Snapshots whose records cannot be used follow as snapshots/ID.
func (s *Store) Unreadable() ([]string, error) {
	all, err := s.survey()
	return append(all.unreadable, all.unreadableSnapshots...), err
}

// FrozenInUse returns which volumes, snapshots and caches list each of the frozen uppers. Snapshots are named snapshots/ID, and caches
// caches/NAMESPACE/NAME. It returns ErrFailedPrecondition while the record of a volume or snapshot cannot be read: it may list any.
func (s *Store) FrozenInUse() (map[string][]string, error) {
	listed := map[string][]string{}
	ids, err := s.List()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		r, err := s.Load(id)
		switch {
		case err == nil:
			for _, frozen := range r.AllFrozen() {
				listed[frozen.ID] = append(listed[frozen.ID], id)
			}
		case errdefs.IsNotFound(err) && (!ContainsUppers(s.Dir(id)) || s.IsEphemeral(id)), errors.Is(err, ErrEmpty):
			// No volume, or an ephemeral one: after a power cut, btrfs may have its upper and not its record. What a persistent one lists
			// was saved after its mark.
		default:
			return nil, fmt.Errorf("%w: the record of volume %s may list frozen uppers, and cannot be read; restore it, or delete %s: %w",
				errdefs.ErrFailedPrecondition, id, s.Dir(id), err)
		}
	}
	snapshots, err := s.Snapshots().all()
	if err != nil {
		return nil, err
	}
	for _, snapshot := range snapshots {
		for _, frozen := range snapshot.Frozen {
			listed[frozen.ID] = append(listed[frozen.ID], snapshotUser(snapshot.ID))
		}
	}
	return listed, s.Caches().addFrozen(listed)
}

// survey is what all records of a node say.
type survey struct {
	layers     map[digest.Digest][]string
	targets    map[string]bool
	unreadable []string
	// unreadableSnapshots are named as users of layers are.
	unreadableSnapshots []string
}

// add adds a user of a layer. All layers of one user are added before those of the next.
func (a *survey) add(layer digest.Digest, user string) {
	users := a.layers[layer]
	if len(users) == 0 || users[len(users)-1] != user {
		a.layers[layer] = append(users, user)
	}
}

func (s *Store) survey() (survey, error) {
	all := survey{layers: map[digest.Digest][]string{}, targets: map[string]bool{}}
	ids, err := s.List()
	if err != nil {
		return all, err
	}
	for _, id := range ids {
		r, err := s.Load(id)
		switch {
		case err == nil:
			for _, layer := range r.Layers {
				all.add(layer, id)
			}
			for _, p := range r.Publications {
				all.targets[p.Target] = true
			}
		case !errdefs.IsNotFound(err):
			all.unreadable = append(all.unreadable, id)
			for _, layer := range readableDigests(filepath.Join(s.Dir(id), dataroot.Record)) {
				all.add(layer, id)
			}
		case ContainsUppers(s.Dir(id)):
			all.unreadable = append(all.unreadable, id)
		}
	}
	return all, s.surveySnapshots(&all)
}

// surveySnapshots adds what the records of snapshots say.
func (s *Store) surveySnapshots(all *survey) error {
	snapshots := s.Snapshots()
	ids, err := snapshots.List()
	if err != nil {
		return err
	}
	for _, id := range ids {
		snapshot, err := snapshots.Load(id)
		var layers []digest.Digest
		switch {
		case err == nil:
			layers = snapshot.Layers
		case !errdefs.IsNotFound(err):
			all.unreadableSnapshots = append(all.unreadableSnapshots, snapshotUser(id))
			layers = readableDigests(filepath.Join(snapshots.Dir(id), dataroot.SnapshotRecord))
		}
		for _, layer := range layers {
			all.add(layer, snapshotUser(id))
		}
	}
	return nil
}

// ContainsUppers reports whether the directory of a volume contains the upper of the volume or uppers of pods. It returns true if that
// is unknown.
func ContainsUppers(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, dataroot.PodUppers))
	return !errors.Is(err, os.ErrNotExist) || upper.ContainsUpper(dir)
}

var (
	// storedLayer is a path in the tree of a layer in the layer store.
	storedLayer = regexp.MustCompile(`/` + dataroot.Layers + `/sha256/([0-9a-f]{64})/`)
	encoded     = regexp.MustCompile(`[0-9a-f]{64}`)
)

// isUnknown reports whether the path of a lower does not name a directory.
func (s *Store) isUnknown(lower string) bool {
	scratch := filepath.Join(filepath.Dir(s.dir), dataroot.Mounter) + "/"
	return !strings.HasPrefix(lower, "/") || lower == "/" || strings.HasPrefix(lower, "/proc/") || strings.HasPrefix(lower, scratch)
}

// maxDamaged is how much is read of a record that cannot be used, in bytes. That of a volume with 500 layers and 50 pods has 4 MiB.
const maxDamaged = 8 << 20

// readableDigests returns what may be digests of layers in a record that cannot be used.
func readableDigests(path string) []digest.Digest {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	// What comes before an error is read all the same.
	data, _ := io.ReadAll(io.LimitReader(file, maxDamaged))
	var digests []digest.Digest
	for _, found := range encoded.FindAll(data, -1) {
		digests = append(digests, digest.NewDigestFromEncoded(digest.SHA256, string(found)))
	}
	return digests
}
