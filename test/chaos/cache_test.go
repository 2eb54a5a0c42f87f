package chaos

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// cache is what the model knows of a cache.
type cache struct {
	// versions are what it may have, the newest last. It has that one if isNewest is set. Nothing is a version too.
	versions []*upper
	isNewest bool
}

// namespace is that of all pods.
const namespace = "default"

// cacheView returns an inline volume on a cache, whose upper may become a version of it.
func (w *world) cacheView() *view {
	name := pick(w, "deps", "objects")
	if w.caches[name] == nil {
		w.caches[name] = &cache{versions: []*upper{newUpper(nil)}, isNewest: true}
	}
	attributes := maps.Clone(pick(w,
		map[string]string{},
		map[string]string{"commit": name},
		map[string]string{"commit": name},
		map[string]string{"commit": name, "sizeLimit": "8Mi"},
		map[string]string{"commit": name, "sizeLimit": "16Mi", "sizeEnforcement": "image"},
		map[string]string{"upper": "none"},
	))
	attributes["layers"] = "cache://" + name
	return &view{Volume: drivertest.Volume{Name: w.name("inline"), Attributes: attributes}, cache: name, commit: attributes["commit"]}
}

// noteBases notes what a view that is published for the first time in a boot may begin with.
func (w *world) noteBases(v *view) {
	if v.cache == "" || v.upper != nil {
		return
	}
	c := w.caches[v.cache]
	if c.isNewest {
		v.bases = append(v.bases, c.versions[len(c.versions)-1])
	} else {
		v.bases = append(v.bases, c.versions...)
	}
}

// findBase finds out which version of its cache a view has begun with.
func (w *world) findBase(p *pod, v *view) {
	w.t.Helper()
	var wrong error
	// The newest first: versions may be alike.
	for _, base := range slices.Backward(v.bases) {
		err := base.check(p.Target(v.Name))
		if err == nil {
			v.upper = base.clone()
			if c := w.caches[v.cache]; len(v.bases) > 1 && !c.isNewest {
				c.versions, c.isNewest = []*upper{base}, true
			}
			return
		}
		wrong = errors.Join(wrong, err)
	}
	if w.fault == failedDisk {
		v.published = false
		return
	}
	w.fatalf("%s of %s has none of the %d versions of cache %s: %v", v.Name, p.Name, len(v.bases), v.cache, wrong)
}

// cachesMayGo notes that caches may be removed: for room, or as garbage.
func (w *world) cachesMayGo() {
	for _, c := range w.caches {
		c.versions, c.isNewest = append([]*upper{newUpper(nil)}, c.versions...), false
	}
}

// cachesMayBeOlder notes, when the node goes down, that versions which were not written to the disk are lost.
func (w *world) cachesMayBeOlder() {
	for name, c := range w.caches {
		data, err := os.ReadFile(filepath.Join(w.node.DataRoot, "caches", namespace, name, "cache.json"))
		var record map[string]any
		if err != nil || json.Unmarshal(data, &record) != nil || record["bootID"] != nil {
			c.isNewest = false
		}
	}
}

// endJobs has a pod succeed or fail before its volumes are unpublished. The function that it returns, called when they are, notes what the
// caches have then.
func (w *world) endJobs(p *pod) (ended func()) {
	phase := pick(w, corev1.PodSucceeded, corev1.PodSucceeded, corev1.PodFailed)
	w.phases.Set(p.Pod, phase)
	before, boot := w.fault, w.boots
	uppers := map[*view]*upper{}
	for _, v := range p.views {
		uppers[v] = v.upper
	}
	return func() {
		for _, v := range p.views {
			if v.commit == "" || phase != corev1.PodSucceeded || uppers[v] == nil {
				continue
			}
			c := w.caches[v.commit]
			c.versions = append(c.versions, uppers[v].clone())
			c.isNewest = v.published && before == noFault && w.fault == noFault && boot == w.boots && v.boot == boot
			if c.isNewest {
				w.total.commits++
			}
		}
	}
}

// endCaches looks at what the caches have, and deletes them.
func (w *world) endCaches() {
	w.t.Helper()
	for _, name := range slices.Sorted(maps.Keys(w.caches)) {
		created, err := w.node.NewPod(w.name("reader"))
		must(w.t, err)
		p := &pod{Pod: created}
		w.pods = append(w.pods, p)
		v := &view{Volume: drivertest.Volume{Name: "cache", Attributes: map[string]string{"layers": "cache://" + name}}, cache: name}
		p.views = []*view{v}
		w.tell("read cache %s", name)
		w.publish(p, v)
		w.endPod(p)
		w.deleteCache(name)
	}
}

// deleteCache deletes a cache, or finds that there is none.
func (w *world) deleteCache(name string) {
	w.t.Helper()
	w.eventually("cache "+name+" is deleted", func() error {
		// What a power cut has left of a volume may use any cache, until it is discarded.
		caches, err := w.node.Admin().Caches(w.t.Context())
		for _, found := range caches {
			if found.Name == name {
				err = errors.Join(err, w.node.Admin().DeleteCache(w.t.Context(), namespace, name))
			}
		}
		return err
	})
}
