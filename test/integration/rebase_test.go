package integration

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// tuned makes a claim on model v1 that has an entry of its own, one that it changed, one that was only copied up, and one that it
// deleted. It returns the layers of the next version.
func tuned(t *testing.T, node *drivertest.Node, kind string) (v drivertest.Volume, _ string, attributes []string) {
	t.Helper()
	layersOf(t, node,
		map[string]string{"layer": "layer", "config": "v1", "weights": "v1", "touched": "v1", "old": "v1"},
		map[string]string{"layer": "layer", "config": "v2", "weights": "v2", "touched": "v2", "old": "v1"})
	v1, next := drivertest.Layers("layer-0"), drivertest.Layers("layer-1")
	attributes = freezings[kind]
	v = createSized(t, node, "tuned", readWriteOnce, snapshotSize, append([]string{"layers", v1}, attributes...)...)
	pod := newPod(t, node, "tuner")
	target := publish(t, pod, v)
	script(t, "cd "+target+" && printf tuned >config && printf new >own && touch touched && rm old")
	unpublish(t, pod, v)
	removePod(t, pod)
	return v, next, attributes
}

func script(t *testing.T, text string) {
	t.Helper()
	if out, err := exec.Command("sh", "-ec", text).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", text, err, out)
	}
}

// rebased are the files of the tuned claim over the new layers, beside that which wantFiles adds.
var rebased = map[string]map[string]string{
	"keep-upper":  {"config": "tuned", "weights": "v2", "touched": "v2", "own": "new"},
	"take-layers": {"config": "v2", "weights": "v2", "touched": "v2", "own": "new"},
}

// TestRebase makes claims with other layers from a claim and from a snapshot.
func TestRebase(t *testing.T) {
	for _, kind := range []string{"directory", "image", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			node := newNode(t)
			if kind == "btrfs" {
				mountImage(t, "btrfs with quota", 1<<30, node.DataRoot, "")
			}
			start(t, node)
			v, next, attributes := tuned(t, node, kind)
			onto := append([]string{"layers", next}, attributes...)
			out, err := overlayctl(t, node, "rebase", "--dry-run", v.ID, "--layers", next)
			must(t, err)
			if out != "C C /config\n" {
				t.Errorf("overlayctl rebase: %q", out)
			}
			snapshot := createSnapshot(t, node, "s", v)
			var made []drivertest.Volume
			for of, source := range map[string]*csi.VolumeContentSource{"claim": ofVolume(v), "snapshot": ofSnapshot(snapshot)} {
				for _, policy := range []string{"", "fail"} {
					attributes := onto
					if policy != "" {
						attributes = append([]string{"onConflict", policy}, onto...)
					}
					_, err := createFrom(timeout(t), node, "failed", source, snapshotSize, attributes...)
					wantCode(t, err, codes.FailedPrecondition, `1 conflict: "config"`)
				}
				for policy, want := range rebased {
					attributes := append([]string{"onConflict", policy}, onto...)
					name := of + "-" + policy
					clone := restore(t, node, name, source, attributes...)
					again := restore(t, node, name, source, attributes...)
					if again.ID != clone.ID || clone.Attributes["layers"] != next {
						t.Errorf("%s: %v, and repeated %v", name, clone, again)
					}
					wantVolume(t, node, clone, want, "written")
					made = append(made, clone)
				}
			}
			_, err = createFrom(timeout(t), node, "claim-keep-upper", ofVolume(v), snapshotSize, append([]string{"onConflict", "fail"}, onto...)...)
			wantCode(t, err, codes.AlreadyExists, "onConflict")
			_, err = createFrom(timeout(t), node, "odd", ofVolume(v), snapshotSize, append([]string{"onConflict", "ask"}, onto...)...)
			wantCode(t, err, codes.InvalidArgument, "keep-upper")
			wantVolume(t, node, v, map[string]string{"config": "tuned", "weights": "v1", "touched": "v1", "own": "new"})
			deleteSnapshot(t, node, snapshot)
			for _, v := range append(made, v) {
				deleteVolume(t, node, v)
			}
			wantNothingFrozen(t, node)
		})
	}
}

// TestRebaseDryRun lists the conflicts of a volume in use as JSON.
func TestRebaseDryRun(t *testing.T) {
	node := startNode(t)
	v, next, _ := tuned(t, node, "directory")
	pod := newPod(t, node, "user")
	target := publish(t, pod, v)
	script(t, "printf mine >"+target+"/weights; chmod 600 "+target+"/touched")
	out, err := overlayctl(t, node, "rebase", "--dry-run", v.ID, "--layers", next, "-o", "json")
	must(t, err)
	var paths []string
	for line := range strings.Lines(out) {
		var conflict struct{ Path, Upper, Layers string }
		must(t, json.Unmarshal([]byte(line), &conflict))
		paths = append(paths, conflict.Upper+conflict.Layers+conflict.Path)
	}
	slices.Sort(paths)
	if got := strings.Join(paths, " "); got != "CCconfig CCtouched CCweights" {
		t.Errorf("conflicts %s", got)
	}
	for _, args := range [][]string{{v.ID, "--layers", next}, {"--dry-run", v.ID}, {"--dry-run", "none", "--layers", next}} {
		if out, err := overlayctl(t, node, append([]string{"rebase"}, args...)...); err == nil {
			t.Errorf("%v: %s", args, out)
		}
	}
	unpublish(t, pod, v)
	deleteVolume(t, node, v)
}

// TestRebaseKills kills the driver while it makes claims with other layers. Repeated, each request is answered with OK, and nothing is
// left.
func TestRebaseKills(t *testing.T) {
	takesMinutes(t)
	for _, kind := range []string{"directory", "image"} {
		t.Run(kind, func(t *testing.T) {
			node := startNode(t)
			v, next, attributes := tuned(t, node, kind)
			took, interrupting := 200*time.Millisecond, 0
			for range proof(12, 60) {
				for policy, want := range rebased {
					create := func(ctx context.Context) (drivertest.Volume, error) {
						return createFrom(ctx, node, "clone", ofVolume(v), snapshotSize,
							append([]string{"layers", next, "onConflict", policy}, attributes...)...)
					}
					done := make(chan error, 1)
					go func() { _, err := create(timeout(t)); done <- err }()
					time.Sleep(rand.N(took * 5 / 4))
					must(t, node.Kill())
					if <-done != nil {
						interrupting++
					}
					start(t, node)
					began := time.Now()
					clone, err := create(timeout(t))
					must(t, err)
					took = max(time.Since(began), 5*time.Millisecond)
					wantVolume(t, node, clone, want)
					deleteVolume(t, node, clone)
				}
			}
			t.Logf("%d kills came while a request was under way", interrupting)
			deleteVolume(t, node, v)
			wantNothingFrozen(t, node)
		})
	}
}

// TestGroupOfARebasedClone: what pods with other fsGroups wrote, and what is taken from the new layers, belongs to that of the pod that has
// the clone.
func TestGroupOfARebasedClone(t *testing.T) {
	onEachFreezing(t, []string{"directory", "image", "btrfs"}, func(t *testing.T, node *drivertest.Node, attributes []string) {
		layersOf(t, node,
			map[string]string{"layer": "layer", "config": "v1", "dir/file": "v1", "kept/file": "v1", "touched": "v1"},
			map[string]string{"layer": "layer", "config": "v2", "dir/file": "v2", "kept/file": "v2", "touched": "v2", "both/new": "v2"})
		script(t, "chmod 711 "+node.LayerDir+"/layer-1/dir")
		v := createSized(t, node, "source", readWriteOnce, snapshotSize, append(attributes, "layers", drivertest.Layers("layer-0"))...)
		use := func(v drivertest.Volume, group uint32, text string, names ...string) {
			t.Helper()
			pod := newPod(t, node, "pod")
			v = withGroup(v, groupText(group))
			target := publish(t, pod, v)
			script(t, "cd "+target+" && "+text)
			for _, name := range append(names, "", "layer", "config", "dir", "dir/own", "kept", "kept/own", "both", "both/own", "touched") {
				wantGroups(t, target, map[string]uint32{name: group})
			}
			unpublish(t, pod, v)
			removePod(t, pod)
		}
		use(v, 1000, "mkdir both && touch dir/own kept/own both/own touched && printf mine >config && chgrp 1000 . both */own")
		use(v, 2000, "true")
		for policy := range rebased {
			clone := restore(t, node, policy, ofVolume(v),
				append(attributes, "layers", drivertest.Layers("layer-1"), "onConflict", policy)...)
			use(clone, 3000, "stat -c %a dir | grep -x 711", "both/new", "dir/file")
			use(clone, 1000, "true", "both/new", "dir/file")
			deleteVolume(t, node, clone)
		}
		use(v, 1000, "true")
		deleteVolume(t, node, v)
		wantNothingFrozen(t, node)
	})
}
