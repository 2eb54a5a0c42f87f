package layer

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/reference"
)

// Root is a directory that the operator offers layers from.
type Root struct {
	// Path of the directory.
	Path string
	// AllowSubmounts lets a layer be on another mount beneath the directory. Without it a path that leaves the directory's
	// own mount is refused, so that what somebody mounts there does not become a layer.
	AllowSubmounts bool
}

// Roots are the layer roots by name.
type Roots struct {
	roots  map[string]Root
	forbid Forbidden
	opener opener
}

// opener opens the same directory on a mount that is fit for layers, nil where there is none.
type opener interface {
	Reopen(dir *os.File) *os.File
}

// NewRoots returns the layer roots. No directory is opened yet: an NFS root that is away must not keep the driver
// from starting. The error names the first root that is misnamed or lies in the data root.
func NewRoots(roots map[string]Root, forbid Forbidden, opener opener) (*Roots, error) {
	for name, root := range roots {
		if !reference.IsName(name) {
			return nil, fmt.Errorf("layer root %q: a name is lower-case letters, digits, '-' and '.'", name)
		}
		if !filepath.IsAbs(root.Path) {
			return nil, fmt.Errorf("layer root %s=%s: the path must be absolute", name, root.Path)
		}
		if beneath(filepath.Clean(root.Path), forbid.path) {
			return nil, fmt.Errorf("layer root %s=%s lies in the data root %s: uppers and layers of others would be offered", name, root.Path, forbid.path)
		}
	}
	return &Roots{roots: roots, forbid: forbid, opener: opener}, nil
}

func (r *Roots) find(ref reference.Reference) (Root, error) {
	root, ok := r.roots[ref.Name()]
	if ok {
		return root, nil
	}
	known := "none is configured"
	if len(r.roots) > 0 {
		known = "there are " + strings.Join(slices.Sorted(maps.Keys(r.roots)), ", ")
	}
	return Root{}, fmt.Errorf("%w: layer %s: no layer root is named %q: %s (--layer-root)", errdefs.ErrInvalidArgument, ref, ref.Name(), known)
}

// openedRoot is a layer root, and where there is such the same directory on a mount that is fit for layers.
type openedRoot struct{ dir, quiet *os.File }

// openedRoots are the roots that one resolution has opened, so that each is opened once for all layers in it.
type openedRoots map[string]openedRoot

func (o openedRoots) close() {
	for _, root := range o {
		root.dir.Close()
		if root.quiet != nil {
			root.quiet.Close()
		}
	}
}

// open opens the directory that a dir:// reference names (O_PATH). The kernel resolves the path beneath the root
// (openat2(2), RESOLVE_BENEATH), whatever is renamed meanwhile. A missing directory is of the kind NotFound, what leaves
// the root InvalidArgument.
func (r *Roots) open(ref reference.Reference, opened openedRoots) (*os.File, error) {
	root, err := r.find(ref)
	if err != nil {
		return nil, err
	}
	at, ok := opened[ref.Name()]
	if !ok {
		if at, err = r.openRoot(root); err != nil {
			return nil, fmt.Errorf("%w: layer %s: open layer root %s: %w", errdefs.ErrUnavailable, ref, ref.Name(), err)
		}
		opened[ref.Name()] = at
	}
	var resolve uint64
	if !root.AllowSubmounts {
		resolve = unix.RESOLVE_NO_XDEV
	}
	dir, err := openBeneath(at.dir, ref, resolve)
	if err != nil {
		return nil, err
	}
	if err := r.forbid.check(at.dir, dir); err != nil {
		dir.Close()
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return at.quieter(dir, ref), nil
}

// openArchive opens the file, or the directory of an OCI layout, that an archive:// reference names, for reading. It is
// looked for as a directory is.
func (r *Roots) openArchive(ref reference.Reference) (*os.File, error) {
	root, err := r.find(ref)
	if err != nil {
		return nil, err
	}
	at, err := r.openRoot(root)
	if err != nil {
		return nil, fmt.Errorf("%w: layer %s: open layer root %s: %w", errdefs.ErrUnavailable, ref, ref.Name(), err)
	}
	defer openedRoots{ref.Name(): at}.close()
	var resolve uint64
	if !root.AllowSubmounts {
		resolve = unix.RESOLVE_NO_XDEV
	}
	file, err := openFileBeneath(at.dir, ref, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, resolve)
	if err != nil {
		return nil, err
	}
	if err := r.checkArchive(at.dir, file); err != nil {
		file.Close()
		return nil, fmt.Errorf("layer %s: %w", ref, err)
	}
	return file, nil
}

// checkArchive refuses what is no archive, and what lies in the data root.
func (r *Roots) checkArchive(root, file *os.File) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	switch {
	case info.IsDir():
		return r.forbid.check(root, file)
	case !info.Mode().IsRegular():
		return fmt.Errorf("%w: it is neither a file nor a directory", errdefs.ErrInvalidArgument)
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", file.Fd()))
	if err != nil {
		return err
	}
	dir, err := os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("%w: open the directory of the archive: %w", errdefs.ErrUnavailable, err)
	}
	defer dir.Close()
	return r.forbid.check(root, dir)
}

func (r *Roots) openRoot(root Root) (openedRoot, error) {
	fd, err := unix.Open(root.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return openedRoot{}, &os.PathError{Op: "open", Path: root.Path, Err: err}
	}
	dir := os.NewFile(uintptr(fd), root.Path)
	return openedRoot{dir: dir, quiet: r.opener.Reopen(dir)}, nil
}

// quieter returns the layer on the mount that is fit for layers, and closes dir, if the same path leads to the same
// directory there: not where a mount lies between, and not after a rename. Else it returns dir.
func (r openedRoot) quieter(dir *os.File, ref reference.Reference) *os.File {
	if r.quiet == nil {
		return dir
	}
	quiet, err := openBeneath(r.quiet, ref, unix.RESOLVE_NO_XDEV)
	if err != nil {
		return dir
	}
	wanted, err := idOf(int(dir.Fd()), "")
	got, errGot := idOf(int(quiet.Fd()), "")
	if err != nil || errGot != nil || got != wanted {
		quiet.Close()
		return dir
	}
	dir.Close()
	return quiet
}

// openBeneath opens the directory at the reference's path beneath root (O_PATH).
func openBeneath(root *os.File, ref reference.Reference, resolve uint64) (*os.File, error) {
	return openFileBeneath(root, ref, unix.O_PATH|unix.O_DIRECTORY, resolve)
}

// openFileBeneath opens what is at the reference's path beneath root.
func openFileBeneath(root *os.File, ref reference.Reference, flags, resolve uint64) (*os.File, error) {
	path := ref.Path()
	if path == "" {
		path = "."
	}
	how := unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS | resolve,
	}
	fd, err := unix.Openat2(int(root.Fd()), path, &how)
	for range 100 {
		// The kernel answers EAGAIN where a rename beside it kept it from being sure.
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
		fd, err = unix.Openat2(int(root.Fd()), path, &how)
	}
	if err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(root.Name(), ref.Path())), nil
	}
	switch {
	case errors.Is(err, unix.ENOENT):
		what := "directory"
		if ref.Scheme() == reference.Archive {
			what = "archive"
		}
		return nil, fmt.Errorf("%w: layer %s: there is no %s %q in %s on this node", errdefs.ErrNotFound, ref, what, ref.Path(), root.Name())
	case errors.Is(err, unix.ENOTDIR):
		return nil, fmt.Errorf("%w: layer %s: %q in %s is a file: a layer is a directory", errdefs.ErrInvalidArgument, ref, ref.Path(), root.Name())
	case errors.Is(err, unix.EXDEV) && resolve&unix.RESOLVE_NO_XDEV != 0:
		return nil, fmt.Errorf("%w: layer %s leaves %s by a link, `..` or another mount (the operator can allow mounts beneath the root with --layer-root-allow-submounts=%s)", errdefs.ErrInvalidArgument, ref, root.Name(), ref.Name())
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("%w: layer %s leaves %s by a link or `..`", errdefs.ErrInvalidArgument, ref, root.Name())
	case errors.Is(err, unix.EAGAIN):
		return nil, fmt.Errorf("%w: layer %s: directories on its path in %s are renamed all the time", errdefs.ErrUnavailable, ref, root.Name())
	case errors.Is(err, unix.ENAMETOOLONG):
		return nil, fmt.Errorf("%w: layer %s: a component of the path is too long", errdefs.ErrInvalidArgument, ref)
	}
	return nil, fmt.Errorf("layer %s: openat2 %q in %s: %w", ref, ref.Path(), root.Name(), err)
}
