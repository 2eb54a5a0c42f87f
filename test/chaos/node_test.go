package chaos

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// restart ends the driver as Kubernetes does. Views stay.
func (w *world) restart() {
	if w.fault == failedDisk {
		return
	}
	w.tell("restart")
	w.noteMemory()
	must(w.t, w.node.Stop())
	must(w.t, w.node.Start(w.t.Context()))
	for _, p := range w.pods {
		for _, v := range p.views {
			if v.published {
				w.checkView(p, v)
			}
		}
	}
}

// reboot starts the node again, in good order.
func (w *world) reboot() {
	if w.fault != noFault {
		return
	}
	w.tell("reboot")
	w.noteMemory()
	w.cachesMayBeOlder()
	must(w.t, w.node.Reboot())
	must(w.t, w.node.Start(w.t.Context()))
	w.forgetViews()
}

// cutPower takes the power from the node, and starts it again. What was not synced is lost.
func (w *world) cutPower() {
	w.t.Helper()
	w.noteMemory()
	if w.isOnBtrfs() {
		w.cutPowerOfBtrfs()
	} else {
		must(w.t, drivertest.ShutDown(w.node.DataRoot))
		must(w.t, w.node.Kill())
		must(w.t, drivertest.UnmountBeneath(w.node.KubeletDir))
		w.remountDisk()
	}
	w.cachesMayBeOlder()
	must(w.t, w.node.Reboot())
	must(w.t, w.node.Start(w.t.Context()))
	w.total.powerCuts++
	w.forgetViews()
}

// cutPowerOfBtrfs mounts the disk as it is when the driver has been killed. What the file system has not written to it by then is lost.
// Nothing writes to it meanwhile, and a transaction that the file system ends while the disk is copied leaves the trees of the last one.
func (w *world) cutPowerOfBtrfs() {
	w.t.Helper()
	must(w.t, w.node.Kill())
	cut := w.image() + ".cut"
	output, err := exec.Command("cp", "--sparse=always", w.image(), cut).CombinedOutput()
	if err != nil {
		w.fatalf("copy the disk: %v: %s", err, output)
	}
	must(w.t, drivertest.UnmountBeneath(w.node.KubeletDir))
	w.unmountDisk()
	must(w.t, os.Rename(cut, w.image()))
	must(w.t, drivertest.MountImage(w.fileSystem, w.image(), w.node.DataRoot))
}

// forgetViews notes that a node that has just started has no views. Uppers of pods begin anew.
func (w *world) forgetViews() {
	for _, p := range w.pods {
		for _, v := range p.views {
			v.published = false
			if v.cache != "" {
				// It begins with what the cache has then.
				v.upper, v.bases = nil, nil
				continue
			}
			if (v.claim == nil || v.claim.upper == nil) && v.Attributes["upper"] != inScratch {
				v.upper = newUpper(v.layers)
			}
		}
	}
	w.hasStarted = true
	w.boots++
}

// publishAgain publishes what the pods of the node have, as kubelet does when the node has started.
func (w *world) publishAgain() {
	w.hasStarted = false
	for _, p := range w.pods {
		for _, v := range p.views {
			if !v.published {
				w.publish(p, v)
			}
		}
	}
}

// collectGarbage removes the layers that nobody uses.
func (w *world) collectGarbage() {
	if w.fault != noFault {
		return
	}
	w.tell("collect garbage")
	w.cachesMayGo()
	// A driver that was started on a read-only disk makes its admin socket later.
	w.eventually("garbage is collected", func() error {
		_, err := w.node.Admin().GC(w.t.Context(), false, true)
		return err
	})
	if p, v := w.published(); v != nil {
		w.checkView(p, v)
	}
}

// badRequest sends a request that must be refused, and must change nothing.
func (w *world) badRequest() {
	before := w.volumes()
	p, err := w.node.NewPod(w.name("bad"))
	must(w.t, err)
	defer os.RemoveAll(p.Dir())
	v := drivertest.Volume{Name: "v", Attributes: maps.Clone(pick(w,
		map[string]string{},
		map[string]string{"layers": "dir://layers/../.."},
		map[string]string{"layers": "dir://layers/none"},
		map[string]string{"layers": "dir://other/lower"},
		map[string]string{"layers": "oci://\x00"},
		map[string]string{"layers": drivertest.Layers("lower"), "uper": "none"},
		map[string]string{"layers": drivertest.Layers("lower"), "upper": "volume://../../pki"},
		map[string]string{"layers": drivertest.Layers("lower"), "sizeLimit": "-1"},
		map[string]string{"layers": strings.Repeat(drivertest.Layers("lower")+"\n", 501)},
	))}
	if w.oneIn(3) {
		v.ID = pick(w, "..", "a/b", ".", strings.Repeat("x", 1000), "\x00")
	}
	w.tell("bad request %.100q %.200v", v.ID, v.Attributes)
	w.total.rpcs++
	_, err = p.Publish(w.t.Context(), v)
	if code := status.Code(err); code == codes.OK || code == codes.Internal {
		w.fatalf("answered with %s: %v", code, err)
	}
	if len(status.Convert(err).Message()) > 4096 {
		w.fatalf("the message has %d bytes", len(status.Convert(err).Message()))
	}
	if after := w.volumes(); !slices.Equal(before, after) && w.fault == noFault {
		w.fatalf("the volumes were %v and are %v", before, after)
	}
}

// volumes lists the volumes in the data root, but those of pods that are on their way out.
func (w *world) volumes() []string {
	w.t.Helper()
	entries, err := os.ReadDir(filepath.Join(w.node.DataRoot, "volumes"))
	if err != nil && w.fault != failedDisk {
		w.fatalf("%v", err)
	}
	var names []string
	for _, entry := range entries {
		if slices.ContainsFunc(w.claims, func(c *claim) bool { return c.ID == entry.Name() }) {
			names = append(names, entry.Name())
		}
	}
	return names
}
