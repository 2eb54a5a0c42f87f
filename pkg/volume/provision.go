package volume

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
)

// CreateRequest asks for a volume that pods will name by a claim.
type CreateRequest struct {
	// Name is the same for every try to create the one volume.
	Name string
	Spec spec.Spec
	// ClaimLayers reads the layers that the claim names, and is nil where they are in Spec. It is asked once: the
	// volume keeps its layers whatever becomes of the claim's annotation.
	ClaimLayers func(ctx context.Context) ([]reference.Reference, error)
	// Access is the widest of the modes that the volume is to have.
	Access spec.AccessMode
	// Secrets have the credentials for registries.
	Secrets map[string]string
	// Required and Limit bound the capacity in bytes. Zero is no bound.
	Required, Limit int64
}

// Volume is a provisioned volume as others see it.
type Volume struct {
	ID       string
	Capacity int64
	Spec     spec.Spec
	// OnThisNode says that the volume's upper is kept here, and the volume can be used nowhere else.
	OnThisNode bool
}

// Create makes a volume, and answers with the same one when it is asked again. It is of the kind AlreadyExists where the
// name stands for another volume.
//
// Of a volume that keeps nothing on this node nothing is written down: what it is made of travels with the claim, and
// with no topology every node's provisioner may be the one to delete it.
func (m *Manager) Create(ctx context.Context, req CreateRequest) (Volume, error) {
	id := volumeID(req.Name)
	unlock, err := m.locks.acquire(ctx, id)
	if err != nil {
		return Volume{}, err
	}
	defer unlock()
	r, err := m.states.load(id)
	if err != nil {
		return Volume{}, err
	}
	if r != nil {
		return r.volume(), r.matches(req)
	}
	if req.ClaimLayers != nil {
		if req.Spec.Layers, err = req.ClaimLayers(ctx); err != nil {
			return Volume{}, err
		}
	}
	if err := m.layers.Check(req.Spec.Layers); err != nil {
		return Volume{}, err
	}
	asked := req.Spec.Layers
	if req.Spec.Layers, err = m.layers.ResolveTags(ctx, asked, req.Secrets); err != nil {
		return Volume{}, err
	}
	if slices.Equal(asked, req.Spec.Layers) {
		asked = nil
	} else {
		klog.FromContext(ctx).Info("Layers are pinned", "layers", req.Spec.LayerNames())
	}
	if req.Spec.Upper != spec.UpperClaim {
		return Volume{ID: id, Capacity: max(req.Spec.Size, req.Required), Spec: req.Spec}, nil
	}
	if err := m.layers.CheckPresent(req.Spec.Layers); err != nil {
		return Volume{}, err
	}
	r = &record{ID: id, Spec: req.Spec, Size: req.Spec.Size, Provisioned: &provisioned{Name: req.Name, Access: req.Access, Asked: asked}}
	if r.Kept, err = m.chooseKind(r); err != nil {
		return Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	if err := m.promise(ctx, r, r.Size); err != nil {
		return Volume{}, errors.Join(err, m.trash.put(m.states.volumeDir(id)))
	}
	klog.FromContext(ctx).Info("Made a volume", "volume", id, "bytes", r.Size, "kept", r.Kept)
	return r.volume(), nil
}

// Delete removes a volume and its upper. A volume that is not there is deleted already; one that is mounted is in use
// (FailedPrecondition).
func (m *Manager) Delete(ctx context.Context, id string) error {
	unlock, err := m.locks.acquire(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := m.states.load(id)
	if err != nil || r == nil {
		return err
	}
	for i := range r.Publications {
		p := &r.Publications[i]
		live, err := m.isLive(p)
		if err != nil {
			return err
		}
		if live {
			return fmt.Errorf("%w: volume %s is published at %s: it can be deleted when it is unpublished", errdefs.ErrFailedPrecondition, id, p.Target)
		}
		if r.Spec.Upper != spec.UpperNone && !r.sharesUpper() {
			if err := m.openUpper(r, p).Release(ctx); err != nil {
				return err
			}
		}
	}
	if r.sharesUpper() && r.Kept != "" {
		if err := m.openUpper(r, nil).Release(ctx); err != nil {
			return err
		}
	}
	return m.trash.put(m.states.volumeDir(id))
}

// Get returns a volume whose upper is kept on this node. It is of the kind NotFound where there is none.
func (m *Manager) Get(id string) (Volume, error) {
	r, err := m.states.load(id)
	if err != nil {
		return Volume{}, err
	}
	if r == nil || !r.keepsUpper() {
		return Volume{}, fmt.Errorf("%w: volume %s: there is none of that ID on this node", errdefs.ErrNotFound, id)
	}
	return r.volume(), nil
}

// List returns the volumes whose upper is kept on this node, by ID, from the first after `after`, at most limit of
// them (0: all). more says that there are others behind them.
func (m *Manager) List(after string, limit int) (volumes []Volume, more bool, err error) {
	ids, err := m.states.ids()
	if err != nil {
		return nil, false, err
	}
	slices.Sort(ids)
	for _, id := range ids {
		if id <= after {
			continue
		}
		r, err := m.states.load(id)
		if err != nil || r == nil || !r.keepsUpper() {
			// One volume that cannot be read must not hide the others: reconcile reports it.
			continue
		}
		if limit > 0 && len(volumes) == limit {
			return volumes, true, nil
		}
		volumes = append(volumes, r.volume())
	}
	return volumes, false, nil
}

func (r *record) volume() Volume {
	return Volume{ID: r.ID, Capacity: r.Size, Spec: r.Spec, OnThisNode: true}
}

// matches reports whether a request that came before made this record.
func (r *record) matches(req CreateRequest) error {
	made := r.Provisioned
	if req.ClaimLayers != nil || made == nil || slices.Equal(req.Spec.Layers, made.Asked) {
		req.Spec.Layers = r.Spec.Layers
	}
	// A size is compared with what was asked for now, as it may have grown since.
	req.Spec.Size = r.Spec.Size
	switch {
	case made == nil || made.Name != req.Name:
		return fmt.Errorf("%w: the ID %s of volume %q is taken by another volume", errdefs.ErrAlreadyExists, r.ID, req.Name)
	case !r.Spec.Equal(req.Spec) || made.Access != req.Access:
		return fmt.Errorf("%w: volume %q exists with other layers, another upper policy or another access mode", errdefs.ErrAlreadyExists, req.Name)
	case r.Size < req.Required || (req.Limit > 0 && r.Size > req.Limit):
		return fmt.Errorf("%w: volume %q exists with %d bytes", errdefs.ErrAlreadyExists, req.Name, r.Size)
	}
	return nil
}

// volumeID is the handle of the volume of that name: the name, where that can be a handle, as the provisioner's can.
func volumeID(name string) string {
	if CheckID(name) == nil {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return "sha256-" + hex.EncodeToString(sum[:])
}
