//go:build e2e

package e2e

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func TestVolumesKeepToTheirSize(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	n.claim("small", func(c *corev1.PersistentVolumeClaim) {
		name := storageClass(t, nil, "layers", threeLayers)
		c.Spec.StorageClassName = &name
		c.Spec.Resources.Requests[corev1.ResourceStorage] = resource.MustParse("32Mi")
	})
	for name, volume := range map[string]corev1.Volume{
		"disk":   inlineVolume("work", "layers", threeLayers, "sizeLimit", "32Mi"),
		"memory": inlineVolume("work", "layers", threeLayers, "sizeLimit", "32Mi", "medium", "memory"),
		"claim":  claimVolume("work", "small"),
	} {
		p := n.run(name, withVolume(volume))
		p.want("cat /work/f", "top")
		p.refused("dd if=/dev/zero of=/work/big bs=1M count=64", "No space left")
		p.want("rm /work/big && echo more > /work/small && cat /work/small", "more")
		p.want("test $(df -k /work | tail -1 | awk '{print $2}') -le 32768 && echo small", "small")
		p.delete()
		wantNothingOf(t, p.Spec.NodeName, p.UID)
	}
}

// TestPodThatIsNotRootEditsALayersFile: by the owner that the layers show, by the pod's group, and by a walk that lets the
// group write.
func TestPodThatIsNotRootEditsALayersFile(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "restricted")
	group := func(p *corev1.Pod) {
		gid := int64(4000)
		p.Spec.SecurityContext.FSGroup = &gid
	}
	owner := n.run("owner", restricted(3000), withVolume(inlineVolume("work", "layers", threeLayers, "layerOwner", "3000:3000")))
	owner.want("stat -c %u:%g /work/f && echo more >> /work/f && cat /work/f", "3000:3000\ntop\nmore")
	mapped := n.run("mapped", restricted(3000), group, withVolume(inlineVolume("work", "layers", threeLayers)))
	mapped.want("stat -c %u:%g /work/f && echo new > /work/new && stat -c %u:%g /work/new", "0:4000\n3000:4000")
	mapped.refused("echo more >> /work/f", "ermission denied")
	walked := n.run("walked", restricted(3000), group, withVolume(inlineVolume("work", "layers", threeLayers, "ownership", "walk")))
	walked.want("stat -c %u:%g:%a /work/f && echo more >> /work/f && cat /work/f", "0:4000:664\ntop\nmore")
	for _, p := range []*pod{owner, mapped, walked} {
		p.delete()
	}
}
