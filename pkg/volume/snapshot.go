package volume

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/volume/lock"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
)

// snapshots makes snapshots and clones of volumes. Both are lists of frozen uppers in records: nothing is copied, except of volumes that
// pods write to.
type snapshots struct {
	node    string
	root    dataRoot
	volumes *record.Store
	records *record.Snapshots
	uppers  uppers
	views   views
	ledger  *ledger
	locks   *lock.Locks
	// portable are the snapshots in registries. send pushes one, and has its record say so.
	portable Portable
	send     func(ctx context.Context, id string, secrets map[string]string) error
	// listing is held for reading from before a frozen upper exists, or is taken over from another record, until the record that lists it
	// is saved. The sweep of those that no record lists holds it for writing. What takes long pins its frozen uppers instead.
	listing sync.RWMutex
	pins    *lock.Pins
	// copies are the snapshots whose volumes are being copied file by file.
	copies singleflight.Group
}

// SnapshotRequest asks for a snapshot of a volume.
type SnapshotRequest struct {
	// Name identifies the snapshot in repeated requests.
	Name string
	// Volume is the ID of the volume.
	Volume string
	// CopyInUse has a volume that is mounted be copied file by file, where its backend has no way to copy it at one moment.
	CopyInUse bool
	// Push is the handle of a snapshot that is pushed to a registry. It is zero for one that stays on this node.
	Push portable.Handle
	// Secrets have the logins for registries.
	Secrets map[string]string
}

// recordID returns the ID of the snapshot's record.
func (r SnapshotRequest) recordID() string {
	if r.Push.IsZero() {
		return HandleFor(r.Name)
	}
	return r.Push.RecordID()
}

// Snapshot is a snapshot on this node.
type Snapshot struct {
	ID, Volume string
	// Size is the least size in bytes of a volume that is made of it, 0 if it may have none.
	Size    int64
	Created time.Time
	// Ready is set if volumes can be made of it.
	Ready bool
	// OnThisNode is set if it is on this node, and in no registry.
	OnThisNode bool
}

// CreateSnapshot keeps what was written to a volume until now. It returns the same snapshot for a repeated request, and
// ErrAlreadyExists if the name is that of a snapshot of another volume. A volume that is mounted is copied at one moment, where its
// backend can do that: else the error is ErrFailedPrecondition, or with CopyInUse it is copied file by file. That may take long: it goes
// on when ctx is done, and a repeated request waits for it.
//
// A snapshot that is to be in a registry is not ready at first. Each repeated request has its push go on, and returns the error of the last
// one.
func (s *snapshots) CreateSnapshot(ctx context.Context, req SnapshotRequest) (Snapshot, error) {
	if !req.CopyInUse {
		return s.createSnapshot(ctx, req)
	}
	done := s.copies.DoChan(req.recordID()+"/"+req.Volume, func() (any, error) { return s.createSnapshot(context.WithoutCancel(ctx), req) })
	select {
	case <-ctx.Done():
		return Snapshot{}, fmt.Errorf("copy volume %s, which goes on: %w", req.Volume, context.Cause(ctx))
	case result := <-done:
		made, _ := result.Val.(Snapshot)
		return made, result.Err
	}
}

func (s *snapshots) createSnapshot(ctx context.Context, req SnapshotRequest) (Snapshot, error) {
	id := req.recordID()
	if !req.Push.IsZero() {
		// Before anything is kept that cannot be pushed.
		if err := portable.CheckSecrets(req.Secrets); err != nil {
			return Snapshot{}, err
		}
	}
	if err := record.CheckID(req.Volume); err != nil {
		return Snapshot{}, err
	}
	unlock, err := s.locks.Acquire(ctx, snapshotLock(id))
	if err != nil {
		return Snapshot{}, err
	}
	defer unlock()
	made, err := s.records.Load(id)
	switch {
	case err == nil && (made.Name != req.Name || made.Volume != req.Volume):
		return Snapshot{}, fmt.Errorf("%w: snapshot %s is of volume %s", errdefs.ErrAlreadyExists, id, made.Volume)
	case err == nil && made.Push != req.Push.String():
		return Snapshot{}, fmt.Errorf("%w: snapshot %s is not pushed to the same repository, but is %q",
			errdefs.ErrAlreadyExists, req.Name, made.Push)
	case err == nil:
		return toSnapshot(made), errors.Join(s.records.SyncRecord(id), s.continuePush(made, req.Secrets))
	case !errdefs.IsNotFound(err):
		return Snapshot{}, err
	}
	var copied copiedUpper
	if req.CopyInUse {
		if copied, err = s.copyFiles(ctx, req.Volume); err != nil {
			return Snapshot{}, fmt.Errorf("make snapshot %s: %w", id, err)
		}
	}
	unlockVolume, err := s.locks.Acquire(ctx, req.Volume)
	if err == nil {
		defer unlockVolume()
		made, err = s.create(ctx, id, req, copied)
	}
	if copied.ID != "" {
		copied.unpin()
	}
	if err != nil {
		// The next request copies it again. Of a record that was saved all the same, the sweep knows.
		if copied.ID != "" {
			s.sweepAfter(ctx)
		}
		return Snapshot{}, fmt.Errorf("make snapshot %s: %w", id, err)
	}
	klog.FromContext(ctx).Info("Snapshot created", keySnapshot, id, keyVolume, req.Volume)
	return toSnapshot(made), s.continuePush(made, req.Secrets)
}

// create makes a snapshot of a volume, with the copy of its upper if that was made before.
func (s *snapshots) create(ctx context.Context, id string, req SnapshotRequest, copied copiedUpper) (*record.Snapshot, error) {
	r, err := s.volumes.Load(req.Volume)
	if err != nil {
		return nil, err
	}
	if !r.Spec.Persistent() {
		return nil, fmt.Errorf("%w: volume %s has upper %q: only one with upper claim can have snapshots",
			errdefs.ErrInvalidArgument, r.ID, r.Spec.Upper)
	}
	s.listing.RLock()
	defer s.listing.RUnlock()
	var frozen []record.Frozen
	switch {
	case copied.ID == "":
		frozen, err = s.capture(ctx, r)
	case !reflect.DeepEqual(copied.below, r.Frozen) || !reflect.DeepEqual(copied.Group, r.Group):
		err = lock.ErrRevoked
	default:
		frozen = slices.Concat([]record.Frozen{copied.Frozen}, r.Frozen)
	}
	if err != nil {
		return nil, err
	}
	made := &record.Snapshot{
		ID: id, Name: req.Name, Volume: r.ID, Created: time.Now().UTC(), Size: r.Size, Spec: r.Spec, Resolved: r.Resolved, Layers: r.Layers,
		Group: r.Group, Frozen: frozen, Push: req.Push.String(),
	}
	if r.Provisioned != nil {
		made.RequestedLayers = r.Provisioned.RequestedLayers
	}
	// After an error the disk may have the record: the sweep knows.
	return made, s.records.Save(made)
}

// copiedUpper is a copy of the upper of a volume, and what that was above. No record lists it, and it is kept until unpin is called.
type copiedUpper struct {
	record.Frozen
	below []record.Frozen
	unpin func()
}

// copyFiles copies the upper of a volume that is mounted file by file. It returns one without an ID for a volume that can be captured at
// one moment. Another operation that wants the volume, as an unpublish does, ends the copy, with ErrAborted: no pod waits for it.
func (s *snapshots) copyFiles(ctx context.Context, id string) (copied copiedUpper, err error) {
	unlock, err := s.locks.Acquire(ctx, id)
	if err != nil {
		return copied, err
	}
	unlock = sync.OnceFunc(unlock)
	defer unlock()
	r, err := s.volumes.Load(id)
	if err != nil || !r.Spec.Persistent() || r.Backend == "" || r.Backend.HasMoments() {
		return copied, err
	}
	if err := s.finishFreezing(r); err != nil {
		return copied, err
	}
	if _, err = s.views.firstLive(r, ""); errdefs.IsNotFound(err) {
		return copied, nil // It is at rest.
	}
	if err == nil {
		err = checkRoom(r)
	}
	if err != nil {
		return copied, err
	}
	ctx, end := s.locks.AddReader(ctx, id)
	defer end()
	unlock()
	at := s.uppers.location(r, nil)
	bytes, inodes, err := s.uppers.backends.MeasureInUse(ctx, at)
	if err != nil {
		return copied, err
	}
	release, err := s.ledger.reserveFrozen(ctx, bytes)
	if err != nil {
		return copied, fmt.Errorf("copy volume %s: %w", id, err)
	}
	defer release()
	copied = copiedUpper{Frozen: frozenOf(r), below: r.Frozen}
	copied.unpin = s.pins.Pin(copied.ID)
	if err := s.uppers.backends.CopyFiles(ctx, at, copied.ID, bytes, inodes); err != nil {
		defer copied.unpin()
		return copiedUpper{}, errors.Join(err, s.uppers.backends.DiscardFrozen(copied.ID))
	}
	return copied, nil
}

// snapshotLock is the name of the lock of a snapshot. No volume has that ID.
func snapshotLock(id string) string { return "snapshot/" + id }

// DeleteSnapshot deletes a snapshot. It returns nil if there is none. Volumes that were made of it stay as they are. One that is in a
// registry is deleted there with the secrets, also if this node has no record of it.
func (s *snapshots) DeleteSnapshot(ctx context.Context, id string, secrets map[string]string) error {
	if portable.IsHandle(id) {
		return s.deletePortable(ctx, id, secrets)
	}
	if record.CheckID(id) != nil {
		return nil // No snapshot has that ID.
	}
	return s.deleteRecord(ctx, id, func(made *record.Snapshot) (bool, error) { return made == nil || made.Push == "", nil })
}

// deleteRecord deletes the record of a snapshot if before, which gets the record if it can be read, returns true.
func (s *snapshots) deleteRecord(ctx context.Context, id string, before func(made *record.Snapshot) (bool, error)) error {
	unlock, err := s.locks.Acquire(ctx, snapshotLock(id))
	if err != nil {
		return err
	}
	defer unlock()
	made, err := s.records.Load(id)
	if err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, record.ErrDamaged) {
		return err
	}
	if remove, failed := before(made); failed != nil || !remove {
		return failed
	}
	if errdefs.IsNotFound(err) {
		// A process that was killed may have deleted it.
		return s.records.Remove(id, s.root.Discard)
	}
	if err := s.records.Remove(id, s.root.Discard); err != nil {
		return err
	}
	klog.FromContext(ctx).Info("Snapshot deleted", keySnapshot, id)
	s.sweepAfter(ctx)
	return nil
}

// sweepAfter sweeps after a record was removed. What fails is done by the next reconciliation.
func (s *snapshots) sweepAfter(ctx context.Context) {
	if err := s.sweep(context.WithoutCancel(ctx)); err != nil {
		klog.FromContext(ctx).Error(err, "Could not discard frozen uppers, will retry")
	}
}

// GetSnapshot returns a snapshot. It returns ErrNotFound if there is none. One in a registry that this node has no record of is looked up
// there with the secrets.
func (s *snapshots) GetSnapshot(ctx context.Context, id string, secrets map[string]string) (Snapshot, error) {
	if portable.IsHandle(id) {
		return s.getPortable(ctx, id, secrets)
	}
	if err := record.CheckID(id); err != nil {
		return Snapshot{}, fmt.Errorf("%w: snapshot %q does not exist on this node", errdefs.ErrNotFound, id)
	}
	made, err := s.loadLocal(id)
	if err != nil {
		return Snapshot{}, err
	}
	return toSnapshot(made), nil
}

// loadLocal loads the record of a snapshot on this node. That of one which is in a registry has another handle.
func (s *snapshots) loadLocal(id string) (*record.Snapshot, error) {
	made, err := s.records.Load(id)
	if err == nil && made.Push != "" {
		return nil, fmt.Errorf("%w: snapshot %s does not exist on this node, but %s", errdefs.ErrNotFound, id, made.Push)
	}
	return made, err
}

// ListSnapshots returns the snapshots on this node that follow the one with the ID after, and at most limit of them if that is positive.
// With a volume, it returns those of that volume. more reports whether there are others.
func (s *snapshots) ListSnapshots(after string, limit int, volume string) (found []Snapshot, more bool, err error) {
	ids, err := s.records.List()
	if err != nil {
		return nil, false, err
	}
	if h, err := portable.Parse(after); err == nil {
		after = h.RecordID()
	}
	for _, id := range ids {
		if id <= after {
			continue
		}
		made, err := s.records.Load(id)
		if err != nil || volume != "" && made.Volume != volume {
			// A record that cannot be read must not hide the others: StorageHealth reports it.
			continue
		}
		if limit > 0 && len(found) == limit {
			return found, true, nil
		}
		found = append(found, toSnapshot(made))
	}
	return found, false, nil
}

func toSnapshot(made *record.Snapshot) Snapshot {
	s := Snapshot{ID: made.ID, Volume: made.Volume, Size: made.Size, Created: made.Created, Ready: true, OnThisNode: true}
	if made.Push != "" {
		s.ID, s.Ready, s.OnThisNode = made.Push, made.Pushed != "", false
	}
	return s
}

// Source is what a volume is cloned from: a snapshot or a volume on this node. Exactly one is set.
type Source = record.Source

// checkSource returns ErrInvalidArgument or ErrNotFound for a source that the volume with an ID cannot have.
func checkSource(source Source, id string) error {
	switch {
	case (source.Snapshot == "") == (source.Volume == ""):
		return fmt.Errorf("%w: a volume has a snapshot or a volume for its source", errdefs.ErrInvalidArgument)
	case source.Volume == id || record.CheckID(source.Volume+source.Snapshot) != nil:
		// A volume that is being made is none yet.
		return fmt.Errorf("%w: the source %q does not exist on this node", errdefs.ErrNotFound, source.Volume+source.Snapshot)
	}
	return nil
}

// original is what a source consists of. The caller holds s.listing for reading until the record of the new volume is saved. The source
// volume's lock is held while its upper is frozen.
func (s *snapshots) original(ctx context.Context, req *CreateRequest) (*record.Snapshot, error) {
	if id := req.Source.Snapshot; id != "" {
		made, err := s.loadLocal(id)
		if err != nil {
			return nil, err
		}
		return made, checkClone(made, req)
	}
	unlock, err := s.locks.Acquire(ctx, req.Source.Volume)
	if err != nil {
		return nil, err
	}
	defer unlock()
	r, err := s.volumes.Load(req.Source.Volume)
	if err != nil {
		return nil, err
	}
	made := &record.Snapshot{Volume: r.ID, Size: r.Size, Spec: r.Spec}
	if r.Provisioned != nil {
		made.RequestedLayers = r.Provisioned.RequestedLayers
	}
	// Before the volume is frozen for a clone that cannot be made.
	if err := checkClone(made, req); err != nil {
		return nil, err
	}
	if made.Frozen, err = s.capture(ctx, r); err != nil {
		return nil, err
	}
	made.Resolved, made.Layers, made.Group = r.Resolved, r.Layers, r.Group
	return made, nil
}

// checkClone checks a request for a volume against its source.
func checkClone(made *record.Snapshot, req *CreateRequest) error {
	source := req.Source.Snapshot + req.Source.Volume
	switch {
	case !made.Spec.Persistent() || !req.Spec.Persistent():
		return fmt.Errorf("%w: a volume with upper %q cannot be made of %s, whose upper is %q: both must be claim",
			errdefs.ErrInvalidArgument, req.Spec.Upper, source, made.Spec.Upper)
	case made.Spec.Ownership != req.Spec.Ownership || !same(made.Spec.LayerOwner, req.Spec.LayerOwner):
		return fmt.Errorf("%w: the volume is to have another ownership or layerOwner than its source %s; request the same ones",
			errdefs.ErrInvalidArgument, source)
	case req.Spec.Size > 0 && req.Spec.Size < made.Size, req.Limit > 0 && req.Limit < made.Size:
		return fmt.Errorf("%w: the source %s has %d bytes, and the volume must not have less", errdefs.ErrOutOfRange, source, made.Size)
	}
	return nil
}
