package overlaynode

import (
	"context"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
)

// GoneNodes knows which nodes are gone for good.
type GoneNodes struct {
	// Dispatcher has the objects of the nodes.
	Dispatcher *Dispatcher
	// Exists reports whether there is a Node of that name.
	Exists func(ctx context.Context, name string) (bool, error)
	// Grace is how long a Node must have been gone.
	Grace time.Duration
	// KeepBytes is how many bytes the requests may take that are kept for nodes that are gone, if they come back.
	KeepBytes int
}

// Check reports whether a node is gone for good. When it first sees that there is no such Node, it notes the time in the object.
func (g *GoneNodes) Check(ctx context.Context, object *OverlayNode) (bool, error) {
	exists, err := g.Exists(ctx, object.Spec.Node)
	since := object.goneSince()
	switch {
	case err != nil:
		return false, err
	case exists && object.Spec.NodeGoneSince != nil:
		return false, g.setSince(ctx, object, nil)
	case exists:
		return false, nil
	case since == nil:
		now := metav1.Now()
		return false, g.setSince(ctx, object, &now)
	}
	return time.Since(since.Time) >= g.Grace, nil
}

func (g *GoneNodes) setSince(ctx context.Context, object *OverlayNode, since *metav1.Time) error {
	_, err := g.Dispatcher.client.patch(ctx, object.Name, "", map[string]any{"spec": map[string]any{"nodeGoneSince": since}})
	return err
}

// Ensure makes the object of a node that has none, so that Check can note in it that the node is gone.
func (g *GoneNodes) Ensure(ctx context.Context, node string) error {
	return g.Dispatcher.client.ensure(ctx, node)
}

// Clean removes the objects of nodes that are gone for good: at once if no request is left in it. Others stay, since their nodes may come
// back, until all of these take more than KeepBytes: then the node that has been gone for the longest time is given up. Clean takes
// back the note of nodes that have come back. It does nothing before the dispatcher's first call: then another controller is the one that
// works.
func (g *GoneNodes) Clean(ctx context.Context) error {
	if !g.Dispatcher.begun.Load() {
		return nil
	}
	if err := g.Dispatcher.Await(ctx); err != nil {
		return err
	}
	var kept []*OverlayNode
	for _, object := range g.Dispatcher.All() {
		isNew := time.Since(object.CreationTimestamp.Time) < silentAfter || time.Since(object.Status.ReportedAt.Time) < silentAfter
		if isNew && object.Spec.NodeGoneSince == nil {
			continue
		}
		gone, err := g.Check(ctx, object)
		switch count, _ := wanted(object); {
		case err != nil:
			return err
		case gone && count > 0:
			kept = append(kept, object)
		case gone:
			if err := g.remove(ctx, object); err != nil {
				return err
			}
		}
	}
	slices.SortFunc(kept, func(a, b *OverlayNode) int { return b.goneSince().Compare(a.goneSince().Time) })
	total := 0
	for _, object := range kept {
		_, size := wanted(object)
		if total += size; total <= g.KeepBytes {
			continue
		}
		if err := g.remove(ctx, object); err != nil {
			return err
		}
	}
	return nil
}

func (g *GoneNodes) remove(ctx context.Context, object *OverlayNode) error {
	left, _ := wanted(object)
	klog.FromContext(ctx).Info("Removing the OverlayNode of a node that is gone", keyName, object.Name, keyRequests, left)
	return g.Dispatcher.client.remove(ctx, object)
}

// wanted returns how many requests of a node are to be carried out, and how many bytes they take.
func wanted(object *OverlayNode) (count, size int) {
	for handle, request := range object.Spec.Requests {
		if _, answered := object.Answer(handle); !answered && !request.IsExpired() {
			count++
			size += request.size()
		}
	}
	return count, size
}
