//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// nodeOf is the node that a volume is on.
func nodeOf(volume *corev1.PersistentVolume) string {
	return volume.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0]
}

// TestSnapshotsOfAClaim: a snapshot has what was written until then, outlives its claim, and is deleted without harm to what was made
// from it.
func TestSnapshotsOfAClaim(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	snapshots, restored := snapshotClass(t), atOnce(t)
	n.claim("source")
	p := n.run("writer", withVolume(claimVolume("work", "source")))
	p.want("echo one >> /work/f && rm /work/bottom && sync && cat /work/f", "top\none")
	// The pod goes on to write: kind's disks have no quotas, so that the volume is a disk image.
	n.snapshot("in-use", snapshots, "source")
	first := n.waitSnapshot("in-use")
	if first.Status.RestoreSize.String() != "8Mi" {
		t.Errorf("the snapshot has %s", first.Status.RestoreSize)
	}
	p.want("echo two >> /work/f && mkdir /work/new && sync && cat /work/f", "top\none\ntwo")
	p.delete()
	n.snapshot("at-rest", snapshots, "source")
	n.waitSnapshot("at-rest")
	p = n.run("writer-again", withVolume(claimVolume("work", "source")))
	p.want("echo three >> /work/f && cat /work/f", "top\none\ntwo\nthree")
	source := n.volumeOf("source")

	restore := func(claim, snapshot, want string) *pod {
		t.Helper()
		n.claim(claim, class(restored), from("VolumeSnapshot", snapshot))
		if on := nodeOf(n.volumeOf(claim)); on != nodeOf(source) {
			t.Errorf("claim %s is on %s, and its source on %s", claim, on, nodeOf(source))
		}
		r := n.run(claim, withVolume(claimVolume("work", claim)))
		r.want("cat /work/f", want)
		r.want("echo mine >> /work/f && cat /work/f", want+"\nmine")
		return r
	}
	one := restore("one", "in-use", "top\none")
	one.want("ls /work", "dir\nf\nmiddle\ntop")
	two := restore("two", "at-rest", "top\none\ntwo")
	two.want("ls /work", "dir\nf\nmiddle\nnew\ntop")
	p.want("cat /work/f", "top\none\ntwo\nthree")

	p.delete()
	n.deleteClaim("source")
	waitVolumeGone(t, source.Name)
	three := restore("three", "at-rest", "top\none\ntwo")
	n.deleteSnapshot("at-rest")
	n.deleteSnapshot("in-use")
	one.want("cat /work/f && cat /work/middle", "top\none\nmine\nmiddle")
	three.want("cat /work/f", "top\none\ntwo\nmine")
	two.delete()
	two = n.run("two-again", withVolume(claimVolume("work", "two")))
	two.want("cat /work/f", "top\none\ntwo\nmine")
	for _, p := range []*pod{one, two, three} {
		p.delete()
	}
}

// TestSnapshotsCloneAClaim makes claims from claims, which take no snapshot-controller.
func TestSnapshotsCloneAClaim(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	clones := atOnce(t)
	n.claim("source")
	p := n.run("writer", withVolume(claimVolume("work", "source")))
	p.want("echo one >> /work/f && sync && cat /work/f", "top\none")
	p.delete()
	n.claim("clone", class(clones), from("PersistentVolumeClaim", "source"))
	source, clone := n.volumeOf("source"), n.volumeOf("clone")
	if nodeOf(clone) != nodeOf(source) {
		t.Errorf("the clone is on %s, and its source on %s", nodeOf(clone), nodeOf(source))
	}
	p = n.run("cloned", withVolume(claimVolume("work", "clone")))
	p.want("cat /work/f && echo two >> /work/f && cat /work/f", "top\none\ntop\none\ntwo")
	p.delete()
	n.claim("larger", class(clones), from("PersistentVolumeClaim", "clone"), size("12Mi"))
	p = n.run("larger", withVolume(claimVolume("work", "larger")))
	p.want("cat /work/f", "top\none\ntwo")
	p.delete()
	n.deleteClaim("clone")
	n.deleteClaim("source")
	waitVolumeGone(t, clone.Name)
	waitVolumeGone(t, source.Name)
	p = n.run("larger-again", withVolume(claimVolume("work", "larger")))
	p.want("cat /work/f", "top\none\ntwo")
	p.delete()
}

// TestSnapshotsElsewhere: where the scheduler has chosen a node that lacks the source, the claim says which node has it, and goes on there.
func TestSnapshotsElsewhere(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	has, lacks := cluster.workers[0], cluster.workers[1]
	n.claim("source", class(immediateOn(t, has)))
	n.volumeOf("source")
	n.snapshot("snapshot", snapshotClass(t), "source")
	n.waitSnapshot("snapshot")
	for _, kind := range []string{"VolumeSnapshot", "PersistentVolumeClaim"} {
		name := strings.ToLower(kind)
		source := "snapshot"
		if kind == "PersistentVolumeClaim" {
			source = "source"
		}
		// The layers are the source's.
		claim := n.claim(name, from(kind, source), func(c *corev1.PersistentVolumeClaim) { c.Annotations = nil })
		p := n.start(name, withVolume(claimVolume("work", name)), onNode(lacks))
		eventually(t, "claim "+name+" says where its source is", func() error {
			if events := strings.Join(eventsOf(t, n.name, claim.UID), "\n"); !strings.Contains(events, "is on node "+has) {
				return fmt.Errorf("%w: %s", errNot, events)
			}
			return nil
		})
		p.delete()
		p = n.run(name+"-there", withVolume(claimVolume("work", name)), onNode(has))
		p.want("cat /work/f", "top")
		p.delete()
	}
}

// TestSnapshotsThatAreRefused: who asks is told why.
func TestSnapshotsThatAreRefused(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	n.claim("source", class(immediateOn(t, cluster.workers[0])))
	n.volumeOf("source")
	n.snapshot("key", snapshotClass(t, "speed", "high"), "source")
	n.waitSnapshotError("key", `unknown key \"speed\"`)
	if mode() == modeCentral {
		// With distributed snapshotting nobody takes care of the snapshot of a volume that is on no node.
		n.claim("readers", class(atOnce(t)), access(corev1.ReadOnlyMany))
		n.volumeOf("readers")
		n.snapshot("readers", snapshotClass(t), "readers")
		n.waitSnapshotError("readers", "only volumes with upper: claim")
	}
	n.snapshot("good", snapshotClass(t), "source")
	n.waitSnapshot("good")
	each := storageClass(t, func(c *storagev1.StorageClass) {
		mode := storagev1.VolumeBindingImmediate
		c.VolumeBindingMode = &mode
	}, "layers", threeLayers, "upper", "pod")
	other := immediateOn(t, cluster.workers[0])
	for name, c := range map[string]struct {
		options []claimOption
		word    string
	}{
		"each":   {[]claimOption{class(each)}, "upper: claim"},
		"small":  {[]claimOption{class(other), size("4Mi")}, "less than the size"},
		"layers": {[]claimOption{layers("dir://layers/bottom"), class(defaultClass)}, "layers"},
	} {
		claim := n.claim(name, append([]claimOption{from("VolumeSnapshot", "good")}, c.options...)...)
		p := n.start(name, withVolume(claimVolume("work", name)), onNode(cluster.workers[0]))
		eventually(t, "claim "+name+" says "+c.word, func() error {
			if events := strings.Join(eventsOf(t, n.name, claim.UID), "\n"); !strings.Contains(events, c.word) {
				return fmt.Errorf("%w: %s", errNot, events)
			}
			return nil
		})
		p.delete()
	}
}

// TestSnapshotsUnderKills kills the driver of the node, and the controllers, while snapshots are taken and claims are made from them:
// twice, and with OVERLAY_CSI_PROOF four times.
func TestSnapshotsUnderKills(t *testing.T) {
	n := newNamespace(t, "baseline")
	node := cluster.workers[0]
	t.Cleanup(func() { must(t, errors.Join(cluster.waitDriver(), cluster.waitController())) })
	snapshots, restored := snapshotClass(t), atOnce(t)
	kept := func() string {
		return fmt.Sprint(keptIn(t, node, "volumes"), keptIn(t, node, "snapshots"), keptIn(t, node, "frozen"))
	}
	before := kept()
	n.claim("source", class(immediateOn(t, node)))
	p := n.run("writer", withVolume(claimVolume("work", "source")))
	p.want("echo one >> /work/f && sync && cat /work/f", "top\none")
	p.delete()
	n.snapshot("first", snapshots, "source")
	n.waitSnapshot("first")
	each := proof(2, 4)
	for i := range each {
		n.snapshot(fmt.Sprint("more-", i), snapshots, "source")
		n.claim(fmt.Sprint("restored-", i), class(restored), from("VolumeSnapshot", "first"))
		n.claim(fmt.Sprint("cloned-", i), class(restored), from("PersistentVolumeClaim", "source"))
		if i%2 == 0 {
			must(t, cluster.killDriver(node))
		} else if mode() == modeCentral {
			must(t, cluster.killControllers())
		}
		time.Sleep(time.Second)
	}
	for i := range each {
		n.waitSnapshot(fmt.Sprint("more-", i))
		for _, kind := range []string{"restored-", "cloned-"} {
			name := fmt.Sprint(kind, i)
			n.volumeOf(name)
			if i > 0 {
				continue
			}
			p := n.run(name, withVolume(claimVolume("work", name)))
			p.want("cat /work/f", "top\none")
			p.delete()
		}
	}
	var volumes []string
	for i := range each {
		for _, name := range []string{fmt.Sprint("restored-", i), fmt.Sprint("cloned-", i)} {
			volumes = append(volumes, n.volumeOf(name).Name)
			n.deleteClaim(name)
		}
	}
	must(t, cluster.killDriver(node))
	volumes = append(volumes, n.volumeOf("source").Name)
	n.deleteClaim("source")
	for i := range each {
		n.deleteSnapshot(fmt.Sprint("more-", i))
	}
	n.deleteSnapshot("first")
	for _, volume := range volumes {
		waitVolumeGone(t, volume)
	}
	eventually(t, "nothing is left on "+node, func() error {
		if after := kept(); after != before {
			return fmt.Errorf("%w: there was %s, and there is %s", errNot, before, after)
		}
		return nil
	})
}

// TestSnapshotsMany makes many claims of one snapshot at once, and as many new ones of the same node. With OVERLAY_CSI_PROOF it is 50, with
// a pod for each.
func TestSnapshotsMany(t *testing.T) {
	count, pods := proof(10, 50), proof(0, 50)
	n := newNamespace(t, "baseline")
	node := cluster.workers[0]
	onOne := immediateOn(t, node)
	n.claim("source", class(onOne))
	p := n.run("writer", withVolume(claimVolume("work", "source")))
	p.want("echo one >> /work/f && sync && cat /work/f", "top\none")
	p.delete()
	n.snapshot("snapshot", snapshotClass(t), "source")
	n.waitSnapshot("snapshot")
	for _, kind := range []string{"new", "restored"} {
		options, want := []claimOption{class(onOne), size("8Mi")}, "top"
		if kind == "restored" {
			options, want = append(options, from("VolumeSnapshot", "snapshot")), "top\none"
		}
		began := time.Now()
		var claims []string
		for i := range count {
			name := fmt.Sprintf("%s-%d", kind, i)
			claims = append(claims, name)
			n.claim(name, options...)
			if i < pods {
				n.start(name, withVolume(claimVolume("work", name)))
			}
		}
		bound := durations(count, began, func(i int) { n.volumeOf(claims[i]) })
		t.Logf("%d %s claims at once: bound after %s (half of them) to %s", count, kind, bound[count/2], bound[count-1])
		if pods > 0 {
			var started []*pod
			ready := durations(pods, began, func(i int) {
				p := &pod{&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: claims[i], Namespace: n.name}}, t}
				p.waitReady()
				started = append(started, p)
			})
			t.Logf("%d pods of %s claims at once: ready after %s (half of them) to %s", pods, kind, ready[pods/2], ready[pods-1])
			for _, p := range started {
				p.want("cat /work/f", want)
				p.deleteInBackground()
			}
			for _, p := range started {
				p.waitGone()
			}
		}
		for _, name := range claims {
			n.deleteClaim(name)
		}
		for _, name := range claims {
			eventually(t, "claim "+name+" is gone", func() error {
				if err := cluster.Get(context.Background(), name, n.name, &corev1.PersistentVolumeClaim{}); err == nil {
					return errNot
				}
				return nil
			})
		}
	}
}

// durations waits for things one after the other, and returns when it had each.
func durations(count int, began time.Time, wait func(int)) []time.Duration {
	taken := make([]time.Duration, count)
	for i := range count {
		wait(i)
		taken[i] = time.Since(began).Round(time.Second / 10)
	}
	return taken
}
