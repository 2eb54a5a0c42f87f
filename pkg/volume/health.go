package volume

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
	"github.com/overlay-csi/overlay-csi/pkg/volume/lock"
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
	reasonDoesNotAnswer = "DoesNotAnswer"

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
	case errors.Is(err, layer.ErrDoesNotAnswer):
		v = verdict{Inaccessible, reasonDoesNotAnswer}
	case errdefs.IsNotFound(err):
		v = meaning.notFound
	case errdefs.IsFailedPrecondition(err):
		v = meaning.failedPrecondition
	}
	f.add(v.severity, v.reason, err.Error())
}

// Health returns what is wrong with a volume on this node, and with its view at target, or with all of its views if target is "". It
// returns ErrNotFound if the volume is not on this node. It does not wait for an operation on the volume, or for longer than checkWait.
func (m *Manager) Health(ctx context.Context, id, target string) ([]Condition, error) {
	r, err := m.checker.load(id)
	switch {
	case err == nil:
		return m.checker.check(ctx, r, target)
	case !errdefs.IsNotFound(err):
		return []Condition{{Inaccessible, reasonRecordDamaged, err.Error()}}, nil
	}
	return nil, err
}

// checker finds out what is wrong with volumes. It holds no lock while it asks a file system, which may never answer.
type checker struct {
	records *record.Store
	views   views
	uppers  uppers
	layers  layers
	locks   *lock.Locks

	mu sync.Mutex
	// running are the checks in progress. There is one at a time for a volume at a target, so that a file system that does not
	// answer holds few threads, however often it is asked.
	running map[string]*healthCheck
}

// healthCheck is a check in progress.
type healthCheck struct {
	began time.Time
	// asking is what must answer now.
	asking atomic.Pointer[string]
	done   chan struct{}
	// found may be read after done is closed.
	found findings
}

// checkWait is the maximum time that a check may take before its answer is that there is none. The check goes on.
const checkWait = 5 * time.Second

// load returns the record of a volume. It returns ErrNotFound if the volume is not on this node.
func (c *checker) load(id string) (*record.Record, error) {
	unlock, isIdle := c.locks.TryAcquire(id)
	if isIdle {
		defer unlock()
	}
	r, err := c.records.Load(id)
	if dir := c.records.Dir(id); isIdle && errdefs.IsNotFound(err) && upper.ContainsUpper(dir) {
		return nil, fmt.Errorf("%w: %s contains an upper without its record; restore %s", errdefs.ErrDataLoss, dir, dataroot.Record)
	}
	return r, err
}

// run runs a check, or waits for the one with the same key. If there is no answer within checkWait of its begin, that is what it finds.
func (c *checker) run(ctx context.Context, key string, do func(ctx context.Context, current *healthCheck)) ([]Condition, error) {
	current := c.begin(ctx, key, do)
	timer := time.NewTimer(time.Until(current.began.Add(checkWait)))
	defer timer.Stop()
	select {
	case <-current.done:
		return current.found, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for %s: %w", *current.asking.Load(), context.Cause(ctx))
	case <-timer.C:
	}
	message := fmt.Sprintf("%s does not answer since %s; find out whether its disk or server is there",
		*current.asking.Load(), current.began.UTC().Format(time.RFC3339))
	return []Condition{{Inaccessible, reasonDoesNotAnswer, message}}, nil
}

// begin returns the check in progress, or a new one.
func (c *checker) begin(ctx context.Context, key string, do func(ctx context.Context, current *healthCheck)) *healthCheck {
	c.mu.Lock()
	defer c.mu.Unlock()
	if current, ok := c.running[key]; ok {
		return current
	}
	current := &healthCheck{began: time.Now(), done: make(chan struct{})}
	current.asks("the data root")
	if c.running == nil {
		c.running = map[string]*healthCheck{}
	}
	c.running[key] = current
	ctx = context.WithoutCancel(ctx)
	go func() {
		do(ctx, current)
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.running, key)
		close(current.done)
	}()
	return current
}

// asks says what must answer next.
func (c *healthCheck) asks(what string) { c.asking.Store(&what) }

// check checks a volume whose record is loaded. The caller need not hold the volume's lock.
func (c *checker) check(ctx context.Context, r *record.Record, target string) ([]Condition, error) {
	return c.run(ctx, r.ID+"\n"+target, func(ctx context.Context, current *healthCheck) {
		mounted := false
		for i := range r.Publications {
			if p := &r.Publications[i]; target == "" || p.Target == target {
				mounted = c.checkView(ctx, current, r, p) || mounted
			}
		}
		if !mounted {
			c.checkNextPublish(ctx, current, r)
		}
	})
}

// checkView checks a view, and returns whether it is mounted.
func (c *checker) checkView(ctx context.Context, current *healthCheck, r *record.Record, p *record.Publication) (mounted bool) {
	current.asks("the view at " + p.Target)
	live, err := c.views.isLive(p)
	switch {
	case err != nil:
		current.found.add(Inaccessible, reasonNotMounted, err.Error())
		return false
	case live:
		found := c.checkMounted(ctx, current, r, p)
		if live, err := c.views.isLive(p); err == nil && !live {
			// The operation that has unmounted it meanwhile has released its upper.
			return false
		}
		for _, f := range found {
			current.found.add(f.Severity, f.Reason, f.Message)
		}
		return true
	case !c.isExpected(r.ID, p.Target):
		return false
	}
	// A publish may have ended since.
	if live, err := c.views.isLive(p); err == nil && live {
		return true
	}
	current.found.add(Inaccessible, reasonNotMounted,
		fmt.Sprintf("nothing is mounted at %s; kubelet mounts it when it starts the pod again", p.Target))
	return false
}

// checkMounted returns what is wrong with a view that is mounted.
func (c *checker) checkMounted(ctx context.Context, current *healthCheck, r *record.Record, p *record.Publication) (found findings) {
	for i, fingerprint := range p.Fingerprints {
		current.asks("layer " + p.LowerDirs[i])
		found.addError(layer.CheckUnchanged(p.LowerDirs[i], fingerprint), mountedLayer)
	}
	for _, frozen := range r.Frozen {
		current.asks("a frozen upper of " + p.Target)
		found.addError(c.uppers.backends.CheckFrozen(frozen.Backend, frozen.ID), mountedUpper)
	}
	if hasUpper(r) {
		current.asks("the upper of " + p.Target)
		addUpper(ctx, &found, c.uppers.open(r, p))
	}
	return found
}

// isExpected reports whether a view must be mounted that is in the record: an operation in progress may be about to mount or unmount
// it, and one that has ended since the record was loaded may have unmounted it.
func (c *checker) isExpected(id, target string) bool {
	if c.locks.IsHeld(id) {
		return false
	}
	r, err := c.records.Load(id)
	return err != nil || r.Publication(target) != nil
}

// checkNextPublish finds what the next publish would fail on.
func (c *checker) checkNextPublish(ctx context.Context, current *healthCheck, r *record.Record) {
	current.asks("a layer")
	current.found.addError(c.layers.CheckPresent(ctx, r.Spec.Layers), neededLayer)
	for _, frozen := range r.Frozen {
		current.asks("a frozen upper")
		current.found.addError(c.uppers.backends.CheckFrozen(frozen.Backend, frozen.ID), persistentUpper)
	}
	if r.Made {
		current.asks("the upper")
		persistent := c.uppers.open(r, nil)
		if there, err := persistent.Exists(); err != nil || !there {
			current.found.addError(persistent.Check(), persistentUpper)
		}
	}
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

// StorageHealth returns what is wrong with what all volumes of this node need: the data root and the layer roots. As Health, it waits
// at most for checkWait.
func (m *Manager) StorageHealth(ctx context.Context) ([]Condition, error) {
	return m.checker.run(ctx, "", func(ctx context.Context, current *healthCheck) {
		root := m.config.Root
		if err := upper.CheckWritable(root.VolumesDir()); err != nil {
			current.found.addError(err, dataRootState)
		} else {
			current.found.addRecords(m.records)
		}
		usage, err := linux.FileSystemUsageAt(root.Path())
		if err != nil {
			current.found.add(Inaccessible, reasonDataRootFails, err.Error())
		} else if what := lacking(usage); what != "" {
			current.found.add(Degraded, reasonDataRootFull, fmt.Sprintf("the file system of the data root %s is full, %s", root.Path(), what))
		}
		if missing, wanted := m.config.Ballast.Missing(); missing > 0 {
			current.found.add(Degraded, reasonDataRootFull, fmt.Sprintf("%d of the %d files that are set aside in %s for a full disk are "+
				"used or could not be made; free disk space", missing, wanted, root.Path()))
		}
		current.asks("a layer root")
		for _, err := range m.config.Layers.CheckRoots(ctx) {
			reason := reasonLayerRootMissing
			if errors.Is(err, layer.ErrDoesNotAnswer) {
				reason = reasonDoesNotAnswer
			}
			current.found.add(Degraded, reason, err.Error())
		}
	})
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
		f.add(Degraded, reasonRecordsDamaged, fmt.Sprintf("the records of %d volumes and snapshots are damaged or missing (%s); restore "+
			"them, or the layers that they use may be removed once they are not mounted; until then, no frozen upper is deleted",
			len(ids), strings.Join(ids[:min(len(ids), maxNamed)], ", ")))
	}
}
