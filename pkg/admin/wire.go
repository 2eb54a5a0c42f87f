package admin

import (
	"encoding/json"
	"fmt"

	"github.com/overlay-csi/overlay-csi/pkg/admin/api"
	"github.com/overlay-csi/overlay-csi/pkg/store"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
)

func wireLayer(l store.LayerStatus, volumes []string) api.Layer {
	return api.Layer{
		DiffID: l.DiffID, Digest: l.Digest, FileName: l.FileName, Bytes: l.Bytes, Entries: l.Entries,
		Created: l.Created, LastUsed: l.LastUsed, Volumes: volumes,
	}
}

func wireImage(i store.Image) api.Image {
	image := api.Image{
		Digest: i.Digest, Manifest: i.Manifest, Platform: i.Platform, Names: i.Names, Layers: []api.ImageLayer{}, Pulled: i.Pulled,
	}
	for _, l := range i.Layers {
		image.Layers = append(image.Layers, api.ImageLayer{
			DiffID: l.DiffID, Digest: l.Digest, MediaType: l.MediaType, Size: l.Size, FileName: l.FileName,
		})
	}
	return image
}

func wireSnapshot(s volume.SnapshotDescription) api.Snapshot {
	wire := api.Snapshot{
		ID: s.ID, Volume: s.Volume, SizeBytes: s.Size, Created: s.Created, State: api.SnapshotReady, Volumes: s.Volumes,
	}
	switch {
	case s.IsDamaged:
		wire.State = api.SnapshotDamaged
	case !s.Ready:
		wire.State = api.SnapshotPending
	}
	return wire
}

func wireProgress(p store.Progress) *api.Progress {
	progress := &api.Progress{Image: p.Image, Layers: []api.LayerProgress{}}
	for _, l := range p.Layers {
		progress.Layers = append(progress.Layers, api.LayerProgress{
			Digest: l.Digest, FileName: l.FileName, Size: l.Size, Done: l.Done, Present: l.Present,
		})
	}
	return progress
}

func wireVolume(d volume.Description) (api.Volume, error) {
	spec, err := json.Marshal(d.Spec)
	if err != nil {
		return api.Volume{}, fmt.Errorf("encode the specification of volume %s: %w", d.ID, err)
	}
	v := api.Volume{
		ID: d.ID, Spec: spec, Inline: d.Inline, SizeBytes: d.SizeBytes, Backend: string(d.Backend), Resolved: d.Resolved, Layers: d.Layers,
		Frozen: d.Frozen, Publications: []api.Publication{},
	}
	for _, p := range d.Publications {
		v.Publications = append(v.Publications, api.Publication{
			Target: p.Target, Pod: api.Pod(p.Pod), Mounted: p.Mounted, Options: p.Options,
			Data: api.GraphDriverData{
				LowerDir: p.Data["LowerDir"], UpperDir: p.Data["UpperDir"], WorkDir: p.Data["WorkDir"], MergedDir: p.Data["MergedDir"],
			},
		})
	}
	for _, c := range d.Conditions {
		v.Conditions = append(v.Conditions, api.Condition{Severity: string(c.Severity), Reason: c.Reason, Message: c.Message})
	}
	return v, nil
}
