package volume

import (
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// uppers opens the uppers of volumes.
type uppers struct {
	backends backends
	pods     pods
	root     string
	node     string
}

// open returns the upper of a publication. p may be nil if all publications of the volume share one upper. A volume with
// upper: none has no upper, and must not come here.
func (u uppers) open(r *record.Record, p *record.Publication) upper.Upper {
	return u.backends.Open(u.location(r, p))
}

// location says where the upper of a publication is.
func (u uppers) location(r *record.Record, p *record.Publication) upper.Location {
	if p == nil {
		p = &record.Publication{}
	}
	return upper.Location{
		Backend:   r.Backend,
		Base:      u.base(r, p.Target),
		Limit:     r.Limit(),
		Ephemeral: r.Spec.Ephemeral(),
		Made:      r.Made,
		PodVolume: p.PodVolume,
		PodDir:    u.podDir(p.Target),
		Holder:    upper.LockHolder{Node: u.node, BootID: p.BootID, VolumeID: r.ID, Target: p.Target},
		Layers:    r.Spec.LayerNames(),
	}
}

// base returns the base directory of an upper, beneath the data root.
func (u uppers) base(r *record.Record, target string) string {
	if r.Spec.Ephemeral() && !r.Inline {
		return u.podBase(r.ID, target)
	}
	return u.volumeBase(r.ID)
}

// volumeBase is the base directory of the upper of a volume, and podBase that of the upper of one pod.
func (uppers) volumeBase(id string) string { return filepath.Join(dataroot.Volumes, id) }

func (u uppers) podBase(id, target string) string {
	return filepath.Join(u.volumeBase(id), dataroot.PodUppers, u.podKey(target))
}

// path returns the path of the base directory of an upper.
func (u uppers) path(r *record.Record, target string) string {
	return filepath.Join(u.root, u.base(r, target))
}

// podKey names the directory of one pod's upper: the UID of the pod, or a digest of the target if that does not have it.
func (u uppers) podKey(target string) string {
	if uid := u.pods.PodUID(target); uid != "" {
		return uid
	}
	sum := sha256.Sum256([]byte(target))
	return hex.EncodeToString(sum[:16])
}

// podDir returns kubelet's directory of the pod that a target belongs to, "" if the target does not have it.
func (u uppers) podDir(target string) string {
	uid := u.pods.PodUID(target)
	if uid == "" {
		return ""
	}
	before, _, _ := strings.Cut(target, "/"+uid+"/")
	return before + "/" + uid
}

// hasUpper reports whether views of a volume have an upper.
func hasUpper(r *record.Record) bool { return r.Spec.Upper != spec.UpperNone }

// sharesUpper reports whether all publications of a volume share one upper.
func sharesUpper(r *record.Record) bool { return r.Spec.Persistent() }

// podVolumePath returns the path of the upper in another volume of the pod.
func podVolumePath(ref reference.Reference) string {
	if ref.Path() == "" {
		return upper.DefaultPath
	}
	return ref.Path()
}

// UpperInUse returns a function that reports whether the holder of an upper in another volume still has its publication in
// these records, and where its upper is.
func UpperInUse(records *record.Store) func(upper.LockHolder) (at upper.PodVolumePath, inUse bool) {
	return func(holder upper.LockHolder) (at upper.PodVolumePath, inUse bool) {
		if record.CheckID(holder.VolumeID) != nil {
			return at, false
		}
		r, err := records.Load(holder.VolumeID)
		if err != nil {
			// The publication may be in what cannot be read.
			return at, !errdefs.IsNotFound(err)
		}
		p := r.Publication(holder.Target)
		// A view without such an upper is named only by a pod that falsifies its lock file.
		if p == nil || p.PodVolume == at {
			return at, false
		}
		return p.PodVolume, true
	}
}
