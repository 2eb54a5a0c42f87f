package volume

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/rebase"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/volume/portable"
)

// CreateRequest asks for a volume for a claim.
type CreateRequest struct {
	// Name identifies the volume in repeated requests.
	Name string
	Spec spec.Spec
	// ClaimLayers returns the layers that the claim names, and is nil if they are in Spec. It is called once: later changes of
	// the claim's annotation do not change the volume. A claim that is made from a source may name none: they are the source's.
	ClaimLayers func(ctx context.Context) ([]reference.Reference, error)
	// Resolved are the layers with digests for tags, if a central controller has resolved them, and nil if this node is to do it. A
	// volume that exists keeps those that it was created with.
	Resolved []reference.Reference
	// Access is the widest of the requested access modes.
	Access spec.AccessMode
	// Secrets have the credentials for registries.
	Secrets map[string]string
	// Namespace is the namespace of the claim, or "" if the request does not name it.
	Namespace string
	// Required and Limit bound the capacity in bytes. Zero is no bound.
	Required, Limit int64
	// Source is what the volume begins with. The zero value is an empty upper. OnConflict is what becomes of what both the source and
	// other layers than the source's have changed.
	Source     Source
	OnConflict rebase.Policy
}

// Volume is a provisioned volume.
type Volume struct {
	ID       string
	Capacity int64
	Spec     spec.Spec
	// Rebased says how it came from the layers of its source to other ones, nil if it did not.
	Rebased *rebase.Report
	// OnThisNode is set if the volume has a persistent upper on this node, and cannot be used on another one.
	OnThisNode bool
}

// Create creates a volume. It returns the same volume for a repeated request, and ErrAlreadyExists if the name is that of another
// volume.
//
// A volume without a persistent upper has no record before it is published: the claim carries its spec, and because it has no
// topology, the provisioner of any node may be the one that deletes it.
func (m *Manager) Create(ctx context.Context, req CreateRequest) (Volume, error) {
	id := HandleFor(req.Name)
	unlock, err := m.locks.Acquire(ctx, id)
	if err != nil {
		return Volume{}, err
	}
	defer unlock()
	r, err := m.records.Load(id)
	switch {
	case err == nil:
		if err := checkCreated(r, req); err != nil {
			return Volume{}, err
		}
		return toVolume(r), m.records.SyncRecord(id)
	case !errdefs.IsNotFound(err):
		return Volume{}, err
	}
	// A crash can have left a directory without a record, and then it has no upper.
	if err := m.unrecorded.checkNoUppers(id); err != nil {
		return Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	switch {
	case portable.IsHandle(req.Source.Snapshot):
		return m.restorePortable(ctx, id, req)
	case req.Source != (Source{}):
		return m.clone(ctx, id, req)
	}
	requested, err := m.resolveRequested(ctx, &req)
	if err != nil {
		return Volume{}, err
	}
	if !req.Spec.Persistent() {
		return Volume{ID: id, Capacity: max(req.Spec.Size, req.Required), Spec: req.Spec}, nil
	}
	return m.provision(ctx, &record.Record{
		ID: id, Spec: req.Spec, Size: req.Spec.Size,
		Provisioned: &record.Provisioned{Name: req.Name, Access: req.Access, RequestedLayers: requested},
	})
}

// provision makes a volume with a persistent upper.
func (m *Manager) provision(ctx context.Context, r *record.Record) (Volume, error) {
	err := m.config.Layers.CheckPresent(ctx, r.Spec.Layers)
	if err != nil {
		return Volume{}, err
	}
	if r.Backend, err = m.ledger.choose(r); err != nil {
		return Volume{}, fmt.Errorf("create volume %s: %w", r.Provisioned.Name, err)
	}
	if err := m.ledger.reserve(ctx, r); err != nil {
		return Volume{}, errors.Join(err, m.ledger.discard(r.ID))
	}
	klog.FromContext(ctx).Info("Volume created", keyVolume, r.ID, keyBytes, r.Size, keyBackend, r.Backend)
	return toVolume(r), nil
}

// clone makes a volume that begins with what its source has: the frozen uppers and the layers of that.
func (m *Manager) clone(ctx context.Context, id string, req CreateRequest) (Volume, error) {
	if err := checkSource(req.Source, id); err != nil {
		return Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	requested, err := m.requestedLayers(ctx, req)
	if err != nil {
		return Volume{}, err
	}
	onto, differs, err := m.openNewLayers(ctx, req, requested)
	if err != nil {
		return Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	defer onto.close()
	m.listing.RLock()
	unlist := sync.OnceFunc(m.listing.RUnlock)
	defer unlist()
	original, err := m.original(ctx, &req)
	if err != nil {
		return Volume{}, fmt.Errorf("create volume %s: %w", req.Name, err)
	}
	var report *rebase.Report
	if differs {
		if report, err = m.rebase(ctx, original, onto, req.OnConflict); err != nil {
			err = fmt.Errorf("create volume %s: rebase: %w", req.Name, err)
		}
	}
	var made Volume
	if err == nil {
		made, err = m.provisionFrom(ctx, id, req, original, report)
	}
	if err != nil || report != nil {
		// A source in use was copied, and the next request copies it again. What was merged is in a record, or is not needed.
		unlist()
		m.sweepAfter(ctx)
	}
	return made, err
}

// provisionFrom makes a volume that begins with what its source consists of.
func (m *Manager) provisionFrom(
	ctx context.Context, id string, req CreateRequest, original *record.Snapshot, report *rebase.Report,
) (Volume, error) {
	req.Spec.Layers = original.Spec.Layers
	// What is asked for is not less. If nothing is, it is the size of the source.
	if req.Spec.Size = max(req.Spec.Size, original.Size); req.Spec.Size == 0 {
		req.Spec.Size = req.Limit
	}
	if err := req.Spec.CheckSized(); err != nil {
		return Volume{}, err
	}
	r := &record.Record{
		ID: id, Spec: req.Spec, Size: req.Spec.Size, Frozen: original.Frozen, Resolved: original.Resolved, Layers: original.Layers,
		Provisioned: &record.Provisioned{
			Name: req.Name, Access: req.Access, RequestedLayers: original.RequestedLayers, Source: &req.Source, Rebased: report,
		},
	}
	if original.Group != nil {
		// Its upper, which is to be made, is stored with the group that pods see.
		r.Group = newGroup(original.Group.ID)
	}
	return m.provision(ctx, r)
}

// requestedLayers returns the layers of a request as they were requested.
func (m *Manager) requestedLayers(ctx context.Context, req CreateRequest) (requested []reference.Reference, err error) {
	requested = req.Spec.Layers
	if req.ClaimLayers != nil {
		if requested, err = req.ClaimLayers(ctx); err != nil {
			return nil, err
		}
	}
	return requested, m.config.Layers.Check(requested)
}

// resolveRequested replaces the tags in the layers of a request by digests. It returns the layers as requested, nil if that changed
// nothing.
func (m *Manager) resolveRequested(ctx context.Context, req *CreateRequest) (requested []reference.Reference, err error) {
	if requested, err = m.requestedLayers(ctx, *req); err != nil {
		return nil, err
	}
	if req.Resolved == nil {
		if req.Resolved, err = m.config.Layers.ResolveTags(ctx, requested, req.Secrets, req.Namespace); err != nil {
			return nil, err
		}
	}
	req.Spec.Layers = req.Resolved
	if slices.Equal(requested, req.Spec.Layers) {
		return nil, nil
	}
	klog.FromContext(ctx).Info("Layers resolved", keyLayers, req.Spec.LayerNames())
	return requested, nil
}

// Delete deletes a volume and its upper. It returns nil if there is none, ErrFailedPrecondition if the volume is mounted, and
// ErrUnavailable while a container still has a view that was unmounted. A volume that was deleted does not come back after a power cut:
// nobody would ask again.
func (m *Manager) Delete(ctx context.Context, id string) error {
	unlock, err := m.locks.Acquire(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := m.records.Load(id)
	if errdefs.IsNotFound(err) {
		// A process that was killed may have deleted it.
		return m.records.Sync()
	}
	if err != nil {
		return err
	}
	live, err := m.views.firstLive(r, "")
	if err == nil {
		return fmt.Errorf("%w: volume %s is published at %s; unpublish it first", errdefs.ErrFailedPrecondition, id, live.Target)
	}
	if !errdefs.IsNotFound(err) {
		return err
	}
	if err := m.uppers.releaseAll(ctx, r); err != nil {
		return err
	}
	// An undo that failed, or a crash in it, leaves uppers that are in no publication. An upper that was about to be frozen is either here
	// or among the frozen ones.
	err = m.unrecorded.discard(ctx, id)
	if errors.Is(err, overlay.ErrUpperInUse) {
		// No view is mounted. The volume's own error would ask for its record, which is there.
		return fmt.Errorf("%w: %w of volume %s; a container that had the volume may still be running, try again later",
			errdefs.ErrUnavailable, overlay.ErrUpperInUse, id)
	}
	if err != nil {
		return err
	}
	if err := m.records.Sync(); err != nil {
		return err
	}
	if len(r.Frozen) > 0 {
		m.sweepAfter(ctx)
	}
	return nil
}

// releaseAll releases all uppers of a volume.
func (u uppers) releaseAll(ctx context.Context, r *record.Record) error {
	if sharesUpper(r) && r.Backend != "" {
		return u.open(r, nil).Release(ctx)
	}
	if sharesUpper(r) || !hasUpper(r) {
		return nil
	}
	for i := range r.Publications {
		if err := u.open(r, &r.Publications[i]).Release(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Get returns a volume with a persistent upper on this node. It returns ErrNotFound if there is none.
func (m *Manager) Get(id string) (Volume, error) {
	r, err := m.records.Load(id)
	if err != nil {
		return Volume{}, err
	}
	if !r.Spec.Persistent() {
		return Volume{}, fmt.Errorf("%w: volume %s has no persistent upper on this node", errdefs.ErrNotFound, id)
	}
	return toVolume(r), nil
}

// List returns the volumes with a persistent upper on this node whose IDs follow after, by ID, and at most limit of them if that is
// positive. more reports whether there are others.
func (m *Manager) List(after string, limit int) (volumes []Volume, more bool, err error) {
	ids, err := m.IDs()
	if err != nil {
		return nil, false, err
	}
	for _, id := range ids {
		if id <= after {
			continue
		}
		r, err := m.records.Load(id)
		if err != nil || !r.Spec.Persistent() {
			// A record that cannot be read must not hide the others: reconcile reports it.
			continue
		}
		if limit > 0 && len(volumes) == limit {
			return volumes, true, nil
		}
		volumes = append(volumes, toVolume(r))
	}
	return volumes, false, nil
}

func toVolume(r *record.Record) Volume {
	v := Volume{ID: r.ID, Capacity: r.Size, Spec: r.Spec, OnThisNode: true}
	if r.Provisioned != nil {
		v.Rebased = r.Provisioned.Rebased
	}
	return v
}

// checkCreated returns nil if an earlier request like this one created the volume.
func checkCreated(r *record.Record, req CreateRequest) error {
	created := r.Provisioned
	if req.ClaimLayers != nil || created == nil || slices.Equal(req.Spec.Layers, created.RequestedLayers) ||
		created.Source != nil && reference.AreResolved(req.Spec.Layers, r.Spec.Layers) {
		req.Spec.Layers = r.Spec.Layers
	}
	// The size is compared below: the volume may have been expanded.
	req.Spec.Size = r.Spec.Size
	switch {
	case created == nil || created.Name != req.Name:
		return fmt.Errorf("%w: another volume has the ID %s of volume %q", errdefs.ErrAlreadyExists, r.ID, req.Name)
	case !madeOf(created, req.Source):
		return fmt.Errorf("%w: volume %q exists with another source", errdefs.ErrAlreadyExists, req.Name)
	case !r.Spec.Equal(req.Spec) || created.Access != req.Access:
		return fmt.Errorf("%w: volume %q exists with other layers, another upper policy or another access mode",
			errdefs.ErrAlreadyExists, req.Name)
	case created.Rebased != nil && req.ClaimLayers == nil && created.Rebased.Policy != req.OnConflict:
		return fmt.Errorf("%w: volume %q exists with onConflict: %s", errdefs.ErrAlreadyExists, req.Name, created.Rebased.Policy)
	case req.Limit > 0 && r.Size == 0 && r.Spec.ManagesUpper():
		return fmt.Errorf("%w: volume %q exists without a size", errdefs.ErrAlreadyExists, req.Name)
	case r.Size < req.Required || (req.Limit > 0 && r.Size > req.Limit):
		return fmt.Errorf("%w: volume %q exists with %d bytes", errdefs.ErrAlreadyExists, req.Name, r.Size)
	}
	return nil
}

// madeOf reports whether a volume was made of a source.
func madeOf(created *record.Provisioned, source Source) bool {
	if created.Source == nil {
		return source == (Source{})
	}
	return *created.Source == source
}

// HandleFor returns the handle of the volume with a name: the name if it can be a handle, as the provisioner's names can.
func HandleFor(name string) string {
	if record.CheckID(name) == nil {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return "sha256-" + hex.EncodeToString(sum[:])
}
