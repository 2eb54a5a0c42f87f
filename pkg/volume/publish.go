package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"k8s.io/klog/v2"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/layer"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// PublishRequest asks for a view of a volume at a target path.
type PublishRequest struct {
	VolumeID string
	Target   string
	Spec     spec.Spec
	Inline   bool
	// Provisioned is set if CreateVolume created the volume: a persistent upper must then be on this node.
	Provisioned bool
	Access      spec.AccessMode
	Attributes  overlay.Attributes
	Pod         kubelet.Pod
	// Group is the pod's fsGroup, nil if it has none.
	Group *uint32
	// Secrets have the credentials for registries.
	Secrets map[string]string
}

// Publish mounts a volume at a target. It returns nil at once if the volume is mounted there as requested, and
// ErrAlreadyExists if it is mounted otherwise. If a step fails, or if ctx ends before the mount, Publish undoes what it did.
// What a crash leaves is in the record, where the next Publish, Unpublish or reconciliation finds it.
func (m *Manager) Publish(ctx context.Context, req PublishRequest) error {
	unlock, err := m.locks.Acquire(ctx, req.VolumeID)
	if err != nil {
		return err
	}
	defer unlock()
	p := &publishing{m: m, req: req}
	defer p.close()
	if err := p.run(ctx, p.steps()); err != nil {
		return fmt.Errorf("publish volume %s: %w", req.VolumeID, err)
	}
	return nil
}

// publishing is one publish: what its steps know, each from the ones before it.
type publishing struct {
	m   *Manager
	req PublishRequest

	// done is set if the volume is mounted as requested.
	done bool
	// before is the record before the publish, nil if there was none. after is the one that the publish makes, and publication
	// its part for the target.
	before, after *record.Record
	publication   *record.Publication
	layers        *layer.ResolvedLayers
	target        *os.File
	madeTarget    bool
	// shared is the root of a mounted view of the same upper, nil if there is none.
	shared *os.File
	// frozen are the volume's frozen uppers, the topmost first.
	frozen []*os.File
	// listing is set while frozen uppers that no record lists are kept from being swept.
	listing bool
	// madeBase is set if the directory of the pod's upper is new.
	madeBase bool
	// upper is nil if the view has none, or shares a view that has one. prepared is set while it is in use.
	upper    upper.Upper
	dirs     upper.Dirs
	prepared bool
	// view is the view before it is at the target, nil if it is mounted there at once.
	view    *os.File
	mounted bool
}

// step is a part of a publish. undo runs if do, or a later step, fails. It has to handle a do that failed half-way.
type step struct {
	name string
	do   func(ctx context.Context) error
	undo func(ctx context.Context) error
	// again is set if do may be called again after it has failed for want of disk space.
	again bool
}

// steps returns the steps of a publish in their order, which stands here and nowhere else. The record is saved before
// anything that it describes exists, and the mount comes after everything that can be refused.
func (p *publishing) steps() []step {
	return []step{
		{name: "load the record", do: p.loadRecord},
		{name: "check for conflicts", do: p.checkConflicts},
		{name: "resolve the layers", do: p.resolveLayers},
		{name: "open the target", do: p.openTarget, undo: p.removeTarget, again: true},
		{name: "create the record", do: p.newRecord},
		{name: "discard a stale upper", do: p.discardStaleUpper},
		{name: "find the caches", do: p.findCaches},
		{name: "save the record", do: p.saveRecord, undo: p.restoreRecord},
		{name: "open a view to share", do: p.openShared},
		{name: "open the frozen uppers", do: p.openFrozen},
		{name: "make the directory of the pod's upper", do: p.makeBase, undo: p.discardBase},
		{name: "prepare the upper", do: p.prepareUpper, undo: p.releaseUpper},
		{name: "record that the upper exists", do: p.saveMade},
		{name: "check that the upper is free", do: p.checkUpperFree},
		{name: "set the group", do: p.setGroup, again: true},
		{name: "change owners", do: p.changeOwners, undo: p.closeView, again: true},
		{name: "mount the view", do: p.mount, undo: p.unmount, again: true},
	}
}

// run runs steps until one fails or the publish is done, and undoes them if one failed, the last one first. An error of an
// undo is returned too: kubelet then unpublishes, which goes by the record.
func (p *publishing) run(ctx context.Context, steps []step) error {
	for i, s := range steps {
		err := p.do(ctx, s)
		if err != nil {
			return errors.Join(err, undo(context.WithoutCancel(ctx), steps[:i+1]))
		}
		if p.done {
			return nil
		}
	}
	return nil
}

// do does a step. A persistent volume that the node has is published on a full disk too: the ballast is for that. What is new may wait
// for room.
func (p *publishing) do(ctx context.Context, s step) error {
	if !s.again || p.before == nil || !p.before.Spec.Persistent() {
		return s.do(ctx)
	}
	return p.m.config.Ballast.With(func() error { return s.do(ctx) })
}

func undo(ctx context.Context, steps []step) error {
	var failed error
	for _, s := range slices.Backward(steps) {
		if s.undo == nil {
			continue
		}
		if err := s.undo(ctx); err != nil {
			klog.FromContext(ctx).Error(err, "Could not undo a step of a failed publish", keyStep, s.name)
			failed = errors.Join(failed, fmt.Errorf("undo %q: %w", s.name, err))
		}
	}
	return failed
}

// close closes what the steps opened.
func (p *publishing) close() {
	p.unlist()
	p.closeDirs()
	closeAll(p.frozen)
	for _, file := range []*os.File{p.target, p.shared} {
		if file != nil {
			file.Close()
		}
	}
	if p.layers != nil {
		p.layers.Close()
	}
}

func (p *publishing) closeDirs() {
	if p.dirs.Upper != nil {
		p.dirs.Close()
		p.dirs = upper.Dirs{}
	}
}
