//go:build e2e

package e2e

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestCache runs jobs after one another on a node: each begins with what the last one that succeeded has left.
func TestCache(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	node := cluster.workers[0]
	volume := inlineVolume("cache", "layers", "cache://deps", "commit", "deps")
	job := func(name, script string, want corev1.PodPhase) {
		t.Helper()
		once := func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever }
		p := n.start(name, withVolume(volume), onNode(node), withCommand(script), once)
		eventually(t, name+" has ended", func() error {
			p.refresh()
			if p.Status.Phase != want {
				return fmt.Errorf("phase %s, want %s", p.Status.Phase, want)
			}
			return nil
		})
		// The commit is done when kubelet has unmounted the volume, and needs the pod: one that has ended is gone as soon as it is deleted.
		eventually(t, "the volume of "+name+" is unpublished", func() error {
			left, err := cluster.onNode(node, fmt.Sprintf(
				`grep %[1]s /proc/self/mountinfo; grep -l %[1]s %[2]s/volumes/*/volume.json 2>/dev/null; true`, p.UID, dataRoot))
			if err == nil && left != "" {
				err = fmt.Errorf("%w: %s", errNot, left)
			}
			return err
		})
		p.delete()
		wantNothingOf(t, node, p.UID)
	}
	job("first", "test -z \"$(ls /cache)\" && echo first > /cache/dep", corev1.PodSucceeded)
	job("second", "test \"$(cat /cache/dep)\" = first && echo second > /cache/dep", corev1.PodSucceeded)
	job("failed", "echo failed > /cache/dep && exit 1", corev1.PodFailed)
	job("last", "test \"$(cat /cache/dep)\" = second", corev1.PodSucceeded)

	other := newNamespace(t, "baseline")
	p := other.run("other", withVolume(inlineVolume("cache", "layers", "cache://deps")), onNode(node))
	p.want("ls /cache | wc -l", "0")

	// A cache outlives its namespace.
	cluster.overlayctl(t, node, "caches", "delete", n.name+"/deps")
}
