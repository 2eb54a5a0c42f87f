package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
)

// driverOptions say where the driver is.
type driverOptions struct {
	// name is that of the CSIDriver. namespace and selector are those of its pods.
	name, namespace, selector string
}

// driverContainer is the container of the driver's pods that has overlayctl.
const driverContainer = "driver"

// finder finds volumes, and the driver's pods that have them.
type finder struct {
	client    kubernetes.Interface
	namespace string
	driver    driverOptions
}

// volume is a volume on a node.
type volume struct {
	handle string
	node   string
	// pod is the UID of the pod that it was named by, "" for none.
	pod string
}

// find returns the volume that the arguments of a command name: POD VOLUME, or pvc/NAME.
func (f *finder) find(ctx context.Context, args []string) (volume, error) {
	if len(args) == 2 {
		return f.ofPod(ctx, args[0], args[1])
	}
	for _, prefix := range []string{"pvc/", "persistentvolumeclaim/", "persistentvolumeclaims/"} {
		if name, ok := strings.CutPrefix(args[0], prefix); ok {
			return f.ofClaim(ctx, name)
		}
	}
	return volume{}, fmt.Errorf("name a volume by POD VOLUME or by pvc/NAME, not by %q alone", args[0])
}

// ofPod returns a volume of a pod.
func (f *finder) ofPod(ctx context.Context, podName, name string) (volume, error) {
	pod, err := f.client.CoreV1().Pods(f.namespace).Get(ctx, strings.TrimPrefix(podName, "pod/"), metav1.GetOptions{})
	if err != nil {
		return volume{}, err
	}
	i := slices.IndexFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == name })
	if i < 0 {
		return volume{}, fmt.Errorf("pod %s has no volume %q; it has %s", pod.Name, name, volumeNames(pod))
	}
	found := volume{node: pod.Spec.NodeName, pod: string(pod.UID)}
	if found.node == "" {
		return volume{}, fmt.Errorf("pod %s is on no node yet", pod.Name)
	}
	v := pod.Spec.Volumes[i]
	if v.CSI != nil && v.CSI.Driver == f.driver.name {
		found.handle = inlineHandle(pod, name)
		return found, nil
	}
	claim := claimOf(pod, v)
	if claim == "" {
		return volume{}, fmt.Errorf("volume %q of pod %s is not one of driver %s", name, pod.Name, f.driver.name)
	}
	pv, err := f.persistentVolume(ctx, claim)
	if err != nil {
		return volume{}, err
	}
	found.handle = pv.Spec.CSI.VolumeHandle
	return found, nil
}

// ofClaim returns the volume of a claim: on the node that it is bound to, or on that of a pod that has it.
func (f *finder) ofClaim(ctx context.Context, name string) (volume, error) {
	pv, err := f.persistentVolume(ctx, name)
	if err != nil {
		return volume{}, err
	}
	found := volume{handle: pv.Spec.CSI.VolumeHandle}
	if segment := f.segmentOf(pv); segment != "" {
		found.node, err = f.nodeOf(ctx, segment)
		return found, err
	}
	pods, err := f.client.CoreV1().Pods(f.namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return volume{}, err
	}
	for i := range pods.Items {
		pod := &pods.Items[i]
		has := slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return claimOf(pod, v) == name })
		if !has || pod.Spec.NodeName == "" || pod.Status.Phase != corev1.PodRunning {
			continue
		}
		if found.node != "" {
			return volume{}, fmt.Errorf("several pods have claim %s, each with what it wrote itself; name the volume by POD VOLUME", name)
		}
		found.node, found.pod = pod.Spec.NodeName, string(pod.UID)
	}
	if found.node == "" {
		return volume{}, fmt.Errorf("claim %s is bound to no node, and no running pod has it", name)
	}
	return found, nil
}

// persistentVolume returns the volume that a claim is bound to.
func (f *finder) persistentVolume(ctx context.Context, claim string) (*corev1.PersistentVolume, error) {
	pvc, err := f.client.CoreV1().PersistentVolumeClaims(f.namespace).Get(ctx, claim, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	if pvc.Spec.VolumeName == "" {
		return nil, fmt.Errorf("%w: claim %s is not bound to one yet", errNoVolume, claim)
	}
	pv, err := f.client.CoreV1().PersistentVolumes().Get(ctx, pvc.Spec.VolumeName, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	if pv.Spec.CSI == nil || pv.Spec.CSI.Driver != f.driver.name {
		return nil, fmt.Errorf("%w: claim %s is not one of driver %s", errNoVolume, claim, f.driver.name)
	}
	return pv, nil
}

// segmentOf returns the topology segment of the node that has a volume, "" if it is on no certain one.
func (f *finder) segmentOf(pv *corev1.PersistentVolume) string {
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return ""
	}
	for _, term := range pv.Spec.NodeAffinity.Required.NodeSelectorTerms {
		for _, want := range term.MatchExpressions {
			if want.Key == f.topologyKey() && want.Operator == corev1.NodeSelectorOpIn && len(want.Values) == 1 {
				return want.Values[0]
			}
		}
	}
	return ""
}

// topologyKey is the label of nodes that has their segment.
func (f *finder) topologyKey() string { return f.driver.name + "/node" }

// nodeOf returns the name of the node of a segment. They differ only where a name is no label's value.
func (f *finder) nodeOf(ctx context.Context, segment string) (string, error) {
	if pods, err := f.driverPods(ctx, segment); err != nil || len(pods) > 0 {
		return segment, err
	}
	nodes, err := f.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: f.topologyKey() + "=" + segment})
	if err != nil {
		return "", err
	}
	if len(nodes.Items) != 1 {
		return "", fmt.Errorf("the volume is on the node with the label %s=%s, and no node has that: it is gone, or has no driver",
			f.topologyKey(), segment)
	}
	return nodes.Items[0].Name, nil
}

// driverPod returns the name of the driver's pod on a node.
func (f *finder) driverPod(ctx context.Context, node string) (string, error) {
	pods, err := f.driverPods(ctx, node)
	if err != nil {
		return "", err
	}
	for _, pod := range pods {
		if pod.Status.Phase == corev1.PodRunning && pod.DeletionTimestamp == nil {
			return pod.Name, nil
		}
	}
	return "", fmt.Errorf("no pod of the driver runs on node %s (namespace %s, labels %s); see --driver-namespace and --driver-selector",
		node, f.driver.namespace, f.driver.selector)
}

// driverPods returns the driver's pods on a node. A controller, which may be on any node, has no overlayctl.
func (f *finder) driverPods(ctx context.Context, node string) ([]corev1.Pod, error) {
	list, err := f.client.CoreV1().Pods(f.driver.namespace).List(ctx, metav1.ListOptions{
		LabelSelector: f.driver.selector, FieldSelector: fields.OneTermEqualSelector("spec.nodeName", node).String(),
	})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(list.Items, func(pod corev1.Pod) bool {
		return pod.Spec.NodeName != node || !slices.ContainsFunc(pod.OwnerReferences, func(owner metav1.OwnerReference) bool {
			return owner.Kind == "DaemonSet"
		})
	}), nil
}

// claimOf returns the name of the claim of a volume, "" for none.
func claimOf(pod *corev1.Pod, v corev1.Volume) string {
	switch {
	case v.PersistentVolumeClaim != nil:
		return v.PersistentVolumeClaim.ClaimName
	case v.Ephemeral != nil:
		return pod.Name + "-" + v.Name
	}
	return ""
}

// inlineHandle is the handle that kubelet gives an inline volume (makeVolumeHandle in pkg/volume/csi/csi_mounter.go).
func inlineHandle(pod *corev1.Pod, name string) string {
	return fmt.Sprintf("csi-%x", sha256.Sum256([]byte(string(pod.UID)+name)))
}

func volumeNames(pod *corev1.Pod) string {
	var names []string
	for _, v := range pod.Spec.Volumes {
		names = append(names, v.Name)
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// errNoVolume says that there is no volume of the driver.
var errNoVolume = errors.New("no overlay volume")

// errRemote says that overlayctl failed, which said why.
var errRemote = errors.New("overlayctl failed")
