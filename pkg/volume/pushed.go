package volume

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/diff"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
)

// Portable are the snapshots in registries.
type Portable struct {
	Registry *portable.Registry
	Pushes   *portable.Pushes
	// MaxLayerBytes is how large a layer may be that is pushed, 0 for any size: nodes would unpack no larger one.
	MaxLayerBytes int64
}

// continuePush has a snapshot pushed that is to be in a registry, and is not. It returns the error of the last push, as ErrUnavailable
// whatever it is: the snapshot is on this node, and is pushed again. After an error that is final external-snapshotter may let go of a
// snapshot without having it deleted. The secrets are never on the disk, so that nothing is pushed before it is asked for again.
func (s *snapshots) continuePush(made *record.Snapshot, secrets map[string]string) error {
	if made.Push == "" || made.Pushed != "" {
		return nil
	}
	id := made.ID
	err := s.portable.Pushes.Continue(id, func(ctx context.Context) error { return s.send(ctx, id, secrets) })
	if err != nil {
		return fmt.Errorf("%w: snapshot %s was taken, its push failed, and is tried again: %s", errdefs.ErrUnavailable, made.Name, err.Error())
	}
	return nil
}

// DeleteUnpushed deletes what this node has of a snapshot that is or was to be in a registry, and ends its push. It returns nil if it has
// nothing. What is in the registry stays.
func (s *snapshots) DeleteUnpushed(ctx context.Context, id string) error {
	h, err := portable.Parse(id)
	if err != nil || h.RecordID() == "" {
		return err
	}
	return s.deletePushed(ctx, h, func(digest.Digest) error { return nil })
}

// deletePortable deletes a snapshot in a registry, and then what this node has of it.
func (s *snapshots) deletePortable(ctx context.Context, id string, secrets map[string]string) error {
	h, err := portable.Parse(id)
	if err != nil {
		return err
	}
	remove := func(pushed digest.Digest) error { return s.portable.Registry.Delete(ctx, h, pushed, secrets) }
	if h.RecordID() == "" {
		return remove("")
	}
	return s.deletePushed(ctx, h, remove)
}

// deletePushed deletes the record of a snapshot that is pushed, after remove has deleted its image. remove gets the digest of that, "" if
// it is not known.
func (s *snapshots) deletePushed(ctx context.Context, h portable.Handle, remove func(digest.Digest) error) error {
	return s.deleteRecord(ctx, h.RecordID(), func(made *record.Snapshot) (bool, error) {
		if made != nil && made.Push != h.String() {
			// That of a snapshot in another repository stays.
			return false, remove("")
		}
		s.portable.Pushes.Stop(h.RecordID())
		if made == nil {
			return true, remove("")
		}
		return true, remove(made.Pushed)
	})
}

func (s *snapshots) getPortable(ctx context.Context, id string, secrets map[string]string) (Snapshot, error) {
	h, err := portable.Parse(id)
	if err != nil {
		return Snapshot{}, err
	}
	if h.RecordID() != "" {
		made, err := s.records.Load(h.RecordID())
		if err == nil && made.Push == id {
			return toSnapshot(made), nil
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return Snapshot{}, err
		}
	}
	image, err := s.portable.Registry.Get(ctx, h, secrets)
	return Snapshot{ID: id, Volume: image.Volume, Size: image.Size, Created: image.Created, Ready: true}, err
}

// sendSnapshot pushes a snapshot to its registry. Then its record has the digest, and no frozen uppers: the registry has what they have. It
// returns nil if there is no such snapshot any more.
func (m *Manager) sendSnapshot(ctx context.Context, id string, secrets map[string]string) error {
	made, changes, err := m.openSnapshot(ctx, id)
	if errors.Is(err, errNothingToPush) {
		return nil
	}
	if err != nil {
		return err
	}
	handle, err := portable.Parse(made.Push)
	if err != nil {
		changes.Close()
		return err
	}
	requested := made.RequestedLayers
	if requested == nil {
		requested = made.Spec.Layers
	}
	pushed, err := m.portable.Registry.Push(ctx, portable.Snapshot{
		Handle: handle, Name: made.Name, Volume: made.Volume, Size: made.Size, Created: made.Created,
		Layers: made.Spec.Layers, Requested: requested, Resolved: made.Resolved,
		WriteTar: func(ctx context.Context, to io.Writer) error {
			if len(made.Frozen) == 0 {
				return portable.EmptyTar(ctx, to)
			}
			return diff.WriteLayer(ctx, changes.Tree, to)
		},
	}, secrets)
	changes.Close()
	if err != nil {
		return err
	}
	unlock, err := m.locks.Acquire(ctx, snapshotLock(id))
	if err != nil {
		return err
	}
	defer unlock()
	// It may have been flattened.
	if made, err = m.snapshots.records.Load(id); err != nil {
		return err
	}
	made.Pushed, made.Frozen, made.Layers = pushed, nil, nil
	if err := m.snapshots.records.Save(made); err != nil {
		return err
	}
	m.sweepAfter(ctx)
	return nil
}

// openSnapshot opens what a snapshot has that is to be pushed. Until the changes are closed, no frozen upper is discarded.
func (m *Manager) openSnapshot(ctx context.Context, id string) (*record.Snapshot, *Changes, error) {
	unlock, err := m.locks.Acquire(ctx, snapshotLock(id))
	if err != nil {
		return nil, nil, err
	}
	defer unlock()
	made, err := m.snapshots.records.Load(id)
	if errdefs.IsNotFound(err) || err == nil && made.Pushed != "" {
		return nil, nil, errNothingToPush
	}
	if err != nil {
		return nil, nil, err
	}
	m.listing.RLock()
	defer m.listing.RUnlock()
	c := &Changes{ctx: ctx, Tree: diff.Tree{MaxBytes: m.portable.MaxLayerBytes}}
	c.onClose(m.pins.Pin(idsOf(made.Frozen)...))
	if len(made.Frozen) == 0 {
		return made, c, nil
	}
	r := &record.Record{
		ID: made.Volume, Spec: made.Spec, Size: made.Size, Resolved: made.Resolved, Layers: made.Layers, Group: made.Group, Frozen: made.Frozen,
	}
	if err := m.openFrozenChanges(c, r, nil); err != nil {
		c.Close()
		return nil, nil, fmt.Errorf("open snapshot %s: %w", id, err)
	}
	return made, c, nil
}

// errNothingToPush is the error of openSnapshot for a snapshot that was deleted, or is in its registry.
var errNothingToPush = errors.New("the snapshot is gone, or was pushed")

// restorePortable makes a volume that begins with a snapshot in a registry. It is a new volume, whose layers are the image of the snapshot
// and what belongs below that. A central controller has found these already.
func (m *Manager) restorePortable(ctx context.Context, id string, req CreateRequest) (Volume, error) {
	requested, err := m.requestedLayers(ctx, req)
	if err != nil {
		return Volume{}, err
	}
	if req.Resolved == nil {
		if requested, err = m.readPortable(ctx, &req, requested); err != nil {
			return Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
		}
	}
	req.Spec.Layers = req.Resolved
	if err := errors.Join(m.config.Layers.Check(req.Spec.Layers), req.Spec.CheckSized()); err != nil {
		return Volume{}, err
	}
	return m.provision(ctx, &record.Record{
		ID: id, Spec: req.Spec, Size: req.Spec.Size,
		Provisioned: &record.Provisioned{Name: req.Name, Access: req.Access, RequestedLayers: requested, Source: &req.Source},
	})
}

// readPortable sets the layers and the size of a volume that is made from a snapshot in a registry. It returns the layers that were
// requested, those of the snapshot's claim if none were.
func (m *Manager) readPortable(
	ctx context.Context, req *CreateRequest, requested []reference.Reference,
) ([]reference.Reference, error) {
	h, err := portable.Parse(req.Source.Snapshot)
	if err != nil {
		return nil, err
	}
	image, err := m.portable.Registry.Read(ctx, h, req.Secrets, req.Namespace)
	if err != nil {
		return nil, err
	}
	if req.Resolved, err = image.LayersFor(requested); err != nil {
		return nil, err
	}
	if req.Spec.Size, err = image.SizeFor(req.Spec.Size, req.Limit); err != nil {
		return nil, err
	}
	if len(requested) == 0 {
		return image.Requested(), nil
	}
	return requested, nil
}
