package kubeapi

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
)

// None is a [Reader] for a driver that has no access to an API server.
type None struct{}

// PodVolume returns [kubelet.ErrNoAPIServer].
func (None) PodVolume(_ context.Context, pod kubelet.Pod, name string) (kubelet.Volume, error) {
	return kubelet.Volume{}, noAccess(fmt.Sprintf("find volume %q of pod %s", name, pod))
}

// ClaimAnnotations returns [kubelet.ErrNoAPIServer].
func (None) ClaimAnnotations(_ context.Context, namespace, name string) (map[string]string, error) {
	return nil, noAccess(fmt.Sprintf("read claim %s/%s", namespace, name))
}

// ClaimReference returns [kubelet.ErrNoAPIServer].
func (None) ClaimReference(_ context.Context, namespace, name string) (*corev1.ObjectReference, error) {
	return nil, noAccess(fmt.Sprintf("read claim %s/%s", namespace, name))
}

// VolumeTopology returns [kubelet.ErrNoAPIServer].
func (None) VolumeTopology(_ context.Context, _, handle, _ string) ([]string, error) {
	return nil, noAccess("find the PersistentVolume of volume " + handle)
}

// PodPhase returns [kubelet.ErrNoAPIServer].
func (None) PodPhase(_ context.Context, pod kubelet.Pod) (corev1.PodPhase, error) {
	return "", noAccess(fmt.Sprintf("read the phase of pod %s", pod))
}

func noAccess(action string) error {
	return fmt.Errorf("%s: %w; run it in a pod with a ServiceAccount or set --kubeconfig", action, kubelet.ErrNoAPIServer)
}
