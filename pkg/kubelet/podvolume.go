package kubelet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Volume is what a name among a pod's volumes stands for.
type Volume struct {
	// PersistentVolume is the name of the bound PersistentVolume, "" where the volume is none or is not bound yet.
	PersistentVolume string
	// Claim is the name of the claim, "" where the volume is not of a claim.
	Claim string
	// Unreachable says why kubelet keeps no directory of this volume, "" where it does.
	Unreachable string
}

// podSpecs reads what the API server knows of a pod's volumes. The error is of the kind NotFound where the pod has no
// such volume.
type podSpecs interface {
	Volume(ctx context.Context, pod Pod, name string) (Volume, error)
}

// PodVolumes finds the volumes of a pod in kubelet's directory.
type PodVolumes struct {
	dir   Dir
	specs podSpecs
	wait  time.Duration
}

// NewPodVolumes returns a finder that waits at most this long for kubelet to mount a volume. specs may be nil: then
// volumes that kubelet keeps under the name of a PersistentVolume are not found.
func NewPodVolumes(dir Dir, specs podSpecs, wait time.Duration) *PodVolumes {
	return &PodVolumes{dir: dir, specs: specs, wait: wait}
}

// Plugins whose directories are named for the pod's volume, never for a PersistentVolume, by how kubelet shows that
// such a volume is set up.
const emptyDirPlugin = "kubernetes.io~empty-dir"

var writtenByKubelet = []string{"kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"}

const csiPlugin = "kubernetes.io~csi"

// errNotMounted says that kubelet has not set the volume up yet.
var errNotMounted = errors.New("kubelet has not mounted it yet")

// pollInterval is how often kubelet's directory is looked at while it mounts the volume.
const pollInterval = 20 * time.Millisecond

// Open opens the root directory of a volume of the pod (O_PATH). Kubelet mounts a pod's volumes in any order and side
// by side: Open waits for it, and answers Unavailable when it has waited long enough, so that kubelet asks again.
func (v *PodVolumes) Open(ctx context.Context, pod Pod, name string) (*os.File, error) {
	if pod.UID == "" {
		return nil, fmt.Errorf("%w: volume %q of the pod: kubelet sent no pod information: the CSIDriver object needs podInfoOnMount: true", errdefs.ErrFailedPrecondition, name)
	}
	if err := errors.Join(validName(pod.UID), validName(name)); err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	deadline := time.Now().Add(v.wait)
	var known *Volume
	for {
		root, err := v.open(ctx, pod, name, &known)
		if !errors.Is(err, errNotMounted) {
			return root, err
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%w: volume %q of pod %s: %w after %s; it is tried again (kubelet mounts only what a container of the pod names in its volumeMounts)", errdefs.ErrUnavailable, name, pod, err, v.wait)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for volume %q of pod %s: %w", name, pod, ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}

// open looks once. It asks the API server only for a volume that the directory alone does not tell, and remembers the
// answer in known as soon as that is final.
func (v *PodVolumes) open(ctx context.Context, pod Pod, name string, known **Volume) (*os.File, error) {
	for _, plugin := range slices.Concat([]string{emptyDirPlugin}, writtenByKubelet) {
		root, err := v.openPlugin(pod, plugin, name)
		if !errors.Is(err, fs.ErrNotExist) {
			return root, err
		}
	}
	if v.isInlineCSI(pod, name) {
		return v.openPlugin(pod, csiPlugin, name)
	}
	if v.specs == nil {
		return nil, fmt.Errorf("%w (a volume of a claim is found only with access to the API server: see --kubeconfig)", errNotMounted)
	}
	if *known == nil {
		volume, err := v.specs.Volume(ctx, pod, name)
		if err != nil {
			return nil, err
		}
		if volume.Unreachable != "" {
			return nil, fmt.Errorf("%w: volume %q of pod %s: %s", errdefs.ErrInvalidArgument, name, pod, volume.Unreachable)
		}
		if volume.Claim != "" && volume.PersistentVolume == "" {
			return nil, fmt.Errorf("%w: volume %q of pod %s: claim %s is not bound", errdefs.ErrUnavailable, name, pod, volume.Claim)
		}
		*known = &volume
	}
	specName := name
	if (*known).PersistentVolume != "" {
		specName = (*known).PersistentVolume
	}
	return v.openAnyPlugin(pod, specName)
}

// openAnyPlugin opens the volume of that name whatever plugin it belongs to: the API server said whose name it is.
func (v *PodVolumes) openAnyPlugin(pod Pod, specName string) (*os.File, error) {
	if err := validName(specName); err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	plugins, err := os.ReadDir(filepath.Join(v.podDir(pod), "volumes"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the volumes of pod %s: %w", pod, err)
	}
	for _, plugin := range plugins {
		root, err := v.openPlugin(pod, plugin.Name(), specName)
		if !errors.Is(err, fs.ErrNotExist) {
			return root, err
		}
	}
	return nil, errNotMounted
}

// openPlugin opens one volume of one plugin once it is set up. The error is fs.ErrNotExist where kubelet has no such
// directory, errNotMounted where it has and is not done with it.
func (v *PodVolumes) openPlugin(pod Pod, plugin, specName string) (*os.File, error) {
	path := filepath.Join(v.podDir(pod), "volumes", plugin, specName)
	if plugin == csiPlugin {
		if _, err := os.Lstat(path); err != nil {
			return nil, err
		}
		path = filepath.Join(path, "mount")
	}
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		if plugin == csiPlugin && errors.Is(err, fs.ErrNotExist) {
			return nil, errNotMounted
		}
		return nil, &os.PathError{Op: "openat2", Path: path, Err: err}
	}
	root := os.NewFile(uintptr(fd), path)
	ready, err := v.isReady(pod, plugin, specName, root)
	if err == nil && !ready {
		err = errNotMounted
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// isReady reports whether kubelet is done with the volume: an emptyDir has a file "ready" beside kubelet's data of it,
// what kubelet writes itself has the link "..data", and everything else is mounted.
func (v *PodVolumes) isReady(pod Pod, plugin, specName string, root *os.File) (bool, error) {
	switch {
	case plugin == emptyDirPlugin:
		_, err := os.Lstat(filepath.Join(v.podDir(pod), "plugins", emptyDirPlugin, specName, "ready"))
		return err == nil, ignoreNotExist(err)
	case slices.Contains(writtenByKubelet, plugin):
		var stat unix.Stat_t
		err := unix.Fstatat(int(root.Fd()), "..data", &stat, unix.AT_SYMLINK_NOFOLLOW)
		return err == nil, ignoreNotExist(err)
	}
	var stat unix.Statx_t
	if err := unix.Statx(int(root.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &stat); err != nil {
		return false, fmt.Errorf("statx %s: %w", root.Name(), err)
	}
	return stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// isInlineCSI reports whether kubelet has a CSI volume of that name that is inline in the pod. Kubelet keeps a claim's
// in the same place under its PersistentVolume's name, and a pod must not reach one volume by the name of another.
func (v *PodVolumes) isInlineCSI(pod Pod, name string) bool {
	file, err := os.Open(filepath.Join(v.podDir(pod), "volumes", csiPlugin, name, "vol_data.json"))
	if err != nil {
		return false
	}
	defer file.Close()
	var data struct {
		VolumeLifecycleMode string `json:"volumeLifecycleMode"`
	}
	if err := json.NewDecoder(io.LimitReader(file, 1<<20)).Decode(&data); err != nil {
		return false
	}
	return data.VolumeLifecycleMode == "Ephemeral"
}

func (v *PodVolumes) podDir(pod Pod) string {
	return filepath.Join(string(v.dir), "pods", pod.UID)
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
