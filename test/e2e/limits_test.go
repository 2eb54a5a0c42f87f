//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func TestVolumesKeepToTheirSize(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	n.claim("small", class(storageClass(t, nil, "layers", threeLayers)), request("32Mi"))
	var pods []*pod
	for name, volume := range map[string]corev1.Volume{
		"disk":   inlineVolume("work", "layers", threeLayers, "sizeLimit", "32Mi"),
		"memory": inlineVolume("work", "layers", threeLayers, "sizeLimit", "32Mi", "medium", "memory"),
		"claim":  claimVolume("work", "small"),
	} {
		pods = append(pods, n.start(name, withVolume(volume)))
	}
	for _, p := range pods {
		p.waitReady()
		p.want("cat /work/f", "top")
		p.refused("dd if=/dev/zero of=/work/big bs=1M count=64", "No space left")
		p.want("rm /work/big && echo more > /work/small && cat /work/small", "more")
		p.want("test $(df -k /work | tail -1 | awk '{print $2}') -le 32768 && echo small", "small")
		p.deleteInBackground()
	}
	for _, p := range pods {
		p.waitGone()
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
	walked := n.run("walked", restricted(3000), group, withVolume(inlineVolume("work", "layers", threeLayers, "ownership", "chown")))
	walked.want("stat -c %u:%g:%a /work/f && echo more >> /work/f && cat /work/f", "0:4000:664\ntop\nmore")
	for _, p := range []*pod{owner, mapped, walked} {
		p.delete()
	}
}

// TestClaimFollowsTheGroupOfThePod: what a pod with one fsGroup wrote belongs to that of the next pod.
func TestClaimFollowsTheGroupOfThePod(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "restricted")
	n.claim("workspace")
	group := func(gid int64) podOption {
		return func(p *corev1.Pod) { p.Spec.SecurityContext.FSGroup = &gid }
	}
	first := n.run("first", restricted(3000), group(1000), withVolume(claimVolume("work", "workspace")))
	first.want("umask 002 && mkdir /work/new && echo first > /work/new/file && sync && stat -c %g /work/new/file", "1000")
	first.delete()
	second := n.run("second", restricted(4000), group(2000), withVolume(claimVolume("work", "workspace")))
	second.want("stat -c %g /work /work/f /work/new /work/new/file && echo second >> /work/new/file && cat /work/new/file",
		"2000\n2000\n2000\n2000\nfirst\nsecond")
	second.delete()
	n.deleteClaim("workspace")
}

// TestClaimGrows: a larger request is real in the pods that use the claim, without a restart.
func TestClaimGrows(t *testing.T) {
	t.Parallel()
	grows := func(c *storagev1.StorageClass) { yes := true; c.AllowVolumeExpansion = &yes }
	for name, c := range map[string]struct {
		mode       corev1.PersistentVolumeAccessMode
		parameters []string
	}{
		"memory": {corev1.ReadWriteMany, []string{"layers", threeLayers, "upper", "pod", "medium", "memory"}},
		"disk":   {corev1.ReadWriteOnce, []string{"layers", threeLayers}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNamespace(t, "baseline")
			n.claim(name, class(storageClass(t, grows, c.parameters...)), access(c.mode), request("32Mi"))
			p := n.run(name, withVolume(claimVolume("work", name)))
			p.refused("dd if=/dev/zero of=/work/big bs=1M count=48", "No space left")
			kept := n.volumeOf(name)
			n.setRequest(name, "96Mi")
			size := func() error {
				var claim corev1.PersistentVolumeClaim
				must(t, cluster.Get(context.Background(), name, n.name, &claim))
				capacity := claim.Status.Capacity[corev1.ResourceStorage]
				if capacity.Cmp(resource.MustParse("96Mi")) == 0 {
					return nil
				}
				return fmt.Errorf("%w: %s: %s", errNot, capacity.String(), strings.Join(append(p.events(), eventsOf(t, n.name, claim.UID)...), "\n"))
			}
			if name == "disk" && lacksResource(t, p.Spec.NodeName) {
				// ext4 wants CAP_SYS_RESOURCE of whoever makes it larger, and the driver says so to the pod.
				p.waitEvent("Permission denied to resize")
				t.Skip("the nodes of this cluster have no CAP_SYS_RESOURCE")
			}
			eventually(t, "claim "+name+" has grown", size)
			p.want("test $(df -k /work | tail -1 | awk '{print $2}') -gt 65536 && echo large", "large")
			p.want("dd if=/dev/zero of=/work/big bs=1M count=64 2>/dev/null && cat /work/f", "top")
			p.delete()
			n.deleteClaim(name)
			waitVolumeGone(t, kept.Name)
		})
	}
}

func request(size string) claimOption {
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.Resources.Requests[corev1.ResourceStorage] = resource.MustParse(size)
	}
}

// setRequest asks for a larger claim.
func (n *namespace) setRequest(name, size string) {
	n.t.Helper()
	eventually(n.t, "claim "+name+" asks for "+size, func() error {
		var c corev1.PersistentVolumeClaim
		must(n.t, cluster.Get(context.Background(), name, n.name, &c))
		request(size)(&c)
		return cluster.Update(context.Background(), &c)
	})
}

// lacksResource reports whether root on a node is without CAP_SYS_RESOURCE (bit 24), as in some sandboxes.
func lacksResource(t *testing.T, node string) bool {
	t.Helper()
	output, err := cluster.onNode(node, `grep CapBnd /proc/1/status`)
	must(t, err)
	var bounding uint64
	if _, err := fmt.Sscanf(output, "CapBnd: %x", &bounding); err != nil {
		t.Fatalf("%q: %v", output, err)
	}
	return bounding&(1<<24) == 0
}
