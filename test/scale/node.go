package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
)

const (
	driverName  = "overlay-csi.github.io"
	topologyKey = driverName + "/node"
	namespace   = "overlay-csi"
	className   = "overlay-csi"

	selectedNode     = "volume.kubernetes.io/selected-node"
	claimProvisioner = "volume.kubernetes.io/storage-provisioner"
	volumeFinalizer  = "external-provisioner.volume.kubernetes.io/finalizer"
)

// sidecarNode plays a node of the chart as it is: the driver, and external-provisioner and external-resizer beside it, with
// external-snapshotter as it is deployed on nodes elsewhere.
//
// Each is a process with a connection of its own. What they ask for is in testdata, taken from the real ones.
type sidecarNode struct {
	name                                     string
	driver, provisioner, capacity, snapshots *process
	resizer                                  *resizer

	provisioning, deleting sync.Map // names of claims and volumes
	capacityObject         atomic.Pointer[storagev1.CSIStorageCapacity]
	refresh                chan struct{}
	free                   atomic.Int64
}

func newSidecarNode(c *cluster, name string, leader bool) *sidecarNode {
	agent := func(program string) string { return program + "/played (linux/amd64)" }
	// The rate limits are the defaults of the programs: 5 requests a second, and 1 for CSIStorageCapacity.
	provisioner := newProcess(c.url, c.token, agent("csi-provisioner"), 5, 10, c.counters)
	n := &sidecarNode{
		name:        name,
		driver:      newProcess(c.url, c.token, agent("overlay-csi"), 5, 10, c.counters),
		provisioner: provisioner,
		capacity:    provisioner.second(1, 5),
		snapshots:   newProcess(c.url, c.token, agent("csi-snapshotter"), 5, 10, c.counters),
		resizer:     newResizer(newProcess(c.url, c.token, agent("csi-resizer"), 5, 10, c.counters), name, leader),
		refresh:     make(chan struct{}, 1),
	}
	n.free.Store(1 << 40)
	return n
}

// run plays the node until the context ends. It calls ready once all informers have what exists.
func (n *sidecarNode) run(ctx context.Context, ready func()) {
	go n.resizer.run(ctx)
	n.startSidecars(ctx)
	var waiting sync.WaitGroup
	for _, i := range n.informers(ctx) {
		waiting.Add(1)
		go i.process.inform(ctx, i.informer, waiting.Done)
	}
	waiting.Wait()
	ready()
	n.keepCapacity(ctx)
}

type processInformer struct {
	process  *process
	informer informer
}

func (n *sidecarNode) informers(ctx context.Context) []processInformer {
	onClaim := func(event string, object []byte) { n.onClaim(ctx, event, object) }
	onVolume := func(event string, object []byte) { n.onVolume(ctx, event, object) }
	ours := fmt.Sprintf("csi.storage.k8s.io/drivername=%s,csi.storage.k8s.io/managed-by=external-provisioner-%s", driverName, n.name)
	const classes = "/apis/storage.k8s.io/v1/storageclasses"
	informers := []processInformer{
		{n.provisioner, informer{path: "/api/v1/persistentvolumeclaims", contentType: protobufType, on: onClaim}},
		{n.provisioner, informer{path: "/api/v1/persistentvolumes", contentType: protobufType, on: onVolume}},
		// Once for the provisioner's lister and once for the library, which has informers of its own.
		{n.provisioner, informer{path: classes, contentType: protobufType}},
		{n.provisioner, informer{path: classes, contentType: protobufType}},
		{n.capacity, informer{path: capacitiesPath, contentType: jsonType, selector: url.Values{"labelSelector": {ours}}, on: n.onCapacity}},
		{n.snapshots, informer{path: "/apis/snapshot.storage.k8s.io/v1/volumesnapshotclasses", contentType: jsonType}},
		{n.snapshots, informer{
			path: "/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents", contentType: jsonType,
			selector: url.Values{"labelSelector": {"snapshot.storage.kubernetes.io/managed-by=" + n.name}},
		}},
	}
	return informers
}

// startSidecars asks what the sidecars ask when they start: who owns the pod, and which APIs there are.
func (n *sidecarNode) startSidecars(ctx context.Context) {
	const groups = "/apis/groupsnapshot.storage.k8s.io/v1/volumegroupsnapshotcontents?limit=1"
	if err := n.snapshots.do(ctx, http.MethodGet, groups, jsonType, nil, nil); !isStatus(err, http.StatusForbidden) {
		n.report(err)
	}
	n.report(n.provisioner.do(ctx, http.MethodGet, "/apis/storage.k8s.io/v1", protobufType, nil, nil))
	n.report(n.provisioner.do(ctx, http.MethodGet, "/apis/snapshot.storage.k8s.io/v1", protobufType, nil, nil))
	for _, discovery := range []string{"/api", "/apis"} {
		n.report(n.capacity.do(ctx, http.MethodGet, discovery, jsonType, nil, nil))
	}
	n.report(n.capacity.do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/pods/"+daemonPod(n.name), jsonType, nil, nil))
	invalid := &storagev1.CSIStorageCapacity{ObjectMeta: metav1.ObjectMeta{Name: "#%123-invalid-name"}}
	err := n.capacity.do(ctx, http.MethodPost, capacitiesPath, jsonType, invalid, nil)
	if !isStatus(err, http.StatusUnprocessableEntity) {
		n.report(err)
	}
}

// onClaim has every event of every claim of the cluster, and looks into those that name this node.
func (n *sidecarNode) onClaim(ctx context.Context, event string, object []byte) {
	if event == "DELETED" || !bytes.Contains(object, []byte(n.name)) {
		return
	}
	var claim corev1.PersistentVolumeClaim
	if err := decode(object, &claim); err != nil {
		n.report(err)
		return
	}
	if claim.Annotations[selectedNode] != n.name || claim.Annotations[claimProvisioner] != driverName || claim.Spec.VolumeName != "" {
		return
	}
	if _, known := n.provisioning.LoadOrStore(string(claim.UID), true); !known {
		go n.provision(ctx, &claim)
	}
}

// provision does what external-provisioner does for a claim, and the driver in its CreateVolume.
func (n *sidecarNode) provision(ctx context.Context, claim *corev1.PersistentVolumeClaim) {
	volume := "pvc-" + string(claim.UID)
	claimPath := fmt.Sprintf("/api/v1/namespaces/%s/persistentvolumeclaims/%s", claim.Namespace, claim.Name)
	// Events are written in the background.
	go n.event(ctx, claim, "Provisioning", "External provisioner is provisioning volume for claim "+claim.Namespace+"/"+claim.Name)
	// The layers are in an annotation of the claim.
	n.report(n.driver.do(ctx, http.MethodGet, claimPath, jsonType, nil, nil))
	err := n.provisioner.do(ctx, http.MethodPost, "/api/v1/persistentvolumes", protobufType, newVolume(claim, volume, n.name), nil)
	if err != nil && !isStatus(err, http.StatusConflict) {
		n.report(err)
		n.provisioning.Delete(string(claim.UID))
		return
	}
	go n.event(ctx, claim, "ProvisioningSucceeded", "Successfully provisioned volume "+volume)
	size := claim.Spec.Resources.Requests[corev1.ResourceStorage]
	n.free.Add(-size.Value())
	n.capacityChanged()
}

// onVolume has every event of every volume of the cluster, and looks into those that name this node.
func (n *sidecarNode) onVolume(ctx context.Context, event string, object []byte) {
	if event == "DELETED" || !bytes.Contains(object, []byte(n.name)) {
		return
	}
	var volume corev1.PersistentVolume
	if err := decode(object, &volume); err != nil {
		n.report(err)
		return
	}
	if volume.Status.Phase != corev1.VolumeReleased || !slices.Contains(volume.Finalizers, volumeFinalizer) {
		return
	}
	if _, known := n.deleting.LoadOrStore(volume.Name, true); !known {
		go n.remove(ctx, &volume)
	}
}

// remove does what external-provisioner does for a released volume, after the driver's DeleteVolume.
func (n *sidecarNode) remove(ctx context.Context, volume *corev1.PersistentVolume) {
	path := "/api/v1/persistentvolumes/" + volume.Name
	if err := n.provisioner.do(ctx, http.MethodDelete, path, protobufType, nil, nil); err != nil && !isStatus(err, http.StatusNotFound) {
		n.report(err)
	}
	patch := []byte(`{"metadata":{"$deleteFromPrimitiveList/finalizers":["` + volumeFinalizer + `"],` +
		`"$setElementOrder/finalizers":["kubernetes.io/pv-protection"]}}`)
	if err := n.provisioner.do(ctx, http.MethodPatch, path, strategicPatch, patch, nil); err != nil && !isStatus(err, http.StatusNotFound) {
		n.report(err)
	}
	size := volume.Spec.Capacity[corev1.ResourceStorage]
	n.free.Add(size.Value())
	n.capacityChanged()
	n.deleting.Delete(volume.Name)
	n.provisioning.Delete(string(volume.Spec.ClaimRef.UID))
}

func (n *sidecarNode) event(ctx context.Context, claim *corev1.PersistentVolumeClaim, reason, message string) {
	_ = postEvent(ctx, n.provisioner, driverName+"_"+n.name, claim, reason, message)
}

const capacitiesPath = "/apis/storage.k8s.io/v1/namespaces/" + namespace + "/csistoragecapacities"

func (n *sidecarNode) onCapacity(_ string, object []byte) {
	capacity := &storagev1.CSIStorageCapacity{}
	if err := decode(object, capacity); err != nil {
		n.report(err)
		return
	}
	n.capacityObject.Store(capacity)
}

func (n *sidecarNode) capacityChanged() {
	select {
	case n.refresh <- struct{}{}:
	default:
	}
}

// keepCapacity writes the CSIStorageCapacity object of the node: after each volume that it made or deleted, and once a minute, since
// the free space of a disk that is in use has changed by then.
func (n *sidecarNode) keepCapacity(ctx context.Context) {
	n.writeCapacity(ctx)
	next := time.NewTimer(time.Duration(rand.Float64() * float64(time.Minute)))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
			n.free.Add(-1 << 20)
			next.Reset(time.Minute)
		case <-n.refresh:
		}
		n.writeCapacity(ctx)
	}
}

func (n *sidecarNode) writeCapacity(ctx context.Context) {
	free := resource.NewQuantity(n.free.Load(), resource.BinarySI)
	known := n.capacityObject.Load()
	if known == nil {
		n.report(n.capacity.do(ctx, http.MethodPost, capacitiesPath, jsonType, &storagev1.CSIStorageCapacity{
			ObjectMeta: metav1.ObjectMeta{GenerateName: "csisc-", Labels: map[string]string{
				"csi.storage.k8s.io/drivername": driverName, "csi.storage.k8s.io/managed-by": "external-provisioner-" + n.name,
			}},
			StorageClassName: className, Capacity: free, MaximumVolumeSize: free,
			NodeTopology: &metav1.LabelSelector{MatchLabels: map[string]string{topologyKey: n.name}},
		}, nil))
		return
	}
	changed := known.DeepCopy()
	changed.Capacity, changed.MaximumVolumeSize = free, free
	// The next refresh has the version of this write from the watch.
	err := n.capacity.do(ctx, http.MethodPut, capacitiesPath+"/"+known.Name, jsonType, changed, nil)
	if isStatus(err, http.StatusConflict) {
		n.capacityChanged()
		return
	}
	n.report(err)
}

func (n *sidecarNode) report(err error) { n.provisioner.report(err) }

// newVolume returns the PersistentVolume of a claim as external-provisioner makes it.
func newVolume(claim *corev1.PersistentVolumeClaim, name, node string) *corev1.PersistentVolume {
	mode := corev1.PersistentVolumeFilesystem
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Finalizers: []string{volumeFinalizer},
			Annotations: map[string]string{
				"pv.kubernetes.io/provisioned-by":                            driverName,
				"volume.kubernetes.io/provisioner-deletion-secret-name":      "",
				"volume.kubernetes.io/provisioner-deletion-secret-namespace": "",
			},
		},
		Spec: corev1.PersistentVolumeSpec{
			AccessModes:                   claim.Spec.AccessModes,
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: claim.Spec.Resources.Requests[corev1.ResourceStorage]},
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
			StorageClassName:              className, VolumeMode: &mode,
			ClaimRef: &corev1.ObjectReference{
				Kind: "PersistentVolumeClaim", APIVersion: "v1", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID,
				ResourceVersion: claim.ResourceVersion,
			},
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
				Driver: driverName, VolumeHandle: name,
				VolumeAttributes: map[string]string{
					"storage.kubernetes.io/csiProvisionerIdentity": "1764451200000-1234-" + driverName + "-" + node,
					"layers": claim.Annotations[driverName+"/layers"], "upper": "claim",
				},
			}},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{
					Key: topologyKey, Operator: corev1.NodeSelectorOpIn, Values: []string{node},
				}},
			}}}},
		},
	}
}

// postEvent writes an event, and returns its path.
func postEvent(ctx context.Context, p *process, component string, claim *corev1.PersistentVolumeClaim, reason, message string) string {
	now := metav1.Now()
	name := fmt.Sprintf("%s.%x", claim.Name, rand.Uint64())
	events := "/api/v1/namespaces/" + claim.Namespace + "/events"
	p.report(p.do(ctx, http.MethodPost, events, protobufType, &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: claim.Namespace, Name: name},
		InvolvedObject: corev1.ObjectReference{
			Kind: "PersistentVolumeClaim", APIVersion: "v1", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID,
			ResourceVersion: claim.ResourceVersion,
		},
		Reason: reason, Message: message, Source: corev1.EventSource{Component: component},
		FirstTimestamp: now, LastTimestamp: now, Count: 1, Type: corev1.EventTypeNormal,
	}, nil))
	return events + "/" + name
}

func decode(object []byte, into runtime.Object) error {
	_, _, err := scheme.Codecs.UniversalDeserializer().Decode(object, nil, into)
	return err
}
