package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const churnNamespace = "churn"

// churn makes and deletes claims, each with the pod that uses it: so many of each in a second, whether or not the cluster keeps up.
type churn struct {
	cluster *cluster
	live    time.Duration // how long a pod is left after its claim is bound
	grow    int           // every so many claims grows
	limit   int           // claims that are under way, at most

	made, bound, skipped, underWay atomic.Int64

	mu      sync.Mutex
	pending map[string]*pendingClaim
	times   []time.Duration // from the request that makes a claim to its being bound, since reset
}

type pendingClaim struct {
	began time.Time
	bound chan struct{}
}

func newChurn(c *cluster, live time.Duration, grow int) *churn {
	return &churn{cluster: c, live: live, grow: grow, limit: 3000, pending: map[string]*pendingClaim{}}
}

// watch follows the claims, until the context ends.
func (c *churn) watch(ctx context.Context, ready func()) {
	p := newProcess(c.cluster.url, adminToken, "scale-churn", 1e6, 1e6, &counters{})
	p.inform(ctx, informer{
		path: "/api/v1/namespaces/" + churnNamespace + "/persistentvolumeclaims", contentType: protobufType,
		on: func(_ string, object []byte) {
			now := time.Now()
			var claim corev1.PersistentVolumeClaim
			if decode(object, &claim) != nil || claim.Status.Phase != corev1.ClaimBound {
				return
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			if pending, ok := c.pending[claim.Name]; ok {
				delete(c.pending, claim.Name)
				c.times = append(c.times, now.Sub(pending.began))
				c.bound.Add(1)
				close(pending.bound)
			}
		},
	}, ready)
}

// run makes claims at this rate until the context ends. series makes the names of claims unique.
func (c *churn) run(ctx context.Context, series string, rate float64) {
	ticker := time.NewTicker(time.Duration(float64(time.Second) / rate))
	defer ticker.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if c.underWay.Load() >= int64(c.limit) {
			c.skipped.Add(1)
			continue
		}
		c.underWay.Add(1)
		go func() {
			defer c.underWay.Add(-1)
			// A claim that has begun is also deleted.
			if err := c.one(context.WithoutCancel(ctx), ctx.Done(), fmt.Sprintf("%s-%d", series, i), c.grow > 0 && i%c.grow == 0); err != nil {
				progress("claim %s-%d: %v", series, i, err)
			}
		}()
	}
}

// one makes a claim and its pod, waits until the claim is bound, and deletes both some time later.
func (c *churn) one(ctx context.Context, ended <-chan struct{}, name string, grow bool) error {
	core := c.cluster.admin.CoreV1()
	claim := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{
			driverName + "/layers": "dir://layers/models/tuning\ndir://layers/models/base\n",
		}},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}},
		},
	}
	class := className
	claim.Spec.StorageClassName = &class
	pending := &pendingClaim{began: time.Now(), bound: make(chan struct{})}
	c.mu.Lock()
	c.pending[name] = pending
	c.mu.Unlock()
	c.made.Add(1)
	if _, err := core.PersistentVolumeClaims(churnNamespace).Create(ctx, claim, metav1.CreateOptions{}); err != nil {
		return err
	}
	if _, err := core.Pods(churnNamespace).Create(ctx, newPod(name, []string{name}), metav1.CreateOptions{}); err != nil {
		return err
	}
	stop := ended
	select {
	case <-pending.bound:
	case <-stop:
		// A claim that the cluster did not bind in time is deleted as it is.
		select {
		case <-pending.bound:
		case <-time.After(5 * time.Second):
		}
	}
	if grow {
		patch := []byte(`{"spec":{"resources":{"requests":{"storage":"2Gi"}}}}`)
		_, err := core.PersistentVolumeClaims(churnNamespace).Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
		if err != nil && !apierrors.IsInvalid(err) && !apierrors.IsForbidden(err) {
			return err
		}
	}
	select {
	case <-time.After(c.live):
	case <-stop:
	}
	// There is no kubelet that would end the pod.
	now := int64(0)
	if err := core.Pods(churnNamespace).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		return err
	}
	return core.PersistentVolumeClaims(churnNamespace).Delete(ctx, name, metav1.DeleteOptions{})
}

// reset begins a measurement.
func (c *churn) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.times = nil
}

// percentiles returns how long the claims that were bound since reset took, at the middle and at 99 of 100, and how many there were.
// Claims that still wait count with the time that they have waited.
func (c *churn) percentiles() (p50, p99 time.Duration, bound, waiting int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	times := slices.Clone(c.times)
	for _, pending := range c.pending {
		times = append(times, time.Since(pending.began))
	}
	if len(times) == 0 {
		return 0, 0, 0, 0
	}
	slices.Sort(times)
	return times[len(times)/2], times[len(times)*99/100], len(c.times), len(c.pending)
}

// drain waits until no claim and no volume is left, and gives up on what is left after a time: the next measurement says so.
func (c *churn) drain(ctx context.Context, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for {
		volumes, err := c.cluster.admin.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{Limit: 1})
		if err != nil {
			return err
		}
		if len(volumes.Items) == 0 && c.underWay.Load() == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d claims are under way, and volumes are left, %s after the churn", c.underWay.Load(), limit)
		}
		if !sleep(ctx, time.Second) {
			return ctx.Err()
		}
	}
}
