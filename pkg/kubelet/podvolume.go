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

	"github.com/overlay-csi/overlay-csi/pkg/linux"
)

// Volume is a volume of a pod as the API server describes it.
type Volume struct {
	// PersistentVolume is the name of the bound PersistentVolume, "" if the volume has no claim or the claim is not bound.
	PersistentVolume string
	// Claim is the name of the claim, "" if the volume has none.
	Claim string
	// InMemory says that it is an emptyDir whose medium is memory or huge pages, so that kubelet mounts a file system for it.
	InMemory bool
	// Unreachable says why kubelet has no directory for this volume, "" if it has one.
	Unreachable string
}

// ErrNoAPIServer is the error of a driver that has no API server to ask. It is an ErrFailedPrecondition.
var ErrNoAPIServer = fmt.Errorf("%w: the driver has no access to the API server", errdefs.ErrFailedPrecondition)

// apiServer describes the volumes of pods.
type apiServer interface {
	// PodVolume returns ErrInvalidArgument if the pod has no such volume, and [ErrNoAPIServer] if there is nobody to ask.
	PodVolume(ctx context.Context, pod Pod, name string) (Volume, error)
}

// PodVolumes finds the volumes of a pod in kubelet's directory.
type PodVolumes struct {
	dir  Dir
	api  apiServer
	wait time.Duration
}

// NewPodVolumes returns a PodVolumes that waits at most this long until kubelet has mounted a volume. Without an API server, it does
// not find volumes whose directory has the name of a PersistentVolume.
func NewPodVolumes(dir Dir, api apiServer, wait time.Duration) *PodVolumes {
	return &PodVolumes{dir: dir, api: api, wait: wait}
}

// Wait is how long Open waits until kubelet has mounted a volume.
func (v *PodVolumes) Wait() time.Duration { return v.wait }

// writtenByKubelet are plugins whose directories have the name of the pod's volume, never that of a PersistentVolume.
var writtenByKubelet = []string{"kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"}

const csiPlugin = "kubernetes.io~csi"

// errNotMounted means that kubelet has not set up the volume yet.
var errNotMounted = errors.New("kubelet has not mounted it yet")

// apiWait is how long the API server has for an answer when the wait for kubelet is over. It is shorter than the patience of package layer
// with the file system of a volume, which would be blamed.
const apiWait = 2 * time.Second

// pollInterval is the time between two looks into kubelet's directory.
const pollInterval = 20 * time.Millisecond

// Open opens the root directory of a volume of the pod (O_PATH). Kubelet mounts the volumes of a pod concurrently and in any order,
// so Open waits for it. It returns ErrUnavailable when that takes too long; kubelet then tries the publish again.
func (v *PodVolumes) Open(ctx context.Context, pod Pod, name string) (*os.File, error) {
	if pod.UID == "" {
		return nil, fmt.Errorf("%w: volume %q of the pod: kubelet sent no pod information; set podInfoOnMount: true in the CSIDriver object",
			errdefs.ErrFailedPrecondition, name)
	}
	if err := errors.Join(validName(pod.UID), validName(name)); err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	deadline := time.Now().Add(v.wait)
	volume := &search{pod: pod, name: name, deadline: deadline}
	for {
		root, err := v.open(ctx, volume)
		if !errors.Is(err, errNotMounted) {
			return root, err
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%w: volume %q of pod %s: %w after %s; kubelet mounts only volumes in the volumeMounts of a container, "+
				"and will retry", errdefs.ErrUnavailable, name, pod, err, v.wait)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait until volume %q of pod %s is mounted: %w", name, pod, ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}

// search is a volume that Open looks for, with what it has learned of it.
type search struct {
	pod  Pod
	name string
	// deadline is when the wait for kubelet ends.
	deadline time.Time
	// known is the API server's answer, nil as long as it is not final.
	known *Volume
	// mediumErr is why the API server does not say what medium an emptyDir has.
	mediumErr error
}

// open looks once. It asks the API server only for a volume that it does not find by its own name, and for the medium of an emptyDir.
func (v *PodVolumes) open(ctx context.Context, volume *search) (*os.File, error) {
	root, err := v.openEmptyDir(ctx, volume)
	if !errors.Is(err, fs.ErrNotExist) {
		return root, err
	}
	pod, name := volume.pod, volume.name
	for _, plugin := range writtenByKubelet {
		root, err := v.openPlugin(pod, plugin, name)
		if !errors.Is(err, fs.ErrNotExist) {
			return root, err
		}
	}
	if v.isInlineCSI(pod, name) {
		return v.openPlugin(pod, csiPlugin, name)
	}
	if volume.known == nil {
		known, err := v.ask(ctx, volume)
		if errors.Is(err, ErrNoAPIServer) {
			// It may still be a volume that is found by its own name, so this alone is no reason to give up.
			return nil, fmt.Errorf("%w (%v)", errNotMounted, err)
		}
		if err != nil {
			return nil, err
		}
		if known.Unreachable != "" {
			return nil, fmt.Errorf("%w: volume %q of pod %s: %s", errdefs.ErrInvalidArgument, name, pod, known.Unreachable)
		}
		if known.Claim != "" && known.PersistentVolume == "" {
			return nil, fmt.Errorf("%w: volume %q of pod %s: claim %s is not bound", errdefs.ErrUnavailable, name, pod, known.Claim)
		}
		volume.known = &known
	}
	specName := name
	if volume.known.PersistentVolume != "" {
		specName = volume.known.PersistentVolume
	}
	return v.openAnyPlugin(pod, specName)
}

// ask asks the API server for the volume. It returns ErrUnavailable if there is no answer in time.
func (v *PodVolumes) ask(ctx context.Context, volume *search) (Volume, error) {
	began := time.Now()
	deadline := volume.deadline
	if began.After(deadline) {
		// A look at the file system took longer.
		deadline = began
	}
	inTime, cancel := context.WithDeadline(ctx, deadline.Add(apiWait))
	defer cancel()
	known, err := v.api.PodVolume(inTime, volume.pod, volume.name)
	if err != nil && inTime.Err() != nil && ctx.Err() == nil {
		return known, fmt.Errorf("%w: the API server has not answered for %s, and kubelet will retry: %v",
			errdefs.ErrUnavailable, time.Since(began).Round(time.Second), err)
	}
	return known, err
}

// openAnyPlugin opens the volume of that name whatever plugin it belongs to. The name comes from the API server.
func (v *PodVolumes) openAnyPlugin(pod Pod, specName string) (*os.File, error) {
	if err := validName(specName); err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	plugins, err := os.ReadDir(filepath.Join(v.podDir(pod), "volumes"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list volumes of pod %s: %w", pod, err)
	}
	for _, plugin := range plugins {
		if plugin.Name() == emptyDirPlugin {
			// It would have been found by its own name.
			continue
		}
		root, err := v.openPlugin(pod, plugin.Name(), specName)
		if !errors.Is(err, fs.ErrNotExist) {
			return root, err
		}
	}
	return nil, errNotMounted
}

// openPlugin opens a volume of a plugin. It returns fs.ErrNotExist if kubelet has no such directory, and errNotMounted if kubelet has
// not finished setting it up.
func (v *PodVolumes) openPlugin(pod Pod, plugin, specName string) (*os.File, error) {
	path := filepath.Join(v.podDir(pod), "volumes", plugin, specName)
	if plugin == csiPlugin {
		if _, err := os.Lstat(path); err != nil {
			return nil, err
		}
		path = filepath.Join(path, "mount")
	}
	root, err := linux.Open(nil, path, linux.O_PATH|linux.O_DIRECTORY|linux.O_NOFOLLOW, linux.ResolveNoMagicLinks)
	if err != nil {
		if plugin == csiPlugin && errors.Is(err, fs.ErrNotExist) {
			return nil, errNotMounted
		}
		return nil, err
	}
	ready, err := v.isReady(plugin, root)
	if err == nil && !ready {
		err = errNotMounted
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// isReady reports whether kubelet has finished setting up the volume. Volumes that kubelet writes have the link "..data" then, and all
// others but emptyDirs are mounts.
func (v *PodVolumes) isReady(plugin string, root *os.File) (bool, error) {
	if slices.Contains(writtenByKubelet, plugin) {
		_, err := linux.Fstatat(root, "..data")
		return err == nil, ignoreNotExist(err)
	}
	return linux.IsMountRoot(root, "")
}

// isInlineCSI reports whether the pod has an inline CSI volume of that name. The volumes of claims are in the same directory under the
// names of their PersistentVolumes, and a pod must not reach one volume by the name of another.
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
