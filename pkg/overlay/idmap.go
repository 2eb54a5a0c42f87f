package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
	return swap(uid, i.UID), swap(gid, i.GID)
}

func swap(id, with uint32) uint32 {
	switch id {
	case 0:
		return with
	case with:
		return 0
	}
	return id
}

// maxID is the largest valid user or group ID. The next number means "unchanged" in chown(2).
const maxID = 1<<32 - 2

// mapping is the ID mapping that swaps root with an ID, in user_namespaces(7)'s order: in the layer, in the view, how
// many.
func mapping(id uint32) string {
	var ranges []string
	add := func(from, to, count uint64) {
		if count > 0 {
			ranges = append(ranges, fmt.Sprintf("%d:%d:%d", from, to, count))
		}
	}
	if id == 0 {
		add(0, 0, maxID+1)
		return ranges[0]
	}
	n := uint64(id)
	add(0, n, 1)
	add(1, 1, n-1)
	add(n, 0, 1)
	add(n+1, n+1, maxID-n)
	return strings.Join(ranges, ",")
}

// maxNamespaces is how many user namespaces are cached. It takes a process to make one.
const maxNamespaces = 256

// namespaces caches user namespaces, which are the form in which the kernel takes ID mappings.
type namespaces struct {
	mu    sync.Mutex
	byIDs map[IDs]*os.File
}

// open returns the namespace with the mapping of these IDs. The caller closes it.
func (n *namespaces) open(ids IDs) (*os.File, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	namespace, ok := n.byIDs[ids]
	if !ok {
		var err error
		if namespace, err = mount.GetUsernsFD(mapping(ids.UID), mapping(ids.GID)); err != nil {
			return nil, fmt.Errorf("make a user namespace for ID-mapped layers (sysctl user.max_user_namespaces): %w", err)
		}
		for other, file := range n.byIDs {
			if len(n.byIDs) < maxNamespaces {
				break
			}
			file.Close()
			delete(n.byIDs, other)
		}
		if n.byIDs == nil {
			n.byIDs = map[IDs]*os.File{}
		}
		n.byIDs[ids] = namespace
	}
	return linux.Dup(namespace)
}

func (n *namespaces) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for ids, namespace := range n.byIDs {
		namespace.Close()
		delete(n.byIDs, ids)
	}
}

// mappedLowers are lowers on ID-mapped mounts, one for each.
type mappedLowers struct {
	dirs []*os.File
	// attached is the directory that the mounts are attached in, "" while they are detached.
	attached string
}

// mapLowers returns the lowers on read-only ID-mapped mounts.
func (m *Mounter) mapLowers(lowers []*os.File, ids IDs) (*mappedLowers, error) {
	namespace, err := m.namespaces.open(ids)
	if err != nil {
		return nil, err
	}
	defer namespace.Close()
	mapped := &mappedLowers{}
	for _, lower := range lowers {
		dir, err := mapLower(lower, namespace)
		if err != nil {
			return nil, errors.Join(err, mapped.close())
		}
		mapped.dirs = append(mapped.dirs, dir)
	}
	if m.features.DetachedLayer {
		return mapped, nil
	}
	if err := m.attachMapped(mapped); err != nil {
		return nil, errors.Join(err, mapped.close())
	}
	return mapped, nil
}

func mapLower(lower, namespace *os.File) (*os.File, error) {
	clone, err := linux.OpenTree(lower, "")
	if err != nil {
		return nil, err
	}
	change := linux.MountChange{Set: linux.MountAttrIDMap | linux.MountAttrReadOnly, Private: true, UserNamespace: namespace}
	err = linux.MountSetattr(clone, change)
	if err == nil {
		return clone, nil
	}
	clone.Close()
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOSYS) || errors.Is(err, syscall.EPERM) {
		return nil, fmt.Errorf("%w: layer %s cannot be ID-mapped: its file system does not support it on this kernel: %w; "+
			"set ownership to chown or none", errdefs.ErrFailedPrecondition, lower.Name(), err)
	}
	return nil, fmt.Errorf("ID-map layer %s: %w", lower.Name(), err)
}

// attachMapped attaches the mounts in the tree while the overlay is mounted: before Linux 6.15, overlayfs takes no layer on a mount
// that is in no namespace.
func (m *Mounter) attachMapped(lowers *mappedLowers) error {
	dir, err := m.makeScratch()
	if err != nil {
		return err
	}
	lowers.attached = dir
	for i, lower := range lowers.dirs {
		path := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(path, 0o700); err != nil {
			return fmt.Errorf("make a mount point for an ID-mapped layer: %w", err)
		}
		target, err := linux.OpenDir(path)
		if err != nil {
			return err
		}
		err = attach(lower, target)
		target.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// close unmounts the mounts. The overlay has clones of its own.
func (l *mappedLowers) close() error {
	var failed error
	for i, dir := range l.dirs {
		if l.attached != "" {
			err := linux.UnmountLazily(filepath.Join(l.attached, strconv.Itoa(i)))
			if err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
				failed = errors.Join(failed, fmt.Errorf("unmount an ID-mapped layer: %w", err))
			}
		}
		dir.Close()
	}
	if l.attached != "" {
		failed = errors.Join(failed, removeEmpty(l.attached))
	}
	return failed
}

// removeEmpty removes a directory of empty directories, and never the content of something that is mounted there.
func removeEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := os.Remove(filepath.Join(dir, entry.Name())); err != nil {
			return err
		}
	}
	return os.Remove(dir)
}
