package volume

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// Condition is a fault of a volume on this node, or of what all volumes of the node need.
type Condition struct {
	Severity Severity
	// Reason identifies the fault. Message says where it is and what to do.
	Reason, Message string
}

// Severity says how far a volume can be used.
type Severity string

// The severities (CSI spec, VolumeHealthErrorType).
const (
	Degraded     Severity = "Degraded"     // it can be used, with restrictions
	Inaccessible Severity = "Inaccessible" // it cannot be used
	Lost         Severity = "Lost"         // data is lost
)

// The reasons of conditions.
const (
	reasonRecordDamaged = "RecordDamaged"
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
	reasonRecordsDamaged   = "RecordsDamaged"
)

// findings collects conditions. Conditions with the same severity and reason become one, with all of their messages.
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

// verdict is the severity and reason of a condition.
type verdict struct {
	severity Severity
	reason   string
}

// verdicts say what the kinds of errors of a check mean.
type verdicts struct{ notFound, failedPrecondition, other verdict }

// What the checks of a volume and of its node mean.
var (
	mountedLayer = verdicts{
		notFound:           verdict{Degraded, reasonLayerMissing},
		failedPrecondition: verdict{Degraded, reasonLayerChanged},
		other:              verdict{Degraded, reasonLayerFails},
	}
	neededLayer = verdicts{
		notFound:           verdict{Inaccessible, reasonLayerMissing},
		failedPrecondition: verdict{Inaccessible, reasonLayerFails},
		other:              verdict{Inaccessible, reasonLayerFails},
	}
	mountedUpper = verdicts{
		notFound:           verdict{Lost, reasonUpperLost},
		failedPrecondition: verdict{Degraded, reasonUpperReadOnly},
		other:              verdict{Inaccessible, reasonUpperFails},
	}
	persistentUpper = verdicts{
		notFound:           verdict{Lost, reasonUpperLost},
		failedPrecondition: verdict{Inaccessible, reasonUpperFails},
		other:              verdict{Inaccessible, reasonUpperFails},
	}
	dataRootState = verdicts{
		notFound:           verdict{Inaccessible, reasonDataRootFails},
		failedPrecondition: verdict{Degraded, reasonDataRootReadOnly},
		other:              verdict{Inaccessible, reasonDataRootFails},
	}
)

// addError adds an error of a check. It adds nothing for nil.
func (f *findings) addError(err error, meaning verdicts) {
	v := meaning.other
	switch {
	case err == nil:
		return
	case errdefs.IsNotFound(err):
		v = meaning.notFound
	case errdefs.IsFailedPrecondition(err):
		v = meaning.failedPrecondition
	}
	f.add(v.severity, v.reason, err.Error())
}

// Health returns what is wrong with a volume on this node, and with its view at target, or with all of its views if target is "". It
// returns ErrNotFound if the volume is not on this node.
func (m *Manager) Health(ctx context.Context, id, target string) ([]Condition, error) {
	unlock, err := m.locks.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	r, err := m.records.Load(id)
	switch {
	case err == nil:
		return m.health(ctx, r, target), nil
	case !errdefs.IsNotFound(err):
		return []Condition{{Inaccessible, reasonRecordDamaged, err.Error()}}, nil
	}
	if dir := m.records.Dir(id); upper.ContainsUpper(dir) {
		message := fmt.Sprintf("%s contains an upper without its record; restore %s", dir, dataroot.Record)
		return []Condition{{Inaccessible, reasonRecordDamaged, message}}, nil
	}
	return nil, err
}

// health is Health for a loaded record. The caller need not hold the volume's lock; a view may then be about to be mounted or
// unmounted.
func (m *Manager) health(ctx context.Context, r *record.Record, target string) []Condition {
	var found findings
	mounted := false
	for i := range r.Publications {
		p := &r.Publications[i]
		if target != "" && p.Target != target {
			continue
		}
		live, err := m.views.isLive(p)
		if err != nil {
			found.add(Inaccessible, reasonNotMounted, err.Error())
			continue
		}
		if !live {
			found.add(Inaccessible, reasonNotMounted,
				fmt.Sprintf("nothing is mounted at %s; kubelet mounts it when it starts the pod again", p.Target))
			continue
		}
		mounted = true
		for i, fingerprint := range p.Fingerprints {
			found.addError(layer.CheckUnchanged(p.LowerDirs[i], fingerprint), mountedLayer)
		}
		if hasUpper(r) {
			addUpper(ctx, &found, m.uppers.open(r, p))
		}
	}
	if mounted {
		return found
	}
	// Report what the next publish would fail on.
	found.addError(m.config.Layers.CheckPresent(r.Spec.Layers), neededLayer)
	if r.Made {
		persistent := m.uppers.open(r, nil)
		if there, err := persistent.Exists(); err != nil || !there {
			found.addError(persistent.Check(), persistentUpper)
		}
	}
	return found
}

// addUpper adds what is wrong with the upper of a mounted view.
func addUpper(ctx context.Context, found *findings, used upper.Upper) {
	if err := used.Check(); err != nil {
		found.addError(err, mountedUpper)
		return
	}
	usage, err := used.Free(ctx)
	if err != nil {
		found.add(Inaccessible, reasonUpperFails, err.Error())
		return
	}
	if what := lacking(usage); what != "" {
		found.add(Degraded, reasonOutOfSpace, "the upper is full, "+what+"; expand the volume or delete files")
	}
}

// Below these thresholds an upper, or the data root, is reported full.
const (
	fewBytes  = 1 << 20
	fewInodes = 16
	fewShare  = 16
)

// lacking returns what is below the thresholds, "" if nothing is. A file system that does not count inodes reports 0 of them.
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

// StorageHealth returns what is wrong with what all volumes of this node need: the data root and the layer roots.
func (m *Manager) StorageHealth() []Condition {
	var found findings
	root := m.config.Root
	if err := upper.CheckWritable(root.VolumesDir()); err != nil {
		found.addError(err, dataRootState)
	} else {
		found.addRecords(m.records)
	}
	usage, err := linux.FileSystemUsageAt(root.Path())
	if err != nil {
		found.add(Inaccessible, reasonDataRootFails, err.Error())
	} else if what := lacking(usage); what != "" {
		found.add(Degraded, reasonDataRootFull, fmt.Sprintf("the file system of the data root %s is full, %s", root.Path(), what))
	}
	if err := m.config.Layers.CheckRoots(); err != nil {
		found.add(Degraded, reasonLayerRootMissing, err.Error())
	}
	return found
}

// maxNamed is how many volumes a message names.
const maxNamed = 10

// addRecords adds the records that cannot be used, of a data root that works.
func (f *findings) addRecords(records *record.Store) {
	ids, err := records.Unreadable()
	switch {
	case err != nil:
		f.addError(err, dataRootState)
	case len(ids) > 0:
		f.add(Degraded, reasonRecordsDamaged, fmt.Sprintf("the records of %d volumes are damaged or missing (%s); restore them, or the "+
			"layers that they use may be removed once they are not mounted",
			len(ids), strings.Join(ids[:min(len(ids), maxNamed)], ", ")))
	}
}
