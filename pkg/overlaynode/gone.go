package overlaynode

import (
	"context"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
)

// keepRequests is how long the object of a node that is gone keeps requests for it, if it comes back.
const keepRequests = 30 * 24 * time.Hour

// GoneNodes knows which nodes are gone for good.
type GoneNodes struct {
	// Dispatcher has the objects of the nodes.
	Dispatcher *Dispatcher
	// Exists reports whether there is a Node of that name.
	Exists func(ctx context.Context, name string) (bool, error)
	// Grace is how long a Node must have been gone.
	Grace time.Duration
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

// Clean removes the objects of nodes that are gone for good: at once if no request is left in it, and otherwise after a month. It takes
// back the note of nodes that have come back. It does nothing before the dispatcher's first call: then another controller is the one that
// works.
func (g *GoneNodes) Clean(ctx context.Context) error {
	if !g.Dispatcher.begun.Load() {
		return nil
	}
	if err := g.Dispatcher.Await(ctx); err != nil {
		return err
	}
	for _, object := range g.Dispatcher.All() {
		isNew := time.Since(object.CreationTimestamp.Time) < silentAfter || time.Since(object.Status.ReportedAt.Time) < silentAfter
		if isNew && object.Spec.NodeGoneSince == nil {
			continue
		}
		gone, err := g.Check(ctx, object)
		if err != nil {
			return err
		}
		left := wanted(object)
		if !gone || left > 0 && time.Since(object.Spec.NodeGoneSince.Time) < g.Grace+keepRequests {
			continue
		}
		klog.FromContext(ctx).Info("Removing the OverlayNode of a node that is gone", keyName, object.Name, keyRequests, left)
		if err := g.Dispatcher.client.remove(ctx, object); err != nil {
			return err
		}
	}
	return nil
}

// wanted returns how many requests of a node are to be carried out.
func wanted(object *OverlayNode) int {
	count := 0
	for handle, request := range object.Spec.Requests {
		if _, answered := object.Answer(handle); !answered && !request.isExpired() {
			count++
		}
	}
	return count
}
