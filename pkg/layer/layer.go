// Package layer resolves layer references into open read-only directories.
package layer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
	"github.com/overlay-csi/overlay-csi/pkg/registry"
	"github.com/overlay-csi/overlay-csi/pkg/store"
)

// Pod is the pod that a layer is resolved for.
type Pod = kubelet.Pod

// Request says for whom references are resolved.
type Request struct {
	Pod Pod
	// Secrets are the volume's, with credentials for registries in them.
	Secrets map[string]string
	// Pins are what references stood for when the volume was made.
	Pins reference.Digests
}

// Stack is the directories of a volume's layers, the topmost first, held open so that they stay the ones that were
// resolved whatever is renamed or collected meanwhile.
type Stack struct {
	Dirs []*os.File
	// Marks tell of each directory whether it was changed since.
	Marks []Mark
	// Pins are the request's, and those of the references that had none.
	Pins reference.Digests
	// Stored are the layers of the stack that are in the layer store.
	Stored []digest.Digest

	own  []*os.File
	uses []*store.Lease
	seen map[string]bool
}

// Close lets go of the directories.
func (s *Stack) Close() {
	for _, dir := range s.own {
		dir.Close()
	}
	for _, use := range s.uses {
		use.Release()
	}
}

// Paths is where the directories were when they were opened.
func (s *Stack) Paths() []string {
	paths := make([]string, len(s.Dirs))
	for i, dir := range s.Dirs {
		paths[i] = dir.Name()
	}
	return paths
}

// addDir puts a directory below the others. mayChange: it is no sign of a fault when it does.
func (s *Stack) addDir(dir *os.File, mayChange bool) error {
	s.own = append(s.own, dir)
	s.Dirs = append(s.Dirs, dir)
	if mayChange {
		s.Marks = append(s.Marks, "")
		return nil
	}
	return s.mark(dir)
}

func (s *Stack) mark(dir *os.File) error {
	mark, err := markOf(dir)
	s.Marks = append(s.Marks, mark)
	return err
}

// addImage puts the layers of an image below the others. One that is there already, as the layers are that two images
// have in common, would show nothing that it does not show where it is higher, and overlayfs takes a directory once.
func (s *Stack) addImage(ref reference.Reference, use *store.Lease) error {
	s.uses = append(s.uses, use)
	s.Pins[ref.String()] = use.Image.Digest
	for _, layer := range use.Image.Layers {
		s.Stored = append(s.Stored, layer.DiffID)
	}
	for _, dir := range use.Dirs {
		if !s.seen[dir.Name()] {
			s.seen[dir.Name()] = true
			s.Dirs = append(s.Dirs, dir)
			if err := s.mark(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// Resolver resolves references of every scheme.
type Resolver struct {
	roots      *Roots
	podVolumes *PodVolumes
	images     images
}

// NewResolver returns a resolver of dir:// and archive:// beneath roots, volume:// in podVolumes, and oci:// in images.
func NewResolver(roots *Roots, podVolumes *PodVolumes, images images) *Resolver {
	return &Resolver{roots: roots, podVolumes: podVolumes, images: images}
}

// Resolve opens the directories of the references in their order. Images that are not on the node are pulled. The caller
// closes the stack.
func (r *Resolver) Resolve(ctx context.Context, refs []reference.Reference, req Request) (*Stack, error) {
	credentials, err := registry.ParseCredentials(req.Secrets)
	if err != nil {
		return nil, err
	}
	stack := &Stack{Pins: reference.Digests{}, seen: map[string]bool{}}
	opened := openedRoots{}
	defer opened.close()
	for _, ref := range refs {
		if err := r.resolve(ctx, ref, req, credentials, opened, stack); err != nil {
			stack.Close()
			return nil, err
		}
	}
	return stack, nil
}

func (r *Resolver) resolve(ctx context.Context, ref reference.Reference, req Request, credentials registry.Credentials, opened openedRoots, stack *Stack) error {
	var dir *os.File
	var use *store.Lease
	var err error
	switch ref.Scheme() {
	case reference.Dir:
		dir, err = r.roots.open(ref, opened)
	case reference.Volume:
		dir, err = r.podVolumes.Open(ctx, ref, req.Pod)
	case reference.OCI:
		use, err = r.useImage(ctx, ref, credentials, req.Pins)
	case reference.Archive:
		use, err = r.useArchive(ctx, ref, req.Pins)
	}
	switch {
	case err != nil:
		return err
	case use != nil:
		return stack.addImage(ref, use)
	}
	return stack.addDir(dir, ref.Scheme() == reference.Volume)
}

// Check refuses what could never be resolved, whatever node and pod: an unknown layer root.
func (r *Resolver) Check(refs []reference.Reference) error {
	for _, ref := range refs {
		if ref.Scheme() != reference.Dir && ref.Scheme() != reference.Archive {
			continue
		}
		if _, err := r.roots.find(ref); err != nil {
			return err
		}
	}
	return nil
}

// CheckHere refuses what this node does not have: directories and archives that are not there. Images can be pulled, and
// the volumes of a pod are left for the pod.
func (r *Resolver) CheckHere(refs []reference.Reference) error {
	opened := openedRoots{}
	defer opened.close()
	for _, ref := range refs {
		var file *os.File
		var err error
		switch ref.Scheme() {
		case reference.Dir:
			file, err = r.roots.open(ref, opened)
		case reference.Archive:
			file, err = r.roots.openArchive(ref)
		default:
			continue
		}
		if err != nil {
			return err
		}
		file.Close()
	}
	return nil
}

// CheckRoots tells of the layer roots that are not there on this node. It is nil where all are.
func (r *Resolver) CheckRoots() error {
	var missing error
	for _, name := range slices.Sorted(maps.Keys(r.roots.roots)) {
		root, err := r.roots.openRoot(r.roots.roots[name])
		if err != nil {
			missing = errors.Join(missing, fmt.Errorf("layer root %s: %w", name, err))
			continue
		}
		openedRoots{name: root}.close()
	}
	return missing
}
