package kubeapi

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
)

// Reader is what the driver asks of the API server. [Client] and [None] implement it.
type Reader interface {
	PodVolume(ctx context.Context, pod kubelet.Pod, name string) (kubelet.Volume, error)
	ClaimAnnotations(ctx context.Context, namespace, name string) (map[string]string, error)
	ClaimReference(ctx context.Context, namespace, name string) (*corev1.ObjectReference, error)
	VolumeTopology(ctx context.Context, driver, handle, label string) ([]string, error)
	PodPhase(ctx context.Context, pod kubelet.Pod) (corev1.PodPhase, error)
}

// New returns a Client for the API server that [Config] finds, or [None] if it finds none. New does not connect.
func New(kubeconfig string) (Reader, error) {
	config, err := Config(kubeconfig)
	if errors.Is(err, rest.ErrNotInCluster) {
		return None{}, nil
	}
	if err != nil {
		return nil, err
	}
	return NewClient(config)
}

// Config returns the configuration of a client for the API server that the kubeconfig file names. If the path is empty, it is the API
// server of the cluster that this process runs in, or the error is rest.ErrNotInCluster.
func Config(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		return clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	config, err := rest.InClusterConfig()
	if err != nil && !errors.Is(err, rest.ErrNotInCluster) {
		return nil, fmt.Errorf("configure the API server's client from the pod's ServiceAccount: %w", err)
	}
	return config, err
}

// Client reads pods and claims from an API server. It needs the right to get both.
type Client struct {
	client corev1client.CoreV1Interface
}

// NewClient returns a client of the API server that config names. It does not connect.
func NewClient(config *rest.Config) (*Client, error) {
	client, err := corev1client.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("create a client of the API server: %w", err)
	}
	return &Client{client: client}, nil
}

// PodVolume returns the volume of that name in the pod's specification. It returns ErrInvalidArgument if the pod has no such volume
// or no container mounts it, ErrFailedPrecondition if the driver may not read the pod or its claim or if the claim was not created for
// the pod, and ErrUnavailable if the API
// server did not answer.
func (c *Client) PodVolume(ctx context.Context, ref kubelet.Pod, name string) (kubelet.Volume, error) {
	pod, err := c.client.Pods(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
	if err != nil {
		return kubelet.Volume{}, apiError(fmt.Sprintf("get pod %s", ref), err)
	}
	if string(pod.UID) != ref.UID {
		return kubelet.Volume{}, fmt.Errorf("%w: pod %s was recreated: UID is %s, request is for %s",
			errdefs.ErrUnavailable, ref, pod.UID, ref.UID)
	}
	for _, volume := range pod.Spec.Volumes {
		if volume.Name != name {
			continue
		}
		if !isMounted(pod, name) {
			return kubelet.Volume{}, fmt.Errorf("%w: volume %q of pod %s is not mounted by kubelet; add it to the volumeMounts of a container",
				errdefs.ErrInvalidArgument, name, ref)
		}
		return c.resolve(ctx, pod, volume)
	}
	return kubelet.Volume{}, fmt.Errorf("%w: pod %s has no volume %q", errdefs.ErrInvalidArgument, ref, name)
}

// ClaimAnnotations returns the annotations of a claim. It returns ErrNotFound if there is no such claim, ErrFailedPrecondition if the
// driver may not read it, and ErrUnavailable if the API server did not answer.
func (c *Client) ClaimAnnotations(ctx context.Context, namespace, name string) (map[string]string, error) {
	claim, err := c.claim(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	return claim.Annotations, nil
}

// ClaimReference returns what an event about a claim refers to. The errors are those of ClaimAnnotations.
func (c *Client) ClaimReference(ctx context.Context, namespace, name string) (*corev1.ObjectReference, error) {
	claim, err := c.claim(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	return &corev1.ObjectReference{
		APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: namespace, Name: name, UID: claim.UID, ResourceVersion: claim.ResourceVersion,
	}, nil
}

func (c *Client) claim(ctx context.Context, namespace, name string) (*corev1.PersistentVolumeClaim, error) {
	claim, err := c.client.PersistentVolumeClaims(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("%w: claim %s/%s does not exist: %w", errdefs.ErrNotFound, namespace, name, err)
	}
	if err != nil {
		return nil, apiError(fmt.Sprintf("get claim %s/%s", namespace, name), err)
	}
	return claim, nil
}

// PodPhase returns the phase of a pod. It returns ErrNotFound if the pod is gone, also where another one has its name,
// ErrFailedPrecondition if the driver may not read it, and ErrUnavailable if the API server did not answer.
func (c *Client) PodPhase(ctx context.Context, ref kubelet.Pod) (corev1.PodPhase, error) {
	pod, err := c.client.Pods(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "", fmt.Errorf("%w: pod %s is gone: %w", errdefs.ErrNotFound, ref, err)
	}
	if err != nil {
		return "", apiError(fmt.Sprintf("get pod %s", ref), err)
	}
	if string(pod.UID) != ref.UID {
		return "", fmt.Errorf("%w: pod %s with the UID %s is gone, and another one has its name", errdefs.ErrNotFound, ref, ref.UID)
	}
	return pod.Status.Phase, nil
}

// isMounted reports whether a container mounts the volume. Kubelet does not set up the others.
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

// resolve returns where kubelet has the volume, with the PersistentVolume that its claim is bound to.
func (c *Client) resolve(ctx context.Context, pod *corev1.Pod, volume corev1.Volume) (kubelet.Volume, error) {
	var claimName string
	switch {
	case volume.HostPath != nil:
		return kubelet.Volume{Unreachable: "kubelet has no directory for a hostPath volume; configure the directory as a layer root"}, nil
	case volume.Image != nil:
		return kubelet.Volume{Unreachable: "the container runtime mounts image volumes; name the image as an oci:// layer"}, nil
	case volume.EmptyDir != nil:
		return kubelet.Volume{InMemory: volume.EmptyDir.Medium != corev1.StorageMediumDefault}, nil
	case volume.PersistentVolumeClaim != nil:
		claimName = volume.PersistentVolumeClaim.ClaimName
	case volume.Ephemeral != nil:
		// The documented name of the claim that the ephemeral volume controller creates.
		claimName = pod.Name + "-" + volume.Name
	default:
		return kubelet.Volume{}, nil
	}
	claim, err := c.client.PersistentVolumeClaims(pod.Namespace).Get(ctx, claimName, metav1.GetOptions{})
	if err != nil {
		return kubelet.Volume{}, apiError(fmt.Sprintf("get claim %s/%s", pod.Namespace, claimName), err)
	}
	if volume.Ephemeral != nil && !metav1.IsControlledBy(claim, pod) {
		return kubelet.Volume{}, fmt.Errorf("%w: claim %s/%s was not created for pod %s",
			errdefs.ErrFailedPrecondition, pod.Namespace, claimName, pod.Name)
	}
	if claim.Spec.VolumeMode != nil && *claim.Spec.VolumeMode == corev1.PersistentVolumeBlock {
		return kubelet.Volume{Unreachable: fmt.Sprintf("claim %s is a raw block volume, which has no directory", claimName)}, nil
	}
	return kubelet.Volume{Claim: claimName, PersistentVolume: claim.Spec.VolumeName}, nil
}

func apiError(action string, err error) error {
	if apierrors.IsForbidden(err) {
		return fmt.Errorf("%w: %s: %w; the driver's ServiceAccount needs that right",
			errdefs.ErrFailedPrecondition, action, err)
	}
	return fmt.Errorf("%w: %s: %w", errdefs.ErrUnavailable, action, err)
}

// NodeExists reports whether the cluster has a Node of that name. It needs the right to get nodes. It returns ErrUnavailable if the API
// server did not answer.
func (c *Client) NodeExists(ctx context.Context, name string) (bool, error) {
	_, err := c.client.Nodes().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, apiError("get node "+name, err)
	}
	return true, nil
}

// VolumeTopology returns the values that the node affinity of a PersistentVolume permits for a label. It returns none if no
// PersistentVolume of that driver has that handle, or if it has no node affinity, and ErrFailedPrecondition if it has another one. It needs
// the right to get and list persistentvolumes.
func (c *Client) VolumeTopology(ctx context.Context, driver, handle, label string) ([]string, error) {
	volume, err := c.findVolume(ctx, driver, handle)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if volume.Spec.NodeAffinity == nil || volume.Spec.NodeAffinity.Required == nil {
		return nil, nil
	}
	var values []string
	for _, term := range volume.Spec.NodeAffinity.Required.NodeSelectorTerms {
		for _, expression := range term.MatchExpressions {
			if expression.Key == label && expression.Operator == corev1.NodeSelectorOpIn {
				values = append(values, expression.Values...)
			}
		}
	}
	if len(values) == 0 {
		return nil, fmt.Errorf("%w: the node affinity of PersistentVolume %s does not name nodes by %s; delete what the volume has on its node "+
			"by hand, and set its reclaim policy to Retain", errdefs.ErrFailedPrecondition, volume.Name, label)
	}
	return values, nil
}

// findVolume returns the PersistentVolume of a driver with a handle, or ErrNotFound. Most often it is that whose name is the handle:
// external-provisioner gives the driver its name.
func (c *Client) findVolume(ctx context.Context, driver, handle string) (*corev1.PersistentVolume, error) {
	isIt := func(volume *corev1.PersistentVolume) bool {
		source := volume.Spec.CSI
		return source != nil && source.Driver == driver && source.VolumeHandle == handle
	}
	volume, err := c.client.PersistentVolumes().Get(ctx, handle, metav1.GetOptions{})
	if err == nil && isIt(volume) {
		return volume, nil
	}
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsBadRequest(err) && !apierrors.IsInvalid(err) {
		return nil, apiError("get persistentvolume "+handle, err)
	}
	options := metav1.ListOptions{Limit: 500}
	for {
		page, err := c.client.PersistentVolumes().List(ctx, options)
		if err != nil {
			return nil, apiError("list persistentvolumes", err)
		}
		for i := range page.Items {
			if isIt(&page.Items[i]) {
				return &page.Items[i], nil
			}
		}
		if options.Continue = page.Continue; options.Continue == "" {
			return nil, fmt.Errorf("%w: a PersistentVolume with the handle %s", errdefs.ErrNotFound, handle)
		}
	}
}
