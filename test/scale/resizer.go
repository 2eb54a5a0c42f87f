package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	leases        = "/apis/coordination.k8s.io/v1/namespaces/" + namespace + "/leases"
	resizerLease  = "external-resizer-overlay-csi-github-io"
	retryPeriod   = 5 * time.Second
	leaseSeconds  = 15
	waitingJitter = 1.2 // client-go's leaderelection.JitterFactor
)

// resizer plays external-resizer with leader election: the one that has the lease watches claims and volumes and renews it, and all
// others look at the lease.
type resizer struct {
	process *process
	name    string
	leader  bool
	growing sync.Map
}

func newResizer(p *process, name string, leader bool) *resizer {
	return &resizer{process: p, name: name, leader: leader}
}

func (r *resizer) run(ctx context.Context) {
	r.process.report(r.process.do(ctx, http.MethodGet, "/apis/storage.k8s.io/v1", protobufType, nil, nil))
	if r.leader {
		r.lead(ctx)
		return
	}
	for sleep(ctx, time.Duration((1+waitingJitter*rand.Float64())*float64(retryPeriod))) {
		if err := r.process.do(ctx, http.MethodGet, leases+"/"+resizerLease, protobufType, nil, nil); !isStatus(err, http.StatusNotFound) {
			r.process.report(err)
		}
	}
}

func (r *resizer) lead(ctx context.Context) {
	seconds, now := int32(leaseSeconds), metav1.NowMicro()
	lease := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: resizerLease},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &r.name, LeaseDurationSeconds: &seconds, AcquireTime: &now, RenewTime: &now},
	}
	r.process.report(r.process.do(ctx, http.MethodPost, leases, protobufType, lease, lease))
	onClaim := func(event string, object []byte) { r.onClaim(ctx, event, object) }
	for _, i := range []informer{
		{path: "/api/v1/persistentvolumeclaims", contentType: protobufType, on: onClaim},
		{path: "/api/v1/persistentvolumes", contentType: protobufType},
	} {
		go r.process.inform(ctx, i, func() {})
	}
	for sleep(ctx, retryPeriod) {
		renewed := metav1.NowMicro()
		lease.Spec.RenewTime = &renewed
		r.process.report(r.process.do(ctx, http.MethodPut, leases+"/"+resizerLease, protobufType, lease, lease))
	}
}

// onClaim looks into every event, since any claim may have grown.
func (r *resizer) onClaim(ctx context.Context, event string, object []byte) {
	var claim corev1.PersistentVolumeClaim
	if err := decode(object, &claim); err != nil {
		r.process.report(err)
		return
	}
	if event == "DELETED" {
		r.growing.Delete(string(claim.UID))
		return
	}
	size, has := claim.Spec.Resources.Requests[corev1.ResourceStorage], claim.Status.Capacity[corev1.ResourceStorage]
	if claim.Status.Phase != corev1.ClaimBound || size.Cmp(has) <= 0 {
		return
	}
	if _, known := r.growing.LoadOrStore(string(claim.UID), true); !known {
		go r.grow(ctx, &claim)
	}
}

// grow does what external-resizer does for a volume that only its node makes larger.
func (r *resizer) grow(ctx context.Context, claim *corev1.PersistentVolumeClaim) {
	size := claim.Spec.Resources.Requests[corev1.ResourceStorage]
	status := func(state corev1.ClaimResourceStatus, condition corev1.PersistentVolumeClaimConditionType) {
		patch, err := json.Marshal(map[string]any{"status": map[string]any{
			"allocatedResources":        map[string]any{"storage": size.String()},
			"allocatedResourceStatuses": map[string]any{"storage": state},
			"conditions":                []any{map[string]any{"type": condition, "status": "True", "lastTransitionTime": metav1.Now()}},
		}})
		r.process.report(err)
		path := fmt.Sprintf("/api/v1/namespaces/%s/persistentvolumeclaims/%s/status", claim.Namespace, claim.Name)
		err = r.process.do(ctx, http.MethodPatch, path, strategicPatch, patch, nil)
		if !isStatus(err, http.StatusNotFound) { // The claim may be deleted by now.
			r.process.report(err)
		}
	}
	component := "external-resizer " + driverName
	status(corev1.PersistentVolumeClaimControllerResizeInProgress, corev1.PersistentVolumeClaimResizing)
	go func() {
		// The claim comes into the queue again with its own change, and the same event is counted once more.
		event := postEvent(ctx, r.process, component, claim, "Resizing", "External resizer is resizing volume "+claim.Spec.VolumeName)
		r.process.report(r.process.do(ctx, http.MethodPatch, event, strategicPatch, []byte(`{"count":2}`), nil))
	}()
	patch := fmt.Appendf(nil, `{"metadata":{"annotations":{"volume.alpha.kubernetes.io/pre-resize-capacity":"1Gi"}},`+
		`"spec":{"capacity":{"storage":%q}}}`, size.String())
	r.process.report(r.process.do(ctx, http.MethodPatch, "/api/v1/persistentvolumes/"+claim.Spec.VolumeName, strategicPatch, patch, nil))
	status(corev1.PersistentVolumeClaimNodeResizePending, corev1.PersistentVolumeClaimFileSystemResizePending)
	go postEvent(ctx, r.process, component, claim, "FileSystemResizeRequired", "Require file system resize of volume on node")
}

// sleep reports whether the time has passed before the context has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
