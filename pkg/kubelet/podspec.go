package kubelet

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
)

// PodSpecs reads pods and claims from the API server: get on both is all the right it needs.
type PodSpecs struct {
	client corev1client.CoreV1Interface
}

// NewPodSpecs returns a reader on the API server that config names. It does not connect yet.
func NewPodSpecs(config *rest.Config) (*PodSpecs, error) {
	client, err := corev1client.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make a client of the API server: %w", err)
	}
	return &PodSpecs{client: client}, nil
}

// Volume says what the pod's volume of that name is. The error is Unavailable where the API server did not answer,
// InvalidArgument where the pod has no such volume.
func (s *PodSpecs) Volume(ctx context.Context, ref Pod, name string) (Volume, error) {
	pod, err := s.client.Pods(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
	if err != nil {
		return Volume{}, apiError(fmt.Sprintf("get pod %s", ref), err)
	}
	if string(pod.UID) != ref.UID {
		return Volume{}, fmt.Errorf("%w: pod %s is another one by now (%s instead of %s)", errdefs.ErrUnavailable, ref, pod.UID, ref.UID)
	}
	for _, volume := range pod.Spec.Volumes {
		if volume.Name != name {
			continue
		}
		if !isMounted(pod, name) {
			return Volume{}, fmt.Errorf("%w: no container of pod %s mounts volume %q, and kubelet does not set up what nobody mounts: name it in the volumeMounts of a container", errdefs.ErrInvalidArgument, ref, name)
		}
		return s.describe(ctx, pod, volume)
	}
	return Volume{}, fmt.Errorf("%w: pod %s has no volume %q", errdefs.ErrInvalidArgument, ref, name)
}

// Annotations are those of a claim. The error is Unavailable where the API server did not answer, NotFound where there is
// no such claim.
func (s *PodSpecs) Annotations(ctx context.Context, namespace, name string) (map[string]string, error) {
	claim, err := s.client.PersistentVolumeClaims(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("%w: claim %s/%s is gone: %w", errdefs.ErrNotFound, namespace, name, err)
	}
	if err != nil {
		return nil, apiError(fmt.Sprintf("get claim %s/%s", namespace, name), err)
	}
	return claim.Annotations, nil
}

// isMounted reports whether a container mounts the volume: kubelet sets up no other ones.
func isMounted(pod *corev1.Pod, name string) bool {
	isIt := func(mount corev1.VolumeMount) bool { return mount.Name == name }
	for _, container := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if slices.ContainsFunc(container.VolumeMounts, isIt) {
			return true
		}
	}
	return slices.ContainsFunc(pod.Spec.EphemeralContainers, func(container corev1.EphemeralContainer) bool {
		return slices.ContainsFunc(container.VolumeMounts, isIt)
	})
}

func (s *PodSpecs) describe(ctx context.Context, pod *corev1.Pod, volume corev1.Volume) (Volume, error) {
	var claimName string
	switch {
	case volume.HostPath != nil:
		return Volume{Unreachable: "a hostPath volume has no directory of kubelet's: offer the directory as a layer root instead"}, nil
	case volume.Image != nil:
		return Volume{Unreachable: "an image volume is mounted by the container runtime, out of reach: name the image as oci:// instead"}, nil
	case volume.PersistentVolumeClaim != nil:
		claimName = volume.PersistentVolumeClaim.ClaimName
	case volume.Ephemeral != nil:
		// The name of the claim that the ephemeral controller makes, as its documentation fixes it.
		claimName = pod.Name + "-" + volume.Name
	default:
		return Volume{}, nil
	}
	claim, err := s.client.PersistentVolumeClaims(pod.Namespace).Get(ctx, claimName, metav1.GetOptions{})
	if err != nil {
		return Volume{}, apiError(fmt.Sprintf("get claim %s/%s", pod.Namespace, claimName), err)
	}
	if volume.Ephemeral != nil && !metav1.IsControlledBy(claim, pod) {
		return Volume{}, fmt.Errorf("%w: claim %s/%s was not made for pod %s", errdefs.ErrFailedPrecondition, pod.Namespace, claimName, pod.Name)
	}
	if claim.Spec.VolumeMode != nil && *claim.Spec.VolumeMode == corev1.PersistentVolumeBlock {
		return Volume{Unreachable: fmt.Sprintf("claim %s is a raw block volume: it has no directory", claimName)}, nil
	}
	return Volume{Claim: claimName, PersistentVolume: claim.Spec.VolumeName}, nil
}

func apiError(action string, err error) error {
	if apierrors.IsForbidden(err) {
		return fmt.Errorf("%w: %s: the driver's ServiceAccount needs the right to get pods and persistentvolumeclaims: %w", errdefs.ErrFailedPrecondition, action, err)
	}
	return fmt.Errorf("%w: %s: %w", errdefs.ErrUnavailable, action, err)
}
