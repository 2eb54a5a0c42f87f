package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Description is what there is to know of a volume on this node.
type Description struct {
	ID   string
	Spec spec.Spec
	// Inline: the volume lives as long as its pod.
	Inline bool `json:",omitempty"`
	// SizeBytes is the limit of each of its uppers, or what is only reported (sizeEnforcement: none), and Kept how it is kept.
	SizeBytes int64         `json:",omitempty"`
	Kept      upper.Backend `json:",omitempty"`
	// Pins are the images that the references to images and archives stand for, Layers their layers by diff ID.
	Pins         reference.Digests `json:",omitempty"`
	Layers       []digest.Digest   `json:",omitempty"`
	Publications []Publication
	// Conditions are what is wrong with it.
	Conditions []Condition `json:",omitempty"`
}

// Publication is one target of a volume. Data has the form of docker image inspect's GraphDriver.Data.
type Publication struct {
	Target  string
	Pod     kubelet.Pod
	Mounted bool
	Options string
	Data    map[string]string
}

// Describe describes a volume. It is of the kind NotFound where there is none.
func (m *Manager) Describe(ctx context.Context, id string) (Description, error) {
	if err := CheckID(id); err != nil {
		return Description{}, err
	}
	r, err := m.states.load(id)
	if err != nil {
		return Description{}, err
	}
	if r == nil {
		return Description{}, fmt.Errorf("%w: volume %s: there is none of that ID on this node", errdefs.ErrNotFound, id)
	}
	d := Description{ID: r.ID, Spec: r.Spec, Inline: r.Inline, SizeBytes: r.Size, Kept: r.Kept, Pins: r.Pins, Layers: r.Stored}
	for i := range r.Publications {
		p := &r.Publications[i]
		mounted, err := m.isLive(p)
		if err != nil {
			return Description{}, err
		}
		d.Publications = append(d.Publications, Publication{
			Target: p.Target, Pod: p.Pod, Mounted: mounted, Options: p.Attributes.String(), Data: m.graphDriverData(r, p),
		})
	}
	d.Conditions = m.health(ctx, r, "")
	return d, nil
}

// graphDriverData are the directories of a view.
func (m *Manager) graphDriverData(r *record, p *publication) map[string]string {
	data := map[string]string{"LowerDir": strings.Join(p.LowerDirs, ":"), "MergedDir": p.Target}
	if r.Spec.Upper != spec.UpperNone {
		data["UpperDir"], data["WorkDir"] = m.openUpper(r, p).Paths()
	}
	return data
}

// IDs are the IDs of all volumes on this node, in order.
func (m *Manager) IDs() ([]string, error) {
	ids, err := m.states.ids()
	slices.Sort(ids)
	return ids, err
}

// LayerUsers are the volumes that use each of the layers in the layer store.
func (m *Manager) LayerUsers() (map[digest.Digest][]string, error) {
	ids, err := m.IDs()
	if err != nil {
		return nil, err
	}
	users := map[digest.Digest][]string{}
	for _, id := range ids {
		r, err := m.states.load(id)
		if errors.Is(err, errTorn) {
			// Of an earlier boot, and mounted nowhere.
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("which layers volume %s uses is not known: %w", id, err)
		}
		if r == nil {
			continue
		}
		for _, layer := range r.Stored {
			if !slices.Contains(users[layer], id) {
				users[layer] = append(users[layer], id)
			}
		}
	}
	return users, nil
}
