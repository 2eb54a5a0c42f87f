package upper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// busyMounter mounts and unmounts busy mounts. A busy mount is a directory mounted on itself, read-only: the mount that it lies on
// cannot be unmounted (EBUSY) before the busy mount is.
type busyMounter interface {
	AddBusyMount(dir *os.File) error
	Detach(root *os.File) error
	// UpperInUse reports whether an overlay is mounted on an upper directory.
	UpperInUse(upper *os.File) (bool, error)
}

// keepMounted keeps kubelet from unmounting the volume: with a busy mount, which stays when this process ends, or with a handle where
// the busy mount would appear in other pods and keep them from ending.
func (p podVolume) keepMounted(volume, base *os.File) error {
	compared, err := compareMounts(volume, base)
	if err != nil {
		return p.wrap("stat the upper's directory", err)
	}
	if !compared.inside {
		return fmt.Errorf("%w: upper volume path %q in %s is a mount point; name a path that nothing is mounted on",
			errdefs.ErrInvalidArgument, p.at.Path, p.at.Volume)
	}
	shared, err := p.isShared(volume)
	if err != nil {
		return p.wrap("find out who has the volume", err)
	}
	if shared {
		return p.handles.hold(p)
	}
	if err := p.mounter.AddBusyMount(base); err != nil {
		return p.wrap("mount the busy mount", err)
	}
	return nil
}

// maxBusyMounts is how many busy mounts are unmounted at one path. There is more than one only after a crash.
const maxBusyMounts = 8

// unmountBusy unmounts the busy mounts of the upper, wherever the pod has moved them by renaming a directory above.
func (p podVolume) unmountBusy(volume *os.File) error {
	if err := p.unmountBusyAtPath(volume); err != nil {
		return err
	}
	return p.unmountBusyElsewhere(volume)
}

// unmountBusyAtPath unmounts the busy mounts at the path of the upper.
func (p podVolume) unmountBusyAtPath(volume *os.File) error {
	for range maxBusyMounts {
		base, err := p.open(volume, p.at.Path)
		if isMoved(err) {
			return nil
		}
		if err != nil {
			return err
		}
		detached, err := p.detach(volume, base)
		base.Close()
		if err != nil || !detached {
			return err
		}
	}
	return p.wrap("unmount the busy mount", fmt.Errorf("it is still there after %d unmounts", maxBusyMounts))
}

// unmountBusyElsewhere searches the mount table for busy mounts of the upper.
func (p podVolume) unmountBusyElsewhere(volume *os.File) error {
	mounts, err := linux.Mounts(nil)
	if err != nil {
		return p.wrap("find the busy mount", err)
	}
	// In the mount table, links are resolved.
	path, err := linux.CurrentPath(volume)
	if err != nil {
		return p.wrap("find the busy mount", err)
	}
	for _, mount := range mounts {
		beneath, ok := strings.CutPrefix(mount.Mountpoint, path+"/")
		if !ok {
			continue
		}
		base, err := p.open(volume, beneath)
		if isMoved(err) {
			continue
		}
		if err != nil {
			return err
		}
		if p.isOwn(base) || !mayBeInUse(p.mounter, volume, beneath) {
			_, err = p.detach(volume, base)
		}
		base.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// isOwn reports whether the lock file of an upper names this view.
func (p podVolume) isOwn(base *os.File) bool {
	file, _, err := readLockFile(base)
	return err == nil && file.Holder != nil && *file.Holder == p.holder
}

// mayBeInUse reports whether an overlay may be mounted on the upper at a path of an open volume: it is, or that cannot be told. It looks
// beneath the busy mount, on which overlayfs refuses every upper because it is read-only.
func mayBeInUse(mounter busyMounter, volume *os.File, path string) bool {
	bare, err := linux.OpenTree(volume, "")
	if err != nil {
		return true
	}
	defer bare.Close()
	upper, err := linux.OpenDirBeneath(bare, path+"/"+upperName)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	defer upper.Close()
	if readOnly, err := linux.IsReadOnly(upper); err != nil || readOnly {
		return true
	}
	inUse, err := mounter.UpperInUse(upper)
	return err != nil || inUse
}

// detach unmounts the mount whose root is base, if it is a busy mount in the volume and not that of another view.
func (p podVolume) detach(volume, base *os.File) (detached bool, err error) {
	compared, err := compareMounts(volume, base)
	if err == nil && (!compared.busy || p.isOfAnother(base)) {
		return false, nil
	}
	if err == nil {
		err = p.mounter.Detach(base)
	}
	if err != nil {
		return false, p.wrap("unmount the busy mount", err)
	}
	return true, nil
}

// isOfAnother reports whether a busy mount belongs to another view of this node. The pod may have moved the busy mount and removed or
// falsified the lock file in it: it is of another view only if that one is known to have its upper in this volume. A busy mount that is
// taken for that of this view by mistake is of the same pod, and Hold replaces it.
func (p podVolume) isOfAnother(base *os.File) bool {
	file, _, err := readLockFile(base)
	return err == nil && file.Holder != nil && *file.Holder != p.holder && file.Holder.Node == p.holder.Node &&
		p.holders.mayHaveMounted(*file.Holder, p.at.Volume, p.podDir)
}

// holders are the views of this node, to judge holders that pods may have written.
type holders struct {
	find func(LockHolder) (at PodVolumePath, inUse bool)
}

func (h holders) inUse(holder LockHolder) bool {
	_, inUse := h.find(holder)
	return inUse
}

// mayHaveMounted reports whether a holder may have a busy mount in a volume of the pod whose directory is podDir. The record of the
// holder says in which volume it has one, and the release of that view unmounts it. Where that record cannot be read, the busy mounts of
// the holder are looked for in all volumes of its own pod ([Backends.FindPodVolumes]).
func (h holders) mayHaveMounted(holder LockHolder, volume, podDir string) bool {
	at, inUse := h.find(holder)
	if !inUse {
		return false
	}
	if at.Volume == "" {
		return podDir != "" && strings.HasPrefix(holder.Target, podDir+"/")
	}
	return at.Volume == volume
}

// mountComparison says where a directory beneath a volume is mounted. If neither is set, it is on another mount.
type mountComparison struct {
	// inside: it is on the mount of the volume, and nothing is mounted on it.
	inside bool
	// busy: it is the root of another mount of the same file system.
	busy bool
}

func compareMounts(volume, dir *os.File) (mountComparison, error) {
	ofVolume, err := linux.StatMount(volume, "")
	if linux.IsNotWritable(err) {
		return compareMountsByTable(volume, dir)
	}
	if err != nil {
		return mountComparison{}, err
	}
	ofDir, err := linux.StatMount(dir, "")
	if err != nil {
		return mountComparison{}, err
	}
	same := ofDir.MountID == ofVolume.MountID
	return mountComparison{
		inside: same && !ofDir.IsRoot,
		busy:   !same && ofDir.IsRoot && ofDir.ID.Dev == ofVolume.ID.Dev,
	}, nil
}

// compareMountsByTable is compareMounts for a file system that has failed, and does not answer statx(2). The busy mount must be
// unmounted all the same, or the other volume could not be.
func compareMountsByTable(volume, dir *os.File) (mountComparison, error) {
	mounts, err := linux.Mounts(nil)
	if err != nil {
		return mountComparison{}, err
	}
	ofVolume, err := tableMount(mounts, volume)
	if err != nil {
		return mountComparison{}, err
	}
	ofDir, err := tableMount(mounts, dir)
	if err != nil {
		return mountComparison{}, err
	}
	path, err := linux.CurrentPath(dir)
	if err != nil {
		return mountComparison{}, err
	}
	same, isRoot := ofDir.ID == ofVolume.ID, ofDir.Mountpoint == path
	return mountComparison{
		inside: same && !isRoot,
		busy:   !same && isRoot && ofDir.Major == ofVolume.Major && ofDir.Minor == ofVolume.Minor,
	}, nil
}

// tableMount finds the mount of an open directory in the mount table.
func tableMount(mounts []*mountinfo.Info, dir *os.File) (*mountinfo.Info, error) {
	id, err := linux.TableMountID(dir)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(mounts, func(mount *mountinfo.Info) bool { return mount.ID == id })
	if i < 0 {
		return nil, fmt.Errorf("%w: the mount of %s is not in the mount table", errdefs.ErrNotFound, dir.Name())
	}
	return mounts[i], nil
}

// handles are open directories of this process that keep other volumes of pods mounted: the kernel does not unmount a mount that is in
// use, nor one whose copy in another mount namespace is (propagate_mount_busy in fs/pnode.c). Unlike a busy mount, a handle is on one
// mount, and no copy of it appears in other pods that have the same claim. It ends with the process.
type handles struct {
	mu   sync.Mutex
	open map[viewID]handle
}

// viewID identifies the view that an upper in another volume is for.
type viewID struct{ volumeID, target string }

// handle is the root of a volume, and the upper that it is held for.
type handle struct {
	root  *os.File
	upper podVolume
}

func newHandles() *handles { return &handles{open: map[viewID]handle{}} }

// hold keeps the volume of an upper mounted until drop is called.
func (h *handles) hold(upper podVolume) error {
	root, err := upper.openVolume()
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if before, ok := h.open[upper.view()]; ok {
		before.root.Close()
	}
	h.open[upper.view()] = handle{root, upper}
	return nil
}

// held returns the upper of a view whose volume is kept mounted.
func (h *handles) held(view viewID) (upper podVolume, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	held, ok := h.open[view]
	return held.upper, ok
}

func (h *handles) drop(view viewID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if held, ok := h.open[view]; ok {
		held.root.Close()
		delete(h.open, view)
	}
}

func (p podVolume) view() viewID { return viewOf(p.holder) }

func viewOf(holder LockHolder) viewID { return viewID{holder.VolumeID, holder.Target} }

// isShared reports whether another pod has the volume, so that what is mounted in it here is mounted there as well. A volume that is
// no mount, as an emptyDir on the disk, is the pod's own.
func (p podVolume) isShared(volume *os.File) (bool, error) {
	mounted, err := linux.IsMountRoot(volume, "")
	if err != nil || !mounted || p.podDir == "" {
		return false, err
	}
	mounts, err := linux.Mounts(nil)
	if err != nil {
		return false, fmt.Errorf("read the mount table: %w", err)
	}
	own, err := tableMount(mounts, volume)
	if err != nil {
		return false, err
	}
	peers := peerGroup(own, "shared:")
	// In the mount table, links are resolved.
	podDir := strings.TrimSuffix(own.Mountpoint, strings.TrimPrefix(p.at.Volume, p.podDir))
	return peers != "" && slices.ContainsFunc(mounts, func(other *mountinfo.Info) bool {
		return (peerGroup(other, "shared:") == peers || peerGroup(other, "master:") == peers) &&
			strings.HasPrefix(other.Mountpoint, filepath.Dir(podDir)+"/") && !strings.HasPrefix(other.Mountpoint, podDir+"/")
	}), nil
}

// peerGroup returns the number of the peer group that a mount is in ("shared:") or gets mounts from ("master:"), "" if there is none
// (proc_pid_mountinfo(5)).
func peerGroup(mount *mountinfo.Info, kind string) string {
	for field := range strings.FieldsSeq(mount.Optional) {
		if group, ok := strings.CutPrefix(field, kind); ok {
			return group
		}
	}
	return ""
}
