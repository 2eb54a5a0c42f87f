package layer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// Root is a directory that the operator offers layers from.
type Root struct {
	Path string
	// AllowSubmounts permits layers on other mounts beneath the directory. Without it, a path that leaves the directory's own mount is
	// refused, so that nobody makes a layer of something by mounting it there.
	AllowSubmounts bool
}

// Roots are the layer roots of a node by name.
type Roots struct {
	roots     map[string]Root
	protected ProtectedDir
	reopener  reopener
	questions questions
}

// reopener opens a directory again on a mount that is better for layers. It returns nil if there is no such mount.
type reopener interface {
	Reopen(dir *os.File) *os.File
}

// NewRoots checks the configuration of the layer roots. It opens no directory, since a root on an NFS server that does not answer must
// not keep the driver from starting.
func NewRoots(roots map[string]Root, protected ProtectedDir, reopener reopener) (*Roots, error) {
	for _, name := range slices.Sorted(maps.Keys(roots)) {
		root := roots[name]
		if !reference.IsName(name) {
			return nil, fmt.Errorf("layer root %q: the name must consist of lower-case letters, digits, '-' and '.'", name)
		}
		if !filepath.IsAbs(root.Path) {
			return nil, fmt.Errorf("layer root %s=%s: the path must be absolute", name, root.Path)
		}
		if isBeneath(filepath.Clean(root.Path), protected.path) {
			return nil, fmt.Errorf("layer root %s=%s is in the data root %s, where uppers and layers of others are", name, root.Path, protected.path)
		}
	}
	return &Roots{roots: roots, protected: protected, reopener: reopener}, nil
}

// find returns the root that a reference names.
func (r *Roots) find(ref reference.Reference) (Root, error) {
	root, ok := r.roots[ref.Name()]
	if ok {
		return root, nil
	}
	configured := "none"
	if len(r.roots) > 0 {
		configured = strings.Join(slices.Sorted(maps.Keys(r.roots)), ", ")
	}
	return Root{}, fmt.Errorf("%w: layer %s: unknown layer root %q; configured with --layer-root: %s",
		errdefs.ErrInvalidArgument, ref, ref.Name(), configured)
}

// openedRoot is an open layer root.
type openedRoot struct {
	dir *os.File
	id  linux.FileID
	// detached is the same directory on the mount that is better for layers, nil if there is none.
	detached *os.File
	// resolve has the flags for paths beneath the root, besides those that keep a path beneath it.
	resolve uint64
}

func (o openedRoot) close() {
	o.dir.Close()
	if o.detached != nil {
		o.detached.Close()
	}
}

// openedRoots are layer roots that are open, by name. Each is opened once for all layers beneath it.
type openedRoots map[string]openedRoot

// openRoot opens a layer root. The caller closes it.
func (r *Roots) openRoot(root Root) (openedRoot, error) {
	dir, err := linux.OpenDir(root.Path)
	if err != nil {
		return openedRoot{}, err
	}
	stat, err := linux.StatFile(dir)
	if err != nil {
		dir.Close()
		return openedRoot{}, err
	}
	opened := openedRoot{dir: dir, id: stat.ID(), detached: r.reopener.Reopen(dir)}
	if !root.AllowSubmounts {
		opened.resolve = linux.ResolveNoXdev
	}
	return opened, nil
}

// rootName is what a layer root is called in errors.
func rootName(name string) string { return "layer root " + name }

// openRootInTime opens the directory of a layer root where the file system answers. It returns ErrDoesNotAnswer where it does not.
func (r *Roots) openRootInTime(ctx context.Context, name string) (*os.File, error) {
	return r.questions.askOne(ctx, patience, rootName(name), "", func() (*os.File, error) { return linux.OpenDir(r.roots[name].Path) })
}

// openRootOf opens the layer root of a reference. The caller closes it.
func (r *Roots) openRootOf(ref reference.Reference) (openedRoot, error) {
	root, err := r.find(ref)
	if err != nil {
		return openedRoot{}, err
	}
	at, err := r.openRoot(root)
	if err != nil {
		return openedRoot{}, fmt.Errorf("%w: layer %s: layer root %s: %w", errdefs.ErrUnavailable, ref, ref.Name(), err)
	}
	return at, nil
}

// openDirsInTime opens the directories of dir:// references in their order (O_PATH), where the file systems answer. It returns
// ErrNotFound if there is no such directory, ErrInvalidArgument if a path leaves its root, and ErrDoesNotAnswer where a file system
// does not answer. One goroutine asks for all of them: what they are asked takes less time than to start one for each.
func (r *Roots) openDirsInTime(ctx context.Context, refs []reference.Reference) ([]answer, error) {
	return r.questions.ask(ctx, patience, func(asked *question) error {
		opened := openedRoots{}
		for _, ref := range refs {
			if err := r.openDir(asked, ref, opened); err != nil {
				return err
			}
		}
		return nil
	})
}

func (r *Roots) openDir(asked *question, ref reference.Reference, opened openedRoots) error {
	at, isOpen := opened[ref.Name()]
	dir, err := asked.open(rootName(ref.Name()), ref.Path(), func() (*os.File, error) {
		if !isOpen {
			var err error
			if at, err = r.openRootOf(ref); err != nil {
				return nil, err
			}
			opened[ref.Name()] = at
			asked.keep(rootName(ref.Name()), at.close)
		}
		dir, err := openBeneath(at.dir, ref, linux.O_PATH|linux.O_DIRECTORY, at.resolve)
		if err != nil {
			return nil, err
		}
		return at.reopenDetached(dir, ref), nil
	})
	if err != nil {
		return err
	}
	if err := r.protected.check(at.id, dir.file, dir.id); err != nil {
		return fmt.Errorf("layer %s: %w", ref, err)
	}
	return nil
}

// reopenDetached returns the layer's directory on the detached mount, and closes dir. It returns dir if there is no detached mount, or
// if the path leads to another directory there, because of a mount on the path or a rename.
func (o openedRoot) reopenDetached(dir *os.File, ref reference.Reference) *os.File {
	if o.detached == nil {
		return dir
	}
	detached, err := openBeneath(o.detached, ref, linux.O_PATH|linux.O_DIRECTORY, linux.ResolveNoXdev)
	if err != nil {
		return dir
	}
	if same, err := linux.SameFile(dir, detached); err != nil || !same {
		detached.Close()
		return dir
	}
	dir.Close()
	return detached
}

// openBeneath opens what is at the reference's path beneath root.
func openBeneath(root *os.File, ref reference.Reference, flags int, resolve uint64) (*os.File, error) {
	path := ref.Path()
	if path == "" {
		path = "."
	}
	file, err := linux.Open(root, path, flags, linux.ResolveBeneath|linux.ResolveNoMagicLinks|resolve)
	switch {
	case err == nil:
		return file, nil
	case errors.Is(err, syscall.ENOENT):
		what := "directory"
		if ref.Scheme() == reference.Archive {
			what = "archive"
		}
		return nil, fmt.Errorf("%w: layer %s: there is no %s %q in %s on this node", errdefs.ErrNotFound, ref, what, ref.Path(), root.Name())
	case errors.Is(err, syscall.ENOTDIR):
		return nil, fmt.Errorf("%w: layer %s: %q in %s is a file, not a directory", errdefs.ErrInvalidArgument, ref, ref.Path(), root.Name())
	case errors.Is(err, syscall.EXDEV) && resolve&linux.ResolveNoXdev != 0:
		return nil, fmt.Errorf("%w: layer %s: the path leaves %s by a link, \"..\" or a mount; "+
			"the operator can permit mounts beneath the root with --layer-root-allow-submounts=%s",
			errdefs.ErrInvalidArgument, ref, root.Name(), ref.Name())
	case errors.Is(err, syscall.EXDEV), errors.Is(err, syscall.ELOOP):
		return nil, fmt.Errorf("%w: layer %s: the path leaves %s by a link or \"..\"", errdefs.ErrInvalidArgument, ref, root.Name())
	case errors.Is(err, syscall.EAGAIN):
		return nil, fmt.Errorf("%w: layer %s: directories on the path in %s are being renamed", errdefs.ErrUnavailable, ref, root.Name())
	case errors.Is(err, syscall.ENAMETOOLONG):
		return nil, fmt.Errorf("%w: layer %s: a component of the path is too long", errdefs.ErrInvalidArgument, ref)
	}
	return nil, fmt.Errorf("layer %s: %w", ref, err)
}
