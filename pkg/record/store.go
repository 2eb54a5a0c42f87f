package record

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

var (
	// ErrEmpty is returned for a record without content of an ephemeral volume, which is what a power cut leaves: Save does not
	// wait for the disk. ext4 then shows zeroes, from some byte to the end, if the name and the size had reached the disk, and the content
	// had not. Of a persistent volume it is ErrDamaged, and so is a record with zeroes in the middle.
	ErrEmpty = fmt.Errorf("%w: the record is empty", errdefs.ErrDataLoss)
	// ErrDamaged is returned for a record that is not what Save writes.
	ErrDamaged = fmt.Errorf("%w: the record is damaged", errdefs.ErrDataLoss)
)

// Store has the records of a data root. Its methods may be called concurrently, except for Save of one volume.
type Store struct {
	dir, kubeletDir string
	ballast         *dataroot.Ballast
}

// NewStore returns the records in a directory of volumes (dataroot.Root.VolumesDir). The views of the volumes are in kubelet's
// directory. On a full disk, the records of persistent volumes that exist are written with the ballast.
func NewStore(dir, kubeletDir string, ballast *dataroot.Ballast) *Store {
	return &Store{dir, kubeletDir, ballast}
}

// Dir returns the directory of a volume.
func (s *Store) Dir(id string) string { return filepath.Join(s.dir, id) }

// Load reads the record of a volume. It returns ErrNotFound if there is none, ErrEmpty or ErrDamaged if it cannot be
// used, and ErrFailedPrecondition if a driver of another version wrote it.
func (s *Store) Load(id string) (*Record, error) {
	path := filepath.Join(s.Dir(id), dataroot.Record)
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: volume %s does not exist on this node", errdefs.ErrNotFound, id)
	case errors.Is(err, syscall.EISDIR):
		return nil, fmt.Errorf("read the record of volume %s: %w: %w", id, ErrDamaged, err)
	case err != nil:
		return nil, fmt.Errorf("read the record of volume %s: %w", id, err)
	case lacksContent(data):
		return nil, fmt.Errorf("read the record of volume %s: %w: %s", id, s.emptyError(id), path)
	}
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("read the record of volume %s: %w: %s: %w", id, ErrDamaged, path, err)
	}
	if r.Version != version && r.Version != frozenVersion || r.ID != id {
		return nil, fmt.Errorf("%w: read the record of volume %s: %s has version %d and volume %q; this driver reads versions %d and %d",
			errdefs.ErrFailedPrecondition, id, path, r.Version, r.ID, version, frozenVersion)
	}
	return &r, nil
}

// lacksContent reports whether a record is empty, or ends with zeroes: what did not reach the disk. JSON has none.
func lacksContent(data []byte) bool {
	return len(data) == 0 || data[len(data)-1] == 0 && bytes.IndexByte(bytes.TrimRight(data, "\x00"), 0) < 0
}

// emptyError is the error for a record without content. It is ErrEmpty only if the volume is known not to be persistent.
func (s *Store) emptyError(id string) error {
	if s.IsEphemeral(id) {
		return ErrEmpty
	}
	return fmt.Errorf("%w: it is empty, or ends with zeroes", ErrDamaged)
}

// IsEphemeral reports whether a volume is known not to be persistent, also where its record is lost.
func (s *Store) IsEphemeral(id string) bool {
	_, err := os.Lstat(filepath.Join(s.Dir(id), dataroot.PersistentMark))
	return errors.Is(err, fs.ErrNotExist)
}

// Save writes a record in place of the one before, and makes the directory of the volume if it is missing. If the upper is
// persistent, the first record is on the disk when Save returns, and a power cut leaves a later one or the one before it.
func (s *Store) Save(r *Record) error {
	if err := s.write(r); err != nil {
		return fmt.Errorf("write the record of volume %s: %w", r.ID, err)
	}
	return nil
}

// SaveDurably is like Save, and no power cut brings back the record before.
func (s *Store) SaveDurably(r *Record) error {
	if err := s.Save(r); err != nil {
		return err
	}
	return linux.SyncPath(s.Dir(r.ID))
}

func (s *Store) write(r *Record) error {
	r.Version = version
	if len(r.AllFrozen()) > 0 {
		r.Version = frozenVersion
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := s.Dir(r.ID)
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	dir, err := linux.OpenDir(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	write, isFirst := linux.WriteFileAtomic, false
	if r.Spec.Persistent() {
		_, err := linux.Fstatat(dir, dataroot.Record)
		if isFirst = err != nil; !isFirst {
			// What is new may wait for room.
			write = s.ballast.ReplaceFile
		}
		if err := linux.Mknodat(dir, dataroot.PersistentMark, syscall.S_IFREG|0o600, 0); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := write(dir, dataroot.Record, data, r.Spec.Persistent()); err != nil {
		return err
	}
	if !isFirst {
		return nil
	}
	// The first record of a persistent volume: its name, that of the mark, and that of the directory, which may be of a process that was
	// killed before it came here.
	return errors.Join(linux.SyncDir(dir), s.Sync())
}

// SyncRecord writes to the disk that a volume has its record. Save of a process that was killed may not have come to that.
func (s *Store) SyncRecord(id string) error { return errors.Join(linux.SyncPath(s.Dir(id)), s.Sync()) }

// Sync writes which volumes there are to the disk.
func (s *Store) Sync() error { return linux.SyncPath(s.dir) }

// List returns the IDs of all volumes with a directory in order, also those without a record.
func (s *Store) List() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	ids := make([]string, len(entries))
	for i, entry := range entries {
		ids[i] = entry.Name()
	}
	return ids, nil
}
