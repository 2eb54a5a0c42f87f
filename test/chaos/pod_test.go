package chaos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// inScratch is an upper in the emptyDir that each pod has, at scratchUpper.
const (
	inScratch    = "volume://scratch/dir/up"
	scratchUpper = "dir/up"
)

// podLayer is an emptyDir that each pod has, and podLayerFiles are what is in it.
const podLayer = "layer"

var podLayerFiles = tree{"base": "pod", "dir/pod": "pod"}

// makeLayer makes a layer in a volume of a pod.
func (w *world) makeLayer(p *pod) {
	w.t.Helper()
	dir, err := p.EmptyDir(podLayer)
	must(w.t, err)
	for name, content := range podLayerFiles {
		must(w.t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		must(w.t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644))
	}
}

// startPod starts a pod with inline volumes of every kind, or some of them, and claims.
func (w *world) startPod() {
	w.t.Helper()
	name := w.name("pod")
	created, err := w.node.NewPod(name)
	must(w.t, err)
	p := &pod{Pod: created}
	w.pods = append(w.pods, p)
	scratch, err := p.EmptyDir("scratch")
	must(w.t, err)
	if w.oneIn(4) {
		w.plant(scratch)
		p.hasPlanted = true
	}
	w.makeLayer(p)
	for range 1 + w.random.IntN(3) {
		if len(w.claims) > 0 && w.oneIn(2) {
			c := pick(w, w.claims...)
			if !slices.ContainsFunc(p.views, func(v *view) bool { return v.claim == c }) {
				p.views = append(p.views, &view{Volume: c.Volume, claim: c, layers: c.layers})
			}
			continue
		}
		if w.oneIn(4) {
			p.views = append(p.views, w.cacheView())
			continue
		}
		from := pick(w, w.sources...)
		attributes := maps.Clone(pick(w,
			map[string]string{},
			map[string]string{"upper": "none"},
			map[string]string{"upper": inScratch},
			map[string]string{"medium": "memory", "sizeLimit": "8Mi"},
			map[string]string{"sizeEnforcement": "image", "sizeLimit": "16Mi"},
			map[string]string{"sizeLimit": "16Mi"},
			map[string]string{"sizeLimit": "16Mi", "ownership": "chown"},
		))
		attributes["layers"] = from.layers
		files := from.files
		if w.oneIn(4) {
			attributes["layers"], files = "volume://"+podLayer+"\n"+from.layers, merge(from.files, podLayerFiles)
		}
		if attributes["upper"] == inScratch &&
			slices.ContainsFunc(p.views, func(v *view) bool { return v.Attributes["upper"] == inScratch }) {
			continue // Only one volume may have an upper there.
		}
		inline := drivertest.Volume{Name: w.name("inline"), Attributes: attributes, Secrets: from.secrets}
		p.views = append(p.views, &view{Volume: inline, layers: files, upper: newUpper(files)})
	}
	w.giveGroup(p)
	for _, v := range p.views {
		if v.claim != nil {
			if v.upper = v.claim.upper; v.upper == nil {
				v.upper = newUpper(v.layers)
			}
		}
		w.tell("publish %s for %s with group %q: %v", v.Name, name, v.Group, v.Attributes)
		w.publish(p, v)
	}
}

// publish publishes a view, and looks at it.
func (w *world) publish(p *pod, v *view) {
	w.t.Helper()
	if p.hasPlanted && v.Attributes["upper"] == inScratch {
		w.total.rpcs++
		if _, err := p.Publish(w.t.Context(), v.Volume); w.fault == noFault && status.Code(err) == codes.Internal {
			w.fatalf("%v", err)
		}
		return
	}
	w.noteBases(v)
	err := w.call("NodePublishVolume", func(ctx context.Context) error { _, err := p.Publish(ctx, v.Volume); return err })
	v.published = err == nil
	if v.bases == nil {
		w.noteBases(v) // The power was cut.
	}
	if v.published {
		v.boot = w.boots
		if v.claim != nil && v.claim.upper != nil {
			v.claim.made = true
		}
		w.checkView(p, v)
	}
}

// giveGroup gives a pod an fsGroup, or none: the one that the other pods have with which it shares a view, because a view has one.
func (w *world) giveGroup(p *pod) {
	group := pick(w, "", "", "4321", "8765")
	for _, v := range p.views {
		v.Group = group
		for _, other := range w.pods {
			for _, shared := range other.views {
				if other != p && v.claim != nil && shared.claim == v.claim && v.claim.upper != nil {
					v.Group = shared.Group
				}
			}
		}
	}
}

func (w *world) checkView(p *pod, v *view) {
	w.t.Helper()
	var root unix.Stat_t
	// Where there is nothing to be read, it belongs to nobody.
	isEmpty := v.cache != "" && v.isReadOnly()
	if err := unix.Stat(p.Target(v.Name), &root); err == nil && v.Group != "" && fmt.Sprint(root.Gid) != v.Group && !isEmpty {
		w.fatalf("%s of %s is of group %d instead of %s", v.Name, p.Name, root.Gid, v.Group)
	}
	if v.upper == nil {
		w.findBase(p, v)
		return
	}
	if err := v.upper.check(p.Target(v.Name)); err != nil && w.fault != failedDisk {
		w.fatalf("%s of %s: %v", v.Name, p.Name, err)
	}
}

// published returns a view, or nil if there is none.
func (w *world) published() (*pod, *view) {
	var pods []*pod
	var views []*view
	for _, p := range w.pods {
		for _, v := range p.views {
			if v.published {
				pods, views = append(pods, p), append(views, v)
			}
		}
	}
	if len(views) == 0 {
		return nil, nil
	}
	i := w.random.IntN(len(views))
	return pods[i], views[i]
}

// change changes a file in a view.
func (w *world) change() {
	if p, v := w.published(); v != nil {
		w.changeView(p, v)
	}
}

func (w *world) changeView(p *pod, v *view) {
	w.t.Helper()
	dir := p.Target(v.Name)
	name := pick(w, "base", "dir/base", "dir/lower", "new", "dir/new", "made/new") + pick(w, "", "", "-2", "-3")
	content := strings.Repeat(w.name("content")+" ", w.random.IntN(4000))
	certain := v.upper.certain()
	var err error
	switch choice := w.random.IntN(5); {
	case v.isReadOnly():
		if err := os.WriteFile(filepath.Join(dir, "written"), nil, 0o644); err == nil {
			w.fatalf("%s of %s can be written to", v.Name, p.Name)
		}
		return
	case choice == 0 && len(certain) > 0:
		name = pick(w, certain...)
		w.tell("remove %s in %s of %s", name, v.Name, p.Name)
		err = v.upper.remove(dir, name)
	case choice == 1 && len(certain) > 0 && !v.upper.uncertain[name]:
		from := pick(w, certain...)
		if from == name {
			return
		}
		w.tell("rename %s to %s in %s of %s", from, name, v.Name, p.Name)
		err = v.upper.rename(dir, from, name)
	case choice == 2 && len(certain) > 0:
		name = pick(w, certain...)
		w.tell("append to %s in %s of %s", name, v.Name, p.Name)
		err = v.upper.write(dir, name, content, os.O_APPEND)
	default:
		w.tell("write %s in %s of %s", name, v.Name, p.Name)
		err = v.upper.write(dir, name, content, os.O_TRUNC)
	}
	if err != nil && w.fault == noFault {
		w.fatalf("%v", err)
	}
}

// look compares a view with the model, and asks for its statistics.
func (w *world) look() {
	p, v := w.published()
	if v == nil {
		return
	}
	w.tell("look at %s of %s", v.Name, p.Name)
	w.checkView(p, v)
	_ = w.call(getVolumeStats, func(ctx context.Context) error {
		_, err := w.node.NodeService().NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{
			VolumeId: p.Request(v.Volume).GetVolumeId(), VolumePath: p.Target(v.Name)})
		return err
	})
}

// endPod has a pod end, which nothing may prevent. As kubelet does, it tries each volume again, and none waits for another one: where the
// disk has failed, a volume cannot be told from another one of its pod before that has ended.
func (w *world) endPod(p *pod) {
	w.t.Helper()
	w.tell("end %s", p.Name)
	left := slices.Clone(p.views)
	ended := w.endJobs(p)
	w.eventually(p.Name+" ends", func() error {
		var failed error
		left = slices.DeleteFunc(left, func(v *view) bool {
			err := w.call("NodeUnpublishVolume of "+v.Name, func(ctx context.Context) error { return p.Unpublish(ctx, v.Volume) })
			failed = errors.Join(failed, err)
			return err == nil
		})
		return failed
	})
	ended()
	must(w.t, os.RemoveAll(filepath.Join(p.Dir(), "volumes/kubernetes.io~empty-dir")))
	if err := p.Remove(); err != nil {
		w.fatalf("%v", err)
	}
	w.pods = slices.DeleteFunc(w.pods, func(other *pod) bool { return other == p })
}

// plant has a pod put into its volume what an upper there would meet.
func (w *world) plant(scratch string) {
	w.t.Helper()
	planted := pick(w, "link", "fifo", "owner", "device", "file")
	w.tell("plant %s", planted)
	up := filepath.Join(scratch, scratchUpper)
	must(w.t, os.Mkdir(filepath.Dir(up), 0o777))
	must(w.t, plantedThings[planted](w, up))
}

// meddle has a pod change what belongs to its upper in its volume while the view is mounted. The pod must be able to end.
func (w *world) meddle() {
	p, v := w.published()
	if v == nil || v.Attributes["upper"] != inScratch {
		return
	}
	what := pick(w, "rename", "remove", "both")
	w.tell("%s what %s of %s has in its volume", what, v.Name, p.Name)
	// The pod has a mount of its own, without the busy mount.
	scratch, err := unix.OpenTree(unix.AT_FDCWD, filepath.Join(p.Dir(), "volumes/kubernetes.io~empty-dir/scratch"),
		unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	must(w.t, err)
	defer unix.Close(scratch)
	if what != "rename" {
		must(w.t, unix.Unlinkat(scratch, scratchUpper+"/overlay-csi.json", 0))
	}
	if what != "remove" {
		must(w.t, unix.Renameat(scratch, filepath.Dir(scratchUpper), scratch, "elsewhere"))
	}
	v.published, p.hasPlanted = false, true
}
