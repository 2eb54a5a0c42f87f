package upper

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

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
