package record

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// snapshotVersion is raised when an earlier driver could misread what this one writes.
const snapshotVersion = 1

// Snapshot is what a volume consisted of at one moment: all that is needed to make another volume of it.
type Snapshot struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	Name    string `json:"name"`
	// Volume is the ID of the volume, which may be gone.
	Volume  string    `json:"volume"`
	Created time.Time `json:"created"`
	// Size is that of the volume in bytes, 0 for none.
	Size int64     `json:"sizeBytes,omitempty"`
	Spec spec.Spec `json:"spec"`
	// The rest is as in Record and Provisioned.
	Resolved        reference.Digests     `json:"resolved,omitempty"`
	Layers          []digest.Digest       `json:"layers,omitempty"`
	RequestedLayers []reference.Reference `json:"requestedLayers,omitempty"`
	Group           *Group                `json:"group,omitempty"`
	// Frozen are the frozen uppers, the topmost first. A snapshot of a volume that nothing was written to may have none, and so has one
	// that is in a registry.
	Frozen []Frozen `json:"frozen,omitempty"`
	// Push is the handle of a snapshot that is pushed to a registry, "" for one that stays on the node. Pushed is the digest of its
	// manifest, once the registry has it.
	Push   string        `json:"push,omitempty"`
	Pushed digest.Digest `json:"pushed,omitempty"`
}

// Snapshots has the records of the snapshots of a data root. Its methods may be called concurrently, except for Save and Remove of one
// snapshot.
type Snapshots struct{ dir string }

// Snapshots returns the records of the snapshots in the same data root.
func (s *Store) Snapshots() *Snapshots {
	return &Snapshots{filepath.Join(filepath.Dir(s.dir), dataroot.Snapshots)}
}

// Dir returns the directory of a snapshot.
func (s *Snapshots) Dir(id string) string { return filepath.Join(s.dir, id) }

// Load reads the record of a snapshot. It returns ErrNotFound if there is none, ErrDamaged if it cannot be used, and
// ErrFailedPrecondition if a driver of another version wrote it.
func (s *Snapshots) Load(id string) (*Snapshot, error) {
	path := filepath.Join(s.Dir(id), dataroot.SnapshotRecord)
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: snapshot %s does not exist on this node", errdefs.ErrNotFound, id)
	case err != nil:
		return nil, fmt.Errorf("read the record of snapshot %s: %w", id, err)
	}
	var snapshot Snapshot
	if err := json.Unmarshal(data, &snapshot); err != nil {
		return nil, fmt.Errorf("read the record of snapshot %s: %w: %s: %w", id, ErrDamaged, path, err)
	}
	if snapshot.Version != snapshotVersion || snapshot.ID != id {
		return nil, fmt.Errorf("%w: read the record of snapshot %s: %s has version %d and snapshot %q; this driver reads version %d",
			errdefs.ErrFailedPrecondition, id, path, snapshot.Version, snapshot.ID, snapshotVersion)
	}
	return &snapshot, nil
}

// Save writes the record of a snapshot. It is on the disk when Save returns.
func (s *Snapshots) Save(snapshot *Snapshot) error {
	if err := s.write(snapshot); err != nil {
		return fmt.Errorf("write the record of snapshot %s: %w", snapshot.ID, err)
	}
	return nil
}

func (s *Snapshots) write(snapshot *Snapshot) error {
	snapshot.Version = snapshotVersion
	data, err := json.Marshal(snapshot)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.Dir(snapshot.ID), 0o700); err != nil {
		return err
	}
	dir, err := linux.OpenDir(s.Dir(snapshot.ID))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := linux.WriteFileAtomic(dir, dataroot.SnapshotRecord, data, true); err != nil {
		return err
	}
	return errors.Join(linux.SyncDir(dir), s.Sync())
}

// SyncRecord writes to the disk that a snapshot has its record. Save of a process that was killed may not have come to that.
func (s *Snapshots) SyncRecord(id string) error {
	return errors.Join(linux.SyncPath(s.Dir(id)), s.Sync())
}

// Sync writes which snapshots there are to the disk.
func (s *Snapshots) Sync() error { return linux.SyncPath(s.dir) }

// List returns the IDs of all snapshots with a directory in order, also those without a record.
func (s *Snapshots) List() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	ids := make([]string, len(entries))
	for i, entry := range entries {
		ids[i] = entry.Name()
	}
	slices.Sort(ids)
	return ids, nil
}

// Unfinished returns the IDs of the snapshots that have a directory and no record, which a crash left before Save was done.
func (s *Snapshots) Unfinished() ([]string, error) {
	ids, err := s.List()
	return slices.DeleteFunc(ids, func(id string) bool {
		_, err := os.Lstat(filepath.Join(s.Dir(id), dataroot.SnapshotRecord))
		return !errors.Is(err, fs.ErrNotExist)
	}), err
}

// all returns all snapshots. It returns ErrFailedPrecondition while a record cannot be read.
func (s *Snapshots) all() ([]*Snapshot, error) {
	ids, err := s.List()
	if err != nil {
		return nil, err
	}
	var all []*Snapshot
	for _, id := range ids {
		snapshot, err := s.Load(id)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%w: the record of snapshot %s cannot be read; restore it, or delete %s: %w",
				errdefs.ErrFailedPrecondition, id, s.Dir(id), err)
		}
		all = append(all, snapshot)
	}
	return all, nil
}

// snapshotUser is how a snapshot is named among volumes. No volume has that ID.
func snapshotUser(id string) string { return dataroot.Snapshots + "/" + id }

// Remove removes a snapshot for good, by discard, which moves a directory to the trash. It returns nil if there is none. The frozen
// uppers stay.
func (s *Snapshots) Remove(id string, discard func(path string) error) error {
	if err := discard(s.Dir(id)); err != nil {
		return fmt.Errorf("remove snapshot %s: %w", id, err)
	}
	if err := s.Sync(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove snapshot %s: %w", id, err)
	}
	return nil
}
