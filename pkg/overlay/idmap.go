package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
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

// maxID is the last ID that is one (chown(2)).
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

// maxNamespaces is how many mappings are kept at hand. A user namespace takes a process to make.
const maxNamespaces = 256

// namespaces keeps user namespaces, which are what mappings are handed to the kernel as.
type namespaces struct {
	mu    sync.Mutex
	byMap map[IDs]*os.File
}

// open returns the namespace of a mapping. The caller closes it.
func (n *namespaces) open(ids IDs) (*os.File, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	namespace, ok := n.byMap[ids]
	if !ok {
		var err error
		if namespace, err = mount.GetUsernsFD(mapping(ids.UID), mapping(ids.GID)); err != nil {
			return nil, fmt.Errorf("make a user namespace for ID-mapped layers (sysctl user.max_user_namespaces): %w", err)
		}
		for other, file := range n.byMap {
			if len(n.byMap) < maxNamespaces {
				break
			}
			file.Close()
			delete(n.byMap, other)
		}
		if n.byMap == nil {
			n.byMap = map[IDs]*os.File{}
		}
		n.byMap[ids] = namespace
	}
	fd, err := unix.FcntlInt(namespace.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the descriptor of a user namespace: %w", err)
	}
	return os.NewFile(uintptr(fd), "user namespace"), nil
}

func (n *namespaces) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for ids, namespace := range n.byMap {
		namespace.Close()
		delete(n.byMap, ids)
	}
}

// mapped are lowers that show another owner, each on a mount of its own.
type mapped struct {
	dirs     []*os.File
	attached string
}

// mapLowers returns the lowers with another owner. Nobody can write through them.
func (m *Mounter) mapLowers(lowers []*os.File, ids IDs) (*mapped, error) {
	namespace, err := m.namespaces.open(ids)
	if err != nil {
		return nil, err
	}
	defer namespace.Close()
	result := &mapped{}
	for _, lower := range lowers {
		dir, err := mapLower(lower, namespace)
		if err != nil {
			return nil, errors.Join(err, result.close())
		}
		result.dirs = append(result.dirs, dir)
	}
	if m.features.DetachedLayer {
		return result, nil
	}
	if err := m.attachMapped(result); err != nil {
		return nil, errors.Join(err, result.close())
	}
	return result, nil
}

func mapLower(lower, namespace *os.File) (*os.File, error) {
	fd, err := unix.OpenTree(int(lower.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, fmt.Errorf("open_tree %s: %w", lower.Name(), err)
	}
	clone := os.NewFile(uintptr(fd), lower.Name())
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE, Userns_fd: uint64(namespace.Fd())}
	err = unix.MountSetattr(int(clone.Fd()), "", unix.AT_EMPTY_PATH, &attr)
	if err == nil {
		return clone, nil
	}
	clone.Close()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("%w: the owner of the files of layer %s cannot be shown as another: its file system cannot be ID-mapped on this kernel (mount_setattr: %w): say ownership: chown, or none", errdefs.ErrFailedPrecondition, lower.Name(), err)
	}
	return nil, fmt.Errorf("mount_setattr (ID mapping) of layer %s: %w", lower.Name(), err)
}

// attachMapped puts the mounts into the tree for as long as the overlay is being made: overlayfs takes no layer on a mount
// that is in no namespace before Linux 6.15.
func (m *Mounter) attachMapped(lowers *mapped) error {
	dir := filepath.Join(m.links, strconv.FormatUint(m.link.Add(1), 36))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of ID-mapped layers: %w", err)
	}
	lowers.attached = dir
	for i, lower := range lowers.dirs {
		path := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(path, 0o700); err != nil {
			return fmt.Errorf("make a mount point for an ID-mapped layer: %w", err)
		}
		target, err := openDir(path)
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

// close takes the mounts away. The overlay has clones of its own.
func (l *mapped) close() error {
	var failed error
	for i, dir := range l.dirs {
		if l.attached != "" {
			if err := unix.Unmount(filepath.Join(l.attached, strconv.Itoa(i)), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
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

// removeEmpty removes a directory of empty directories, and never what is in something mounted there.
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
