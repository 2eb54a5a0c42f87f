package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// unrecorded finds and releases what volumes have that is in no record, or in none that can be read.
type unrecorded struct {
	records *record.Store
	uppers  uppers
	views   views
	ledger  *ledger
}

// release releases what a view at a target had: its upper in the data root, unless another view has it, and its uppers in other
// volumes of the pod.
func (u unrecorded) release(ctx context.Context, id, target string) error {
	for _, base := range []string{u.uppers.volumeBase(id), u.uppers.podBase(id, target)} {
		if err := u.releaseBase(ctx, base); err != nil && !errors.Is(err, overlay.ErrUpperInUse) {
			return err
		}
	}
	return u.releasePodVolumes(ctx, id, target)
}

// maxUnknown is how many mounts a message names. The pod chooses their paths.
const maxUnknown = 3

// releasePodVolumes releases what a view at a target had in other volumes of the pod. The view is unmounted. It returns ErrDataLoss if
// there is something in use of which it is not known whose it is. The volume may have been unpublished long ago: then there is no record,
// and what other views of the pod have must not be in the way.
func (u unrecorded) releasePodVolumes(ctx context.Context, id, target string) error {
	dir := u.uppers.podDir(target)
	if dir == "" || !exists(dir) {
		return nil
	}
	holder := upper.LockHolder{Node: u.uppers.node, VolumeID: id, Target: target}
	found, err := u.uppers.backends.FindPodVolumes(dir, holder)
	if err != nil {
		return err
	}
	for _, held := range found.Held {
		if err := held.Release(ctx); err != nil {
			return err
		}
	}
	unknown := u.unexplained(found, target)
	if len(unknown) == 0 {
		return nil
	}
	var paths []string
	for _, mount := range unknown[:min(len(unknown), maxUnknown)] {
		paths = append(paths, mount.String())
	}
	return fmt.Errorf("%w: volume %s has no record that can be read, and the mounts at %s may be the volume's, so that the pod "+
		"cannot end; restore %s, or unmount them",
		errdefs.ErrDataLoss, id, strings.Join(paths, ", "), dataroot.Record)
}

// unexplained returns the busy mounts that cannot be explained by the mounted views at other targets. By its record, each of these has
// its upper in one volume, and one busy mount there, which may be one that is known to be its own.
func (u unrecorded) unexplained(found upper.FoundPodVolumes, target string) []upper.PodVolumePath {
	mounts := found.Unknown
	if len(mounts) == 0 {
		return nil
	}
	ids, err := u.records.List()
	if err != nil {
		return mounts // Nothing explains any.
	}
	others := map[string]int{}
	for _, id := range ids {
		r, err := u.records.Load(id)
		if err != nil {
			continue // It explains nothing.
		}
		for _, p := range r.Publications {
			isThere := slices.ContainsFunc(mounts, func(m upper.PodVolumePath) bool { return m.Volume == p.PodVolume.Volume })
			isKnown := slices.ContainsFunc(found.Others, func(h upper.LockHolder) bool { return h.VolumeID == id && h.Target == p.Target })
			if !isThere || isKnown || p.Target == target {
				continue
			}
			if live, err := u.views.isLive(&p); err == nil && live {
				others[p.PodVolume.Volume]++
			}
		}
	}
	return slices.DeleteFunc(mounts, func(m upper.PodVolumePath) bool {
		others[m.Volume]--
		return others[m.Volume] >= 0
	})
}

// checkNoUppers returns ErrDataLoss if the directory of a volume without a record contains an upper, which another volume must not
// take over.
func (u unrecorded) checkNoUppers(id string) error {
	dir := u.records.Dir(id)
	if !record.ContainsUppers(dir) {
		return nil
	}
	return fmt.Errorf("%w: %s contains an upper without its record, so that its layers are unknown; restore %s or move the directory away",
		errdefs.ErrDataLoss, dir, dataroot.Record)
}

// discard discards the directory of a volume with all uppers in it, also those that no record names. It returns
// ErrFailedPrecondition if a view is mounted on one of them.
func (u unrecorded) discard(ctx context.Context, id string) error {
	bases := []string{u.uppers.volumeBase(id)}
	pods := filepath.Join(u.uppers.volumeBase(id), dataroot.PodUppers)
	entries, err := os.ReadDir(filepath.Join(u.uppers.root, pods))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("find the uppers of volume %s: %w", id, err)
	}
	for _, entry := range entries {
		bases = append(bases, filepath.Join(pods, entry.Name()))
	}
	for _, base := range bases {
		if err := u.releaseBase(ctx, base); err != nil {
			return fmt.Errorf("discard volume %s: %w", id, err)
		}
	}
	return u.ledger.discard(id)
}

// releaseBase releases the upper in a base directory of which no record says anything. It returns ErrUpperInUse if an overlay is
// mounted on it.
func (u unrecorded) releaseBase(ctx context.Context, base string) error {
	found := u.uppers.backends.OpenUnrecorded(base)
	path, _ := found.Paths()
	dir, err := linux.Open(nil, path, linux.O_PATH|linux.O_DIRECTORY|linux.O_NOFOLLOW, 0)
	switch {
	case err == nil:
		inUse, err := u.views.UpperInUse(dir)
		dir.Close()
		if err != nil {
			return err
		}
		if inUse {
			return fmt.Errorf("%w: %w: %s; restore %s, or delete the pod",
				errdefs.ErrFailedPrecondition, overlay.ErrUpperInUse, path, dataroot.Record)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("open the upper: %w", err)
	}
	return found.Release(ctx)
}
