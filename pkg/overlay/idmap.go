package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// IDs are the user and group that root's files of the lowers appear to be owned by. The zero value leaves them root's.
//
// The kernel maps the owners of the lowers (ID-mapped mounts, mount_setattr(2), MOUNT_ATTR_IDMAP; overlayfs takes them from Linux
// 5.19 on): no file is changed, and a file that is copied up has the owner that the view shows. A mapping is one to one, so that
// files of this user or group in a layer appear as root's.
type IDs struct{ UID, GID uint32 }

// Map returns the owner that the view shows for the owner of a lower's file.
func (i IDs) Map(uid, gid uint32) (mappedUID, mappedGID uint32) {
	return Swap{0, i.UID}.Of(uid), Swap{0, i.GID}.Of(gid)
}

// Swap exchanges two user or group IDs. One ID cannot be shown as another without that one being shown as something else.
type Swap struct{ A, B uint32 }

// Of returns what an ID becomes.
func (s Swap) Of(id uint32) uint32 {
	switch id {
	case s.A:
		return s.B
	case s.B:
		return s.A
	}
	return id
}

// maxID is the largest valid user or group ID. The next number means "unchanged" in chown(2).
const maxID = 1<<32 - 2

// mapping is the ID mapping of swaps, which are made one after the other, in user_namespaces(7)'s order: in the file system, in the
// view, how many.
func mapping(swaps ...Swap) string {
	var named []uint32
	for _, s := range swaps {
		named = append(named, s.A, s.B)
	}
	slices.Sort(named)
	var ranges []string
	add := func(from, to, count uint64) {
		if count > 0 {
			ranges = append(ranges, fmt.Sprintf("%d:%d:%d", from, to, count))
		}
	}
	next := uint64(0)
	for _, id := range slices.Compact(named) {
		to := id
		for _, s := range swaps {
			to = s.Of(to)
		}
		if to == id {
			continue
		}
		add(next, next, uint64(id)-next)
		add(uint64(id), uint64(to), 1)
		next = uint64(id) + 1
	}
	add(next, next, maxID+1-next)
	return strings.Join(ranges, ",")
}

// maxNamespaces is how many user namespaces are cached. It takes a process to make one.
const maxNamespaces = 256

// namespaces caches user namespaces, which are the form in which the kernel takes ID mappings.
type namespaces struct {
	mu     sync.Mutex
	byMaps map[idMaps]*os.File
}

// idMaps are the mappings of user and group IDs.
type idMaps struct{ users, groups string }

// open returns the namespace with these mappings. The caller closes it.
func (n *namespaces) open(maps idMaps) (*os.File, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	namespace, ok := n.byMaps[maps]
	if !ok {
		var err error
		if namespace, err = newNamespace(maps); err != nil {
			return nil, err
		}
		for other, file := range n.byMaps {
			if len(n.byMaps) < maxNamespaces {
				break
			}
			file.Close()
			delete(n.byMaps, other)
		}
		if n.byMaps == nil {
			n.byMaps = map[idMaps]*os.File{}
		}
		n.byMaps[maps] = namespace
	}
	return linux.Dup(namespace)
}

func newNamespace(maps idMaps) (*os.File, error) {
	namespace, err := mount.GetUsernsFD(maps.users, maps.groups)
	switch {
	case errors.Is(err, syscall.ENOSPC):
		// Without the number, which is that of a full disk.
		return nil, fmt.Errorf("%w: %w (%s)", errdefs.ErrFailedPrecondition, errNoNamespace, err.Error())
	case err != nil:
		return nil, fmt.Errorf("make a user namespace for ID-mapped mounts: %w", err)
	}
	return namespace, nil
}

// errNoNamespace says that the kernel allows no other user namespace, which says nothing of what it can do.
var errNoNamespace = errors.New("the node allows no other user namespace, which ID-mapped mounts need; raise the sysctl " +
	"user.max_user_namespaces")

func (n *namespaces) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for maps, namespace := range n.byMaps {
		namespace.Close()
		delete(n.byMaps, maps)
	}
}

// mappedDirs are directories on ID-mapped mounts, one for each, of which they are the roots.
type mappedDirs struct {
	dirs []*os.File
	// attached is the directory that the mounts are attached in, "" while they are detached.
	attached string
}

// mapLowers puts the frozen uppers of a view among its lowers, and maps the owners of both: each is then on a read-only ID-mapped mount
// of its own. The caller closes the mounts after the overlay is mounted.
func (m *Mounter) mapLowers(spec *Spec) (*mappedDirs, error) {
	mapped := &mappedDirs{}
	layers := spec.Lowers
	if spec.LayerOwner != (IDs{}) {
		layers = nil
		if err := m.mapLayers(spec.Lowers, spec.LayerOwner, mapped, &layers); err != nil {
			return nil, errors.Join(err, mapped.close())
		}
	}
	lowers, taken := make([]*os.File, 0, len(spec.Frozen)+len(layers)), 0
	for _, frozen := range spec.Frozen {
		dir, err := m.mapFrozen(frozen, mapped)
		if err != nil {
			return nil, errors.Join(err, mapped.close())
		}
		under := min(max(frozen.Under, taken), len(layers))
		lowers = append(append(lowers, layers[taken:under]...), dir)
		taken = under
	}
	spec.Lowers, spec.Frozen = append(lowers, layers[taken:]...), nil
	return mapped, m.attachMapped(mapped)
}

// mapFrozen returns a frozen upper as the view has it, which is among the mapped directories then unless it can be used as it is.
func (m *Mounter) mapFrozen(frozen FrozenUpper, mapped *mappedDirs) (*os.File, error) {
	if len(frozen.Groups) == 0 && !(frozen.Detached && !m.features.DetachedLayer) {
		return frozen.Dir, nil
	}
	if len(frozen.Groups) > 0 && !m.features.IDMappedUpper {
		return nil, frozenGroupsError(frozen, errors.New("this kernel, or the node's limit of user namespaces, has no feature id-mapped-upper"))
	}
	dir, err := m.mountFrozen(frozen)
	if errors.Is(err, errNotMappable) {
		return nil, frozenGroupsError(frozen, err)
	}
	if err != nil {
		return nil, fmt.Errorf("ID-map the frozen upper %s: %w", frozen.Dir.Name(), err)
	}
	mapped.dirs = append(mapped.dirs, dir)
	return dir, nil
}

func frozenGroupsError(frozen FrozenUpper, reason error) error {
	return fmt.Errorf("%w: the files of the frozen upper %s have another group than the pod's fsGroup, and the kernel cannot show them with "+
		"that: %w; use the fsGroup that the volume had when the snapshot was made", errdefs.ErrFailedPrecondition, frozen.Dir.Name(), reason)
}

// mountFrozen returns the detached mount of a frozen upper, with its groups exchanged.
func (m *Mounter) mountFrozen(frozen FrozenUpper) (*os.File, error) {
	if len(frozen.Groups) == 0 {
		return linux.Dup(frozen.Dir)
	}
	namespace, err := m.namespaces.open(idMaps{mapping(), mapping(frozen.Groups...)})
	if err != nil {
		return nil, err
	}
	defer namespace.Close()
	if !frozen.Detached {
		return mapMount(frozen.Dir, "", linux.MountAttrReadOnly, namespace)
	}
	// The kernel makes no clone of a mount that is in no namespace before Linux 6.15, and this one is nobody else's.
	if err := mapDetached(frozen.Dir, linux.MountAttrReadOnly, namespace); err != nil {
		return nil, err
	}
	return linux.Dup(frozen.Dir)
}

// mapLayers adds the layers on read-only ID-mapped mounts.
func (m *Mounter) mapLayers(layers []*os.File, ids IDs, mapped *mappedDirs, lowers *[]*os.File) error {
	namespace, err := m.namespaces.open(idMaps{mapping(Swap{0, ids.UID}), mapping(Swap{0, ids.GID})})
	if err != nil {
		return err
	}
	defer namespace.Close()
	for _, lower := range layers {
		dir, err := mapMount(lower, "", linux.MountAttrReadOnly, namespace)
		if errors.Is(err, errNotMappable) {
			return fmt.Errorf("%w: layer %s cannot be ID-mapped: %w; set ownership to chown or none",
				errdefs.ErrFailedPrecondition, lower.Name(), err)
		}
		if err != nil {
			return fmt.Errorf("ID-map layer %s: %w", lower.Name(), err)
		}
		mapped.dirs = append(mapped.dirs, dir)
		*lowers = append(*lowers, dir)
	}
	return nil
}

// errNotMappable says that a file system cannot be mounted with an ID mapping.
var errNotMappable = errors.New("its file system does not support it on this kernel")

// mapMount returns a detached clone of the mount at a path in a directory, with attributes, and with the ID mapping of a namespace.
// It returns errNotMappable if the file system has no such mapping.
func mapMount(dir *os.File, path string, attributes uint64, namespace *os.File) (*os.File, error) {
	clone, err := linux.OpenTree(dir, path)
	if err != nil {
		return nil, err
	}
	if err := mapDetached(clone, attributes, namespace); err != nil {
		clone.Close()
		return nil, err
	}
	return clone, nil
}

// mapDetached gives a detached mount attributes and the ID mapping of a namespace.
func mapDetached(mount *os.File, attributes uint64, namespace *os.File) error {
	change := linux.MountChange{Set: linux.MountAttrIDMap | attributes, Private: true, UserNamespace: namespace}
	err := linux.MountSetattr(mount, change)
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOSYS) || errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("%w: %w", errNotMappable, err)
	}
	return err
}

// attachMapped attaches the mounts in the tree while the overlay is mounted: before Linux 6.15, overlayfs takes no directory on a mount
// that is in no namespace. It closes the mounts if it fails.
func (m *Mounter) attachMapped(mapped *mappedDirs) error {
	if m.features.DetachedLayer || len(mapped.dirs) == 0 {
		return nil
	}
	if err := m.attachEach(mapped); err != nil {
		return errors.Join(err, mapped.close())
	}
	return nil
}

func (m *Mounter) attachEach(mapped *mappedDirs) error {
	dir, err := m.makeScratch()
	if err != nil {
		return err
	}
	mapped.attached = dir
	for i, mount := range mapped.dirs {
		path := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(path, 0o700); err != nil {
			return fmt.Errorf("make a mount point for an ID-mapped mount: %w", err)
		}
		target, err := linux.OpenDir(path)
		if err != nil {
			return err
		}
		err = attach(mount, target)
		target.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// close unmounts the mounts. The overlay has clones of its own.
func (l *mappedDirs) close() error {
	var failed error
	for i, dir := range l.dirs {
		if l.attached != "" {
			err := linux.UnmountLazily(filepath.Join(l.attached, strconv.Itoa(i)))
			if err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
				failed = errors.Join(failed, fmt.Errorf("unmount an ID-mapped mount: %w", err))
			}
		}
		dir.Close()
	}
	if l.attached != "" {
		failed = errors.Join(failed, removeScratch(l.attached))
	}
	return failed
}

// removeScratch removes links and empty directories, and never the content of something that is mounted there: it can be an upper.
func removeScratch(path string) error {
	err := os.Remove(path)
	if !errors.Is(err, syscall.ENOTEMPTY) {
		return err
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := removeScratch(filepath.Join(path, entry.Name())); err != nil {
			return err
		}
	}
	return os.Remove(path)
}
