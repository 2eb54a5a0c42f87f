package volume

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/record"
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
