//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/klient/k8s/resources"
)

// TestDeletedNamespaceLeavesNothing: everything at once, with the order left to Kubernetes.
func TestDeletedNamespaceLeavesNothing(t *testing.T) {
	n := newNamespace(t, "baseline")
	n.configMap("settings", map[string]string{"a": "1"})
	var pods []*pod
	var volumes []string
	for i := range 4 {
		name := fmt.Sprintf("claim-%d", i)
		n.claim(name)
		pods = append(pods,
			n.start("inline-"+name, withVolume(inlineVolume("work", "layers", threeLayers))),
			n.start("claimed-"+name, withVolume(claimVolume("work", name))),
			n.start("sibling-"+name, withVolume(inlineVolume("work", "layers", "volume://settings", "upper", "volume://scratch")),
				withVolume(configMapVolume("settings", "settings")), withVolume(emptyDirVolume("scratch", ""))))
	}
	for _, p := range pods {
		p.waitReady()
	}
	for i := range 4 {
		volumes = append(volumes, n.volumeOf(fmt.Sprintf("claim-%d", i)).Name)
	}
	object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: n.name}}
	must(t, cluster.Delete(context.Background(), object))
	for _, p := range pods {
		p.waitGone()
		wantNothingOf(t, p.Spec.NodeName, p.UID)
	}
	for _, volume := range volumes {
		waitVolumeGone(t, volume)
	}
	// The events of a namespace go with it; those of the volumes and nodes are in the default one.
	var events corev1.EventList
	must(t, cluster.WithNamespace("default").List(context.Background(), &events, resources.WithFieldSelector("type=Warning")))
	storm := 0
	for _, event := range events.Items {
		if slices.Contains(volumes, event.InvolvedObject.Name) {
			storm += int(max(event.Count, 1))
			t.Logf("%s: %s: %s (%d times)", event.InvolvedObject.Name, event.Reason, event.Message, event.Count)
		}
	}
	if storm > len(volumes) {
		t.Errorf("%d warnings of %d volumes", storm, len(volumes))
	}
}

// TestManyPodsAtOnce has 30 pods with overlay volumes and 30 with emptyDir start at once, by turns, on the two workers; make proof has
// 100 of each. Under the same load at the same time, what differs between them is the volume: runs one after the other differ by more.
// Where chance is against the overlay, more batches have it out.
func TestManyPodsAtOnce(t *testing.T) {
	pods := proof(30, 100)
	times := map[string][]float64{}
	for range 3 {
		startMany(t, pods, times)
		ratio := mean(times["overlay"]) / mean(times["emptydir"])
		t.Logf("time to Ready with overlay volumes: %.2f times that with emptyDir", ratio)
		if ratio <= 1.1 {
			return
		}
	}
	t.Error("pods with overlay volumes take more than 1.1 times as long as with emptyDir")
}

// startMany runs so many pods of each kind and adds the seconds that each took to be ready.
func startMany(t *testing.T, pods int, times map[string][]float64) {
	t.Helper()
	n := newNamespace(t, "baseline")
	kinds := map[string]corev1.Volume{
		"overlay":  inlineVolume("work", "layers", threeLayers),
		"emptydir": emptyDirVolume("work", ""),
	}
	order := []string{"overlay", "emptydir"}
	for i := range pods {
		for _, kind := range order {
			p := newPod(fmt.Sprintf("%s-%d", kind, i), withVolume(kinds[kind]), onNode(cluster.workers[i%2]))
			p.Labels = map[string]string{"kind": kind}
			n.create(p)
		}
		slices.Reverse(order)
	}
	var list corev1.PodList
	within(t, 4*timeout, "all pods are ready", func() error {
		must(t, cluster.WithNamespace(n.name).List(context.Background(), &list))
		ready := 0
		for i := range list.Items {
			if isReady(&list.Items[i]) {
				ready++
			}
		}
		if ready < 2*pods {
			return fmt.Errorf("%w: %d of %d", errNot, ready, 2*pods)
		}
		return nil
	})
	for kind := range kinds {
		var taken []float64
		for i := range list.Items {
			if p := &list.Items[i]; p.Labels["kind"] == kind {
				taken = append(taken, readyAfter(p).Seconds())
			}
		}
		slices.Sort(taken)
		t.Logf(
			"%d pods with %s: ready after %.1f s on average, half of them after %.0f s, the last after %.0f s",
			len(taken),
			kind,
			mean(taken),
			taken[len(taken)/2],
			taken[len(taken)-1],
		)
		times[kind] = append(times[kind], taken...)
	}

	must(t, cluster.Delete(context.Background(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: n.name}}))
	within(t, 4*timeout, "all pods are gone", func() error {
		must(t, cluster.WithNamespace(n.name).List(context.Background(), &list))
		if left := len(list.Items); left > 0 {
			return fmt.Errorf("%w: %d are left", errNot, left)
		}
		return nil
	})
}

func mean(values []float64) float64 {
	sum := 0.0
	for _, value := range values {
		sum += value
	}
	return sum / float64(len(values))
}

// readyAfter is the time from a pod's creation to its readiness, to the second.
func readyAfter(p *corev1.Pod) time.Duration {
	for _, condition := range p.Status.Conditions {
		if condition.Type == corev1.PodReady {
			return condition.LastTransitionTime.Sub(p.CreationTimestamp.Time)
		}
	}
	return 0
}

func isReady(p *corev1.Pod) bool {
	for _, condition := range p.Status.Conditions {
		if condition.Type == corev1.PodReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}
