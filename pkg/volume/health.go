package volume

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Condition is something that is wrong with a volume on this node, or with what all of the node's volumes need.
type Condition struct {
	Severity Severity
	// Reason is the same word for the same fault, Message says where it is and what to do.
	Reason, Message string
}

// Severity is how much of a volume can be used.
type Severity string

// The severities (CSI spec, VolumeHealthErrorType).
const (
	Degraded     Severity = "Degraded"     // it can be used, and is not as it should be
	Inaccessible Severity = "Inaccessible" // it cannot be used
	Lost         Severity = "Lost"         // something that was written is gone
)

// The reasons of conditions.
const (
	reasonStateDamaged  = "StateDamaged"
	reasonNotMounted    = "NotMounted"
	reasonUpperLost     = "UpperLost"
	reasonUpperReadOnly = "UpperReadOnly"
	reasonUpperFails    = "UpperFails"
	reasonOutOfSpace    = "OutOfSpace"
	reasonLayerMissing  = "LayerMissing"
	reasonLayerChanged  = "LayerChanged"
	reasonLayerFails    = "LayerFails"

	reasonDataRootReadOnly = "DataRootReadOnly"
	reasonDataRootFails    = "DataRootFails"
	reasonDataRootFull     = "DataRootFull"
	reasonLayerRootMissing = "LayerRootMissing"
)

// findings collects conditions. Of one reason there is one condition, which has the messages of all.
type findings []Condition

func (f *findings) add(severity Severity, reason, message string) {
	for i, found := range *f {
		if found.Severity != severity || found.Reason != reason {
			continue
		}
		if !strings.Contains(found.Message, message) {
			(*f)[i].Message += "; " + message
		}
		return
	}
	*f = append(*f, Condition{severity, reason, message})
}

// addError adds an error by its kind: gone, not as it should be, or anything else.
func (f *findings) addError(err error, gone, bad, other Condition) {
	condition := other
	switch {
	case err == nil:
		return
	case errdefs.IsNotFound(err):
		condition = gone
	case errdefs.IsFailedPrecondition(err):
		condition = bad
	}
	f.add(condition.Severity, condition.Reason, err.Error())
}

// Health tells what is wrong with a volume on this node, and with its view at target where that is not "": nothing where
// it is as it should be. It is of the kind NotFound where the volume is not here.
func (m *Manager) Health(ctx context.Context, id, target string) ([]Condition, error) {
	unlock, err := m.locks.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	r, err := m.states.load(id)
	if err != nil {
		return []Condition{{Inaccessible, reasonStateDamaged, err.Error()}}, nil
	}
	if r == nil {
		dir := m.states.volumeDir(id)
		if upper.ContainsUpper(dir) {
			return []Condition{{Inaccessible, reasonStateDamaged, fmt.Sprintf("%s holds an upper without its state: restore %s", dir, stateName)}}, nil
		}
		return nil, fmt.Errorf("%w: volume %s: there is none of that ID on this node", errdefs.ErrNotFound, id)
	}
	return m.health(ctx, r, target), nil
}

// health is as Health, of a record. Without the volume's lock it may tell of a view that is being mounted or unmounted.
func (m *Manager) health(ctx context.Context, r *record, target string) []Condition {
	var found findings
	mounted := false
	for i := range r.Publications {
		p := &r.Publications[i]
		if target != "" && p.Target != target {
			continue
		}
		live, err := m.isLive(p)
		if err != nil {
			found.add(Inaccessible, reasonNotMounted, err.Error())
			continue
		}
		if !live {
			found.add(Inaccessible, reasonNotMounted, fmt.Sprintf("nothing is mounted at %s: kubelet mounts it when it starts the pod again", p.Target))
			continue
		}
		mounted = true
		for i, mark := range p.LowerMarks {
			found.addError(layer.CheckUnchanged(p.LowerDirs[i], mark), Condition{Severity: Degraded, Reason: reasonLayerMissing},
				Condition{Severity: Degraded, Reason: reasonLayerChanged}, Condition{Severity: Degraded, Reason: reasonLayerFails})
		}
		if r.Spec.Upper != spec.UpperNone {
			m.upperHealth(ctx, &found, m.openUpper(r, p))
		}
	}
	if mounted {
		return found
	}
	// A pod that is to have it would meet these.
	found.addError(m.layers.CheckPresent(r.Spec.Layers), Condition{Severity: Inaccessible, Reason: reasonLayerMissing},
		Condition{Severity: Inaccessible, Reason: reasonLayerFails}, Condition{Severity: Inaccessible, Reason: reasonLayerFails})
	if r.Made {
		persistent := m.openUpper(r, nil)
		if there, err := persistent.Exists(); err != nil || !there {
			found.addError(persistent.Check(), Condition{Severity: Lost, Reason: reasonUpperLost},
				Condition{Severity: Inaccessible, Reason: reasonUpperFails}, Condition{Severity: Inaccessible, Reason: reasonUpperFails})
		}
	}
	return found
}

func (m *Manager) upperHealth(ctx context.Context, found *findings, used upper.Upper) {
	if err := used.Check(); err != nil {
		found.addError(err, Condition{Severity: Lost, Reason: reasonUpperLost},
			Condition{Severity: Degraded, Reason: reasonUpperReadOnly}, Condition{Severity: Inaccessible, Reason: reasonUpperFails})
		return
	}
	usage, err := used.Free(ctx)
	if err != nil {
		found.add(Inaccessible, reasonUpperFails, err.Error())
		return
	}
	if what := lacking(usage); what != "" {
		found.add(Degraded, reasonOutOfSpace, "the upper is full: "+what+": expand the volume or delete files")
	}
}

// Few is what is as good as nothing: writes of the usual size fail.
const (
	fewBytes  = 1 << 20
	fewInodes = 16
	fewShare  = 16
)

// lacking says of what next to nothing is left, "" where there is enough. A file system without inodes to count has none.
func lacking(usage upper.Usage) string {
	var lacks []string
	for _, amount := range []struct {
		linux.Space
		few  int64
		unit string
	}{{usage.Bytes, fewBytes, "bytes"}, {usage.Inodes, fewInodes, "inodes"}} {
		if amount.Total > 0 && amount.Available < min(amount.few, amount.Total/fewShare) {
			lacks = append(lacks, fmt.Sprintf("%d of %d %s are left", amount.Available, amount.Total, amount.unit))
		}
	}
	return strings.Join(lacks, ", ")
}

// StorageHealth tells what is wrong with what all volumes of this node need: the data root and the layer roots.
func (m *Manager) StorageHealth() []Condition {
	var found findings
	found.addError(upper.CheckWritable(filepath.Join(m.root.Path(), volumesName)), Condition{Severity: Inaccessible, Reason: reasonDataRootFails},
		Condition{Severity: Degraded, Reason: reasonDataRootReadOnly}, Condition{Severity: Inaccessible, Reason: reasonDataRootFails})
	usage, err := linux.FileSystemUsageAt(m.root.Path())
	if err != nil {
		found.add(Inaccessible, reasonDataRootFails, err.Error())
	} else if what := lacking(usage); what != "" {
		found.add(Degraded, reasonDataRootFull, fmt.Sprintf("the file system of the data root %s is full: %s", m.root.Path(), what))
	}
	if err := m.layers.CheckRoots(); err != nil {
		found.add(Degraded, reasonLayerRootMissing, err.Error())
	}
	return found
}
