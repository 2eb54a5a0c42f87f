//go:build e2e

package e2e

import (
	"strings"
	"testing"
)

const threeLayers = "dir://layers/top\ndir://layers/middle\ndir://layers/bottom"

func TestInlineVolume(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	node := cluster.workers[0]
	volume := inlineVolume("work", "layers", threeLayers)
	one := n.run("one", withVolume(volume), onNode(node))
	two := n.run("two", withVolume(volume), onNode(node))

	one.want("cat /work/f /work/top /work/middle /work/bottom /work/dir/nested", "top\ntop\nmiddle\nbottom\nnested")
	one.want("echo one > /work/f && echo one > /work/new && rm /work/middle && ls /work", "bottom\ndir\nf\nnew\ntop")
	two.want("cat /work/f && ls /work", "top\nbottom\ndir\nf\nmiddle\ntop")
	got, err := cluster.onNode(node, "cat /var/lib/layers/top/f /var/lib/layers/middle/middle")
	must(t, err)
	if got != "top\nmiddle" {
		t.Errorf("the layers are %q now", got)
	}

	one.delete()
	wantNothingOf(t, node, one.UID)
	two.want("echo two >> /work/f && cat /work/f", "top\ntwo")
}

func TestPodIsToldWhatIsWrongWithItsVolume(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	pods := map[*pod]string{}
	for name, c := range map[string]struct {
		keys []string
		word string
	}{
		"missing": {[]string{"layers", "dir://layers/no/such"}, "no/such"},
		"root":    {[]string{"layers", "dir://other/x"}, "other"},
		"key":     {[]string{"layers", "dir://layers/top", "size", "1Gi"}, "the keys are"},
		"escape":  {[]string{"layers", "dir://layers/../etc"}, ".."},
	} {
		pods[n.start(name, withVolume(inlineVolume("work", c.keys...)))] = c.word
	}
	for p, word := range pods {
		p.waitEvent(word)
		p.deleteInBackground()
	}
	for p := range pods {
		p.waitGone()
	}
}

func TestSubPath(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "baseline")
	p := n.run("pod",
		withVolume(inlineVolume("work", "layers", threeLayers), subPath("dir")),
		withVolume(emptyDirVolume("scratch", "")))
	p.want("cat /work/nested && echo more >> /work/nested && cat /work/nested", "nested\nnested\nmore")
	p.want("echo new > /work/new && ls /work", "nested\nnew")
	p.delete()
	wantNothingOf(t, p.Spec.NodeName, p.UID)
}

// TestRestrictedPod: what the layer's modes and owners let another user do, a pod without any privilege can do.
func TestRestrictedPod(t *testing.T) {
	t.Parallel()
	n := newNamespace(t, "restricted")
	p := n.run("pod", withVolume(inlineVolume("work", "layers", "dir://layers/shared\ndir://layers/bottom")), restricted(1000))
	p.want("id -u && cat /work/config && echo mine >> /work/config && cat /work/config", "1000\nshared\nshared\nmine")
	p.want("echo new > /work/new && stat -c %u /work/new", "1000")
	p.refused("echo x > /work/bottom", "Permission denied")
	p.refused("echo x > /etc/x", "Read-only file system")
	// No file of a layer gives it more: the view is nosuid and nodev where the driver mounts it. What the pod itself sees
	// is the runtime's own bind mount, of which runc (from 1.2 on) clears both: there the pod's security context holds.
	p.want("sed -n 's/^NoNewPrivs:.//p' /proc/self/status", "1")
	options, err := cluster.onNode(p.Spec.NodeName, "grep "+string(p.UID)+".*kubernetes.io~csi /proc/self/mountinfo | cut -d' ' -f6")
	must(t, err)
	if !strings.Contains(options, "nosuid,nodev") {
		t.Errorf("the view is mounted %q on the node", options)
	}
}
