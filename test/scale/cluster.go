package main

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
)

// cluster is what the API server has before anybody plays: the manifests of the driver, the CRDs of testdata, and nodes.
type cluster struct {
	*servers
	admin    *kubernetes.Clientset
	token    string // of the driver's ServiceAccount, which all played processes use
	counters *counters
	daemon   types.UID
}

//go:embed testdata
var testdata embed.FS

func newCluster(ctx context.Context, s *servers, m mode) (*cluster, error) {
	admin, err := kubernetes.NewForConfig(s.config)
	if err != nil {
		return nil, err
	}
	c := &cluster{servers: s, admin: admin, counters: &counters{}}
	for _, name := range []string{namespace, churnNamespace} {
		object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := admin.CoreV1().Namespaces().Create(ctx, object, metav1.CreateOptions{}); err != nil {
			return nil, err
		}
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}
		if _, err := admin.CoreV1().ServiceAccounts(name).Create(ctx, account, metav1.CreateOptions{}); err != nil {
			return nil, err
		}
	}
	manifests, err := m.manifests(ctx)
	if err != nil {
		return nil, err
	}
	texts := [][]byte{manifests}
	for _, name := range []string{"crds.yaml", "rbac.yaml"} {
		text, err := testdata.ReadFile("testdata/" + name)
		if err != nil {
			return nil, err
		}
		texts = append(texts, text)
	}
	for _, text := range texts {
		if err := c.apply(ctx, text); err != nil {
			return nil, err
		}
	}
	const snapshots = "snapshot.storage.k8s.io/v1/"
	if err := c.waitServed(ctx, snapshots+"volumesnapshotclasses", snapshots+"volumesnapshotcontents"); err != nil {
		return nil, err
	}
	daemon, err := admin.AppsV1().DaemonSets(namespace).Get(ctx, "overlay-csi", metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	c.daemon = daemon.UID
	c.token, err = c.tokenOf(ctx, "overlay-csi")
	return c, err
}

// tokenOf returns a token of one of the ServiceAccounts of the driver.
func (c *cluster) tokenOf(ctx context.Context, account string) (string, error) {
	day := int64(24 * 3600)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &day}}
	answer, err := c.admin.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account, request, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	return answer.Status.Token, nil
}

// resources are the kinds in the manifests that are applied, with the resources that they are.
var resources = map[string]schema.GroupVersionResource{
	"ServiceAccount":           {Version: "v1", Resource: "serviceaccounts"},
	"StorageClass":             {Group: "storage.k8s.io", Version: "v1", Resource: "storageclasses"},
	"CSIDriver":                {Group: "storage.k8s.io", Version: "v1", Resource: "csidrivers"},
	"ClusterRole":              {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles"},
	"ClusterRoleBinding":       {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterrolebindings"},
	"Role":                     {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "roles"},
	"RoleBinding":              {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings"},
	"NetworkPolicy":            {Group: "networking.k8s.io", Version: "v1", Resource: "networkpolicies"},
	"DaemonSet":                {Group: "apps", Version: "v1", Resource: "daemonsets"},
	"Deployment":               {Group: "apps", Version: "v1", Resource: "deployments"},
	"PodDisruptionBudget":      {Group: "policy", Version: "v1", Resource: "poddisruptionbudgets"},
	"CustomResourceDefinition": {Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
}

func (c *cluster) apply(ctx context.Context, manifests []byte) error {
	client, err := dynamic.NewForConfig(c.config)
	if err != nil {
		return err
	}
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(manifests), 4096)
	for {
		var object unstructured.Unstructured
		if err := decoder.Decode(&object); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if object.Object == nil {
			continue
		}
		which, ok := resources[object.GetKind()]
		if !ok {
			return fmt.Errorf("apply %s %s: an unknown kind", object.GetKind(), object.GetName())
		}
		_, err := client.Resource(which).Namespace(object.GetNamespace()).Create(ctx, &object, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("apply %s %s: %w", object.GetKind(), object.GetName(), err)
		}
	}
}

// waitServed waits until the API server has the watch caches of custom resources. Until then it refuses watches.
func (c *cluster) waitServed(ctx context.Context, resources ...string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, resource := range resources {
		for {
			err := c.admin.RESTClient().Get().AbsPath("/apis/"+resource).Param("resourceVersion", "0").Do(ctx).Error()
			if err == nil {
				break
			}
			if !sleep(ctx, 200*time.Millisecond) {
				return fmt.Errorf("%s is not served: %w", resource, err)
			}
		}
	}
	return nil
}

func nodeName(i int) string { return fmt.Sprintf("node-%05d", i) }

// daemonPod is the name of the driver's pod on a node.
func daemonPod(node string) string { return "overlay-csi-" + node }

// addNodes makes nodes with what kubelet and the DaemonSet's controller make of each: a Node, a CSINode, and the driver's pod.
func (c *cluster) addNodes(ctx context.Context, n int) error {
	const workers = 32
	var all sync.WaitGroup
	names, errs := make(chan string), make(chan error, workers)
	for range workers {
		all.Go(func() {
			for name := range names {
				if err := c.addNode(ctx, name); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	var err error
	for i := 0; i < n && err == nil; i++ {
		select {
		case names <- nodeName(i):
		case err = <-errs:
		}
	}
	close(names)
	all.Wait()
	select {
	case late := <-errs:
		err = errors.Join(err, late)
	default:
	}
	return err
}

func (c *cluster) addNode(ctx context.Context, name string) error {
	room := corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("64"), corev1.ResourceMemory: resource.MustParse("256Gi"),
		corev1.ResourcePods: resource.MustParse("100000"),
	}
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name, topologyKey: name}},
		Status:     corev1.NodeStatus{Capacity: room, Allocatable: room},
	}
	made, err := c.admin.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	csiNode := &storagev1.CSINode{
		ObjectMeta: metav1.ObjectMeta{Name: name, OwnerReferences: []metav1.OwnerReference{
			{APIVersion: "v1", Kind: "Node", Name: name, UID: made.UID},
		}},
		Spec: storagev1.CSINodeSpec{Drivers: []storagev1.CSINodeDriver{{Name: driverName, NodeID: name, TopologyKeys: []string{topologyKey}}}},
	}
	if _, err := c.admin.StorageV1().CSINodes().Create(ctx, csiNode, metav1.CreateOptions{}); err != nil {
		return err
	}
	yes := true
	pod := newPod(daemonPod(name), nil)
	pod.OwnerReferences = []metav1.OwnerReference{
		{APIVersion: "apps/v1", Kind: "DaemonSet", Name: "overlay-csi", UID: c.daemon, Controller: &yes},
	}
	pod.Spec.NodeName = name
	if _, err := c.admin.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	return nil
}

// newPod returns a pod that uses these claims.
func newPod(name string, claims []string) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "busybox:1.36", Command: []string{"sleep", "infinity"}}}},
	}
	for _, claim := range claims {
		pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: claim, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim},
		}})
		mounts := &pod.Spec.Containers[0].VolumeMounts
		*mounts = append(*mounts, corev1.VolumeMount{Name: claim, MountPath: "/" + claim})
	}
	return pod
}
