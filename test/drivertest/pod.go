package drivertest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/uuid"
)

// Pod is a pod as kubelet sees it: a name and a directory.
type Pod struct {
	Name, UID string
	node      *Node
}

// Volume is what kubelet knows of a pod's volume when it publishes it. What is left out is as in an inline volume that
// a pod both reads and writes.
type Volume struct {
	// Name of the directory that kubelet keeps for the volume: the pod's volume, or the PersistentVolume.
	Name string
	// ID is the volume handle. Of an inline volume it is made up as kubelet does.
	ID string
	// Attributes are the volume's own keys.
	Attributes map[string]string
	// Claim says that the volume is not inline; Mode is the access mode then.
	Claim    bool
	Mode     csi.VolumeCapability_AccessMode_Mode
	Options  []string
	ReadOnly bool
	// Group is the pod's fsGroup, "" for none.
	Group string
	// Secrets are those of the volume's nodePublishSecretRef.
	Secrets map[string]string
}

// NewPod makes the directory of a new pod.
func (n *Node) NewPod(name string) (*Pod, error) {
	pod := &Pod{Name: name, UID: uuid.NewString(), node: n}
	return pod, os.MkdirAll(filepath.Join(pod.Dir(), "volumes"), 0o755)
}

// Dir is kubelet's directory of the pod.
func (p *Pod) Dir() string { return filepath.Join(p.node.KubeletDir, "pods", p.UID) }

// Remove removes the pod's directory as kubelet does, which refuses as long as there is a volume in it.
func (p *Pod) Remove() error {
	var failed error
	// Kubelet removes a volume's own directory when it is unpublished, and here that is done together.
	volumes, err := filepath.Glob(filepath.Join(p.Dir(), "volumes", "*", "*"))
	failed = errors.Join(failed, err)
	for _, volume := range volumes {
		failed = errors.Join(failed, os.Remove(volume))
	}
	plugins, err := filepath.Glob(filepath.Join(p.Dir(), "volumes", "*"))
	failed = errors.Join(failed, err)
	for _, plugin := range plugins {
		failed = errors.Join(failed, os.Remove(plugin))
	}
	failed = errors.Join(failed, os.RemoveAll(filepath.Join(p.Dir(), "plugins")), os.Remove(filepath.Join(p.Dir(), "volumes")))
	return errors.Join(failed, os.Remove(p.Dir()))
}

// Target is where kubelet wants the volume of that name.
func (p *Pod) Target(volume string) string {
	return filepath.Join(p.Dir(), "volumes", "kubernetes.io~csi", volume, "mount")
}

// Request is the request that kubelet would send for the volume.
func (p *Pod) Request(v Volume) *csi.NodePublishVolumeRequest {
	volumeContext := map[string]string{
		"csi.storage.k8s.io/pod.name":            p.Name,
		"csi.storage.k8s.io/pod.namespace":       "default",
		"csi.storage.k8s.io/pod.uid":             p.UID,
		"csi.storage.k8s.io/serviceAccount.name": "default",
		"csi.storage.k8s.io/ephemeral":           fmt.Sprint(!v.Claim),
	}
	maps.Copy(volumeContext, v.Attributes)
	id, mode := v.ID, v.Mode
	if id == "" {
		id = fmt.Sprintf("csi-%x", sha256.Sum256([]byte(p.UID+v.Name)))
	}
	if mode == csi.VolumeCapability_AccessMode_UNKNOWN {
		mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	}
	capability := Capability(mode, v.Options...)
	capability.GetMount().VolumeMountGroup = v.Group
	return &csi.NodePublishVolumeRequest{
		VolumeId:         id,
		TargetPath:       p.Target(v.Name),
		VolumeContext:    volumeContext,
		Readonly:         v.ReadOnly,
		VolumeCapability: capability,
		Secrets:          v.Secrets,
	}
}

// Publish makes the volume's directory and has the driver publish the volume there, as kubelet does. It returns the
// target path.
func (p *Pod) Publish(ctx context.Context, v Volume) (string, error) {
	request := p.Request(v)
	if err := os.MkdirAll(filepath.Dir(request.TargetPath), 0o750); err != nil {
		return "", err
	}
	_, err := p.node.NodeService().NodePublishVolume(ctx, request)
	return request.TargetPath, err
}

// Unpublish has the driver unpublish the volume, and removes the volume's directory as kubelet does.
func (p *Pod) Unpublish(ctx context.Context, v Volume) error {
	request := p.Request(v)
	_, err := p.node.NodeService().NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: request.VolumeId,
		TargetPath: request.TargetPath})
	if err != nil {
		return err
	}
	err = os.Remove(filepath.Dir(request.TargetPath))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// EmptyDir makes an emptyDir volume in the pod as kubelet does, and returns its path.
func (p *Pod) EmptyDir(name string) (string, error) {
	const plugin = "kubernetes.io~empty-dir"
	path := filepath.Join(p.Dir(), "volumes", plugin, name)
	if err := os.MkdirAll(path, 0o777); err != nil {
		return "", err
	}
	ready := filepath.Join(p.Dir(), "plugins", plugin, name)
	if err := os.MkdirAll(ready, 0o755); err != nil {
		return "", err
	}
	return path, errors.Join(os.Chmod(path, 0o777), os.WriteFile(filepath.Join(ready, "ready"), nil, 0o600))
}

// Capability is a mounted volume's.
func Capability(mode csi.VolumeCapability_AccessMode_Mode, options ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{MountFlags: options}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
	}
}

// Layer makes a layer of files beneath the node's layer root. A name that ends in / is a directory.
func (n *Node) Layer(name string, files map[string]string) (string, error) {
	path := filepath.Join(n.LayerDir, name)
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", err
	}
	for file, content := range files {
		full := filepath.Join(path, file)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			return "", err
		}
		if strings.HasSuffix(file, "/") {
			if err := os.MkdirAll(full, 0o755); err != nil {
				return "", err
			}
		} else if err := os.WriteFile(full, []byte(content), 0o644); err != nil {
			return "", err
		}
	}
	return path, nil
}

// Layers is the value of the key layers for these directories of the layer root, the topmost first.
func Layers(names ...string) string {
	refs := make([]string, len(names))
	for i, name := range names {
		refs[i] = "dir://" + LayerRoot + "/" + name
	}
	return strings.Join(refs, "\n")
}

// CSIVolume makes the directory of another CSI driver's volume in the pod, as kubelet does before it calls that driver,
// and returns where that driver mounts it. lifecycle is Ephemeral or Persistent.
func (p *Pod) CSIVolume(specName, lifecycle string) (string, error) {
	target := p.Target(specName)
	if err := os.MkdirAll(target, 0o750); err != nil {
		return "", err
	}
	data := fmt.Sprintf(`{"driverName":"other.example.com","specVolID":%q,"volumeLifecycleMode":%q}`, specName, lifecycle)
	return target, os.WriteFile(filepath.Join(filepath.Dir(target), "vol_data.json"), []byte(data), 0o600)
}

// ConfigMap makes a ConfigMap volume in the pod as kubelet does, behind its link ..data.
func (p *Pod) ConfigMap(name string, files map[string]string) error {
	path := filepath.Join(p.Dir(), "volumes", "kubernetes.io~configmap", name)
	const generation = "..2026_11_23_00_00_00.1"
	if err := os.MkdirAll(filepath.Join(path, generation), 0o755); err != nil {
		return err
	}
	for file, content := range files {
		if err := os.WriteFile(filepath.Join(path, generation, file), []byte(content), 0o644); err != nil {
			return err
		}
		if err := os.Symlink(filepath.Join("..data", file), filepath.Join(path, file)); err != nil {
			return err
		}
	}
	return os.Symlink(generation, filepath.Join(path, "..data"))
}
