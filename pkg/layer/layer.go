package layer

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
)

// Pod is the pod that a layer is resolved for.
type Pod = kubelet.Pod

// Stack is the directories of a volume's layers, the topmost first, held open so that they stay the ones that were
// resolved whatever is renamed meanwhile.
type Stack []*os.File

// Close closes the directories.
func (s Stack) Close() {
	for _, dir := range s {
		dir.Close()
	}
}

// Paths is where the directories were when they were opened.
func (s Stack) Paths() []string {
	paths := make([]string, len(s))
	for i, dir := range s {
		paths[i] = dir.Name()
	}
	return paths
}

// Resolver resolves references of every scheme.
type Resolver struct {
	roots      *Roots
	podVolumes *PodVolumes
}

// NewResolver returns a resolver of dir:// beneath roots and volume:// in podVolumes.
func NewResolver(roots *Roots, podVolumes *PodVolumes) *Resolver {
	return &Resolver{roots: roots, podVolumes: podVolumes}
}

// Resolve opens the directories of the references in their order. The caller closes the stack.
func (r *Resolver) Resolve(ctx context.Context, refs []Reference, pod Pod) (Stack, error) {
	stack := make(Stack, 0, len(refs))
	opened := openedRoots{}
	defer opened.close()
	for _, ref := range refs {
		dir, err := r.resolve(ctx, ref, pod, opened)
		if err != nil {
			stack.Close()
			return nil, err
		}
		stack = append(stack, dir)
	}
	return stack, nil
}

func (r *Resolver) resolve(ctx context.Context, ref Reference, pod Pod, opened openedRoots) (*os.File, error) {
	switch ref.Scheme() {
	case Dir:
		return r.roots.open(ref, opened)
	case Volume:
		return r.podVolumes.Open(ctx, ref, pod)
	}
	return nil, r.unavailable(ref)
}

// Check refuses what could never be resolved, whatever node and pod: an unknown layer root, a scheme that this build
// does not have.
func (r *Resolver) Check(refs []Reference) error {
	for _, ref := range refs {
		switch ref.Scheme() {
		case Dir:
			if _, err := r.roots.find(ref); err != nil {
				return err
			}
		case Volume:
		default:
			return r.unavailable(ref)
		}
	}
	return nil
}

func (r *Resolver) unavailable(ref Reference) error {
	return fmt.Errorf("%w: layer %s: %s:// is not available in this build: use dir:// or volume://", errdefs.ErrNotImplemented, ref, ref.Scheme())
}
