package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"
)

// ErrUpperInUse says that the kernel has another overlay on the same upper directory.
var ErrUpperInUse = errors.New("another overlay is mounted on this upper directory")

// Mounter mounts overlays and bind mounts of them, and takes them down. It satisfies mount-utils' Interface, so that
// the helpers of the Kubernetes storage world work with it; what that interface asks about one path (is it a mount
// point, unmount it) costs the same however many mounts there are, and starts no process. What needs the whole mount
// table (List, GetMountRefs) and mounts of other file systems (Mount and its kin) are mount-utils' own.
type Mounter struct {
	mount.Interface
	features Features
	empty    *os.File
	links    string
	link     atomic.Uint64
	// namespaces are those of ID-mapped layers.
	namespaces namespaces
}

var _ mount.Interface = (*Mounter)(nil)

// NewMounter returns a mounter for a kernel with these features. It keeps an empty directory and, for mount(8), short
// links in dir, which is made where it is missing and belongs to this mounter alone; commands runs mount(8).
func NewMounter(dir string, features Features, commands mount.Interface) (*Mounter, error) {
	emptyPath := filepath.Join(dir, "empty")
	if err := os.MkdirAll(emptyPath, 0o755); err != nil {
		return nil, fmt.Errorf("make the mounter's directory: %w", err)
	}
	links := LinkDir(dir)
	if err := clearLinks(links); err != nil {
		return nil, fmt.Errorf("clear the links of an earlier process: %w", err)
	}
	if err := os.Mkdir(links, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of links: %w", err)
	}
	empty, err := openDir(emptyPath)
	if err != nil {
		return nil, err
	}
	return &Mounter{Interface: commands, features: features, empty: empty, links: links}, nil
}

// LinkDir is the directory of short links of a mounter in dir.
func LinkDir(dir string) string { return filepath.Join(dir, "l") }

// clearLinks removes the links that a crash left, and takes away the ID-mapped layers that are mounted among them: what
// these show must not be removed.
func clearLinks(dir string) error {
	left, err := filepath.Glob(filepath.Join(dir, "*", "*"))
	if err != nil {
		return err
	}
	for _, path := range left {
		if mounted, err := isMountRoot(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW); err != nil || !mounted {
			continue
		}
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return &os.PathError{Op: "umount", Path: path, Err: err}
		}
	}
	return os.RemoveAll(dir)
}

// Close lets go of the mounter's directory. Views stay mounted.
func (m *Mounter) Close() error {
	m.namespaces.close()
	return m.empty.Close()
}

// Overlay mounts a view at target, an open directory. It is there whole or not at all. The error is ErrUpperInUse,
// or of a kind of containerd/errdefs where the cause is known, and has the kernel's own message.
func (m *Mounter) Overlay(spec Spec, target *os.File) error {
	if err := spec.validate(); err != nil {
		return err
	}
	if spec.Upper == nil && len(spec.Lowers) == 1 {
		// overlayfs wants two lowers where there is no upper. An empty one beneath changes nothing that is seen.
		spec.Lowers = []*os.File{spec.Lowers[0], m.empty}
	}
	if spec.LayerOwner != (IDs{}) {
		lowers, err := m.mapLowers(spec.Lowers, spec.LayerOwner)
		if err != nil {
			return err
		}
		spec.Lowers = lowers.dirs
		defer func() {
			// What cannot be taken away now goes when the next process begins, and is no reason to take the view away.
			_ = lowers.close()
		}()
	}
	return m.mount(spec, target)
}

func (m *Mounter) mount(spec Spec, target *os.File) error {
	if m.features.MountAPI {
		return m.mountWithAPI(spec, target)
	}
	return m.mountWithCommand(spec, target)
}

// UpperInUse reports whether some overlay in the kernel, in whatever mount namespace, or in none that can be reached
// any more, has this directory as its upper. It asks for an overlay that cannot be: with an index the kernel refuses
// an upper that is in use (EBUSY) before it finds that the work directory is the upper itself (EINVAL).
func (m *Mounter) UpperInUse(upper *os.File) (bool, error) {
	var err error
	if m.features.MountAPI {
		err = m.probeUpperWithAPI(upper)
	} else {
		err = m.probeUpperWithMount(upper)
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case errors.Is(err, unix.EINVAL):
		return false, nil
	case err == nil:
		return false, fmt.Errorf("probe upper %s: the kernel took an impossible overlay", upper.Name())
	}
	return false, fmt.Errorf("probe upper %s: %w", upper.Name(), err)
}

func (m *Mounter) probeUpperWithAPI(upper *os.File) error {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen overlay: %w", err)
	}
	fsContext := os.NewFile(uintptr(fd), "fsopen:overlay")
	defer fsContext.Close()
	if err := m.setLayer(fsContext, "lowerdir+", m.empty); err != nil {
		return err
	}
	for _, key := range []string{"upperdir", "workdir"} {
		if err := m.setLayer(fsContext, key, upper); err != nil {
			return err
		}
	}
	if err := unix.FsconfigSetString(int(fsContext.Fd()), "index", "on"); err != nil {
		return contextError(fsContext, "set index", "on", err)
	}
	return unix.FsconfigCreate(int(fsContext.Fd()))
}

func (m *Mounter) probeUpperWithMount(upper *os.File) error {
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%[2]s,index=on", procPath(m.empty), procPath(upper))
	err := unix.Mount("overlay", procPath(m.empty), "overlay", 0, options)
	if err == nil {
		return unix.Unmount(procPath(m.empty), unix.MNT_DETACH)
	}
	return err
}

// Unmount unmounts what is mounted at target (mount.Interface). It follows no link at target itself.
func (m *Mounter) Unmount(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	for errors.Is(err, unix.EINTR) {
		err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	}
	if err != nil {
		return &os.PathError{Op: "umount", Path: target, Err: err}
	}
	return nil
}

// IsMountPoint reports whether something is mounted at path (mount.Interface), a bind mount included. It follows no
// link at path itself. The error is fs.ErrNotExist where there is no such path.
func (m *Mounter) IsMountPoint(path string) (bool, error) {
	return isMountRoot(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW)
}

// IsLikelyNotMountPoint is the opposite of IsMountPoint, and as sure (mount.Interface).
func (m *Mounter) IsLikelyNotMountPoint(path string) (bool, error) {
	mounted, err := m.IsMountPoint(path)
	return !mounted, err
}

// CanSafelySkipMountPointCheck is false: Unmount of what is no mount point is an error (mount.Interface).
func (m *Mounter) CanSafelySkipMountPointCheck() bool { return false }

// Mounted is what is mounted at a path.
type Mounted int

// What can be mounted at a path.
const (
	Nothing Mounted = iota // nothing, or there is no such path
	Overlay                // an overlay
	Other                  // another file system
)

// At tells what is mounted at path itself. A directory within a mount is no mount point.
func (m *Mounter) At(path string) (Mounted, error) {
	stat, err := statMount(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, fs.ErrNotExist) {
		return Nothing, nil
	}
	if err != nil || !isRoot(stat) {
		return Nothing, err
	}
	magic, err := m.superMagic(path, stat)
	if err != nil {
		return Nothing, err
	}
	if magic == unix.OVERLAYFS_SUPER_MAGIC {
		return Overlay, nil
	}
	return Other, nil
}

func (m *Mounter) superMagic(path string, stat unix.Statx_t) (int64, error) {
	if m.features.StatMount {
		return superMagic(stat.Mnt_id)
	}
	var fsStat unix.Statfs_t
	if err := unix.Statfs(path, &fsStat); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(fsStat.Type), nil
}

// isMountRoot asks statx, which knows of the one path that it is given, instead of the mount table.
func isMountRoot(dirFD int, path string, flags int) (bool, error) {
	stat, err := statMount(dirFD, path, flags)
	return isRoot(stat), err
}

// statMount stats a path with its mount's unique ID, where the kernel has such. The file system is not waited for.
func statMount(dirFD int, path string, flags int) (unix.Statx_t, error) {
	var stat unix.Statx_t
	flags |= unix.AT_NO_AUTOMOUNT | unix.AT_STATX_DONT_SYNC
	if err := unix.Statx(dirFD, path, flags, unix.STATX_TYPE|unix.STATX_MNT_ID_UNIQUE, &stat); err != nil {
		return unix.Statx_t{}, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	return stat, nil
}

func isRoot(stat unix.Statx_t) bool { return stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 }

func openDir(path string) (*os.File, error) {
	return os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
}
