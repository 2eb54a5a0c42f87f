package chaos

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// walk takes so many steps, ends everything, and looks at what is left.
func (w *world) walk(steps int) {
	for range steps {
		w.step()
	}
	if w.fault != noFault {
		w.mend()
	}
	w.end()
}

// step does one thing.
func (w *world) step() {
	if w.hasStarted {
		w.publishAgain()
		return
	}
	if w.fault != noFault && w.oneIn(6) {
		w.mend()
		return
	}
	switch choice := w.random.IntN(128); {
	case choice < 10:
		w.createVolume()
	case choice < 30:
		w.startPod()
	case choice < 54:
		w.change()
	case choice < 63:
		w.look()
	case choice < 73:
		if len(w.pods) > 0 {
			w.endPod(pick(w, w.pods...))
		}
	case choice < 74:
		w.expand()
	case choice < 75:
		w.deleteInUse()
	case choice < 77:
		w.overfill()
	case choice < 81:
		w.deleteVolume()
	case choice < 84:
		w.restart()
	case choice < 86:
		w.reboot()
	case choice < 89:
		w.collectGarbage()
	case choice < 91:
		w.badRequest()
	case choice < 92:
		w.intrude()
	case choice < 94:
		w.loseUpper()
	case choice < 97:
		w.meddle()
	case choice < 107:
		w.snapshotSomething()
	case choice < 115:
		w.restore()
	case choice < 118:
		w.deleteSnapshot()
	case choice < 119:
		w.chain()
	case choice < 121:
		w.list()
	case choice < 123:
		w.publishBesideUnpublish()
	case choice < 124:
		w.badSnapshot()
	default:
		if w.fault == noFault {
			w.breakSomething()
		}
	}
}

// end ends all pods, looks at what the claims have, deletes them, and looks for anything that is left.
func (w *world) end() {
	w.tell("end")
	for len(w.pods) > 0 {
		w.endPod(w.pods[0])
	}
	for len(w.snapshots) > 0 {
		s := w.snapshots[0]
		if c := w.cloneOf(s.origin, s.files, s.source()); c != nil {
			w.claims = append(w.claims, c)
		}
		w.removeSnapshot(s)
	}
	w.endCaches()
	for len(w.claims) > 0 {
		c := w.claims[0]
		if c.upper != nil {
			p, err := w.node.NewPod(w.name("reader"))
			must(w.t, err)
			reader := &pod{Pod: p}
			w.pods = append(w.pods, reader)
			v := &view{Volume: c.Volume, claim: c, layers: c.layers, upper: c.upper}
			reader.views = []*view{v}
			w.tell("read %s", c.Name)
			w.publish(reader, v)
			w.endPod(reader)
		}
		w.tell("delete %s", c.Name)
		w.delete(c)
	}
	w.noteMemory()
	w.tell("look for leftovers")
	w.eventually("nothing is left", w.leftovers)
	must(w.t, w.node.Stop())
	w.total.merges += strings.Count(w.node.Log(), "Frozen uppers merged")
	if log := w.node.Log(); strings.Contains(log, "panicked") || strings.Contains(log, "DATA RACE") {
		w.fatalf("the log tells of a panic or of a race")
	}
	w.remountDisk()
}

// leftovers returns an error that names what is left on a node without volumes.
func (w *world) leftovers() error {
	left, err := w.node.Leftovers()
	if err != nil {
		return err
	}
	if _, err := w.node.Admin().GC(w.t.Context(), false, true); err != nil {
		return err
	}
	for _, dir := range []string{"layers/*", "images", "trash", "snapshots", "frozen"} {
		found, err := filepath.Glob(filepath.Join(w.node.DataRoot, dir, "*"))
		if err != nil {
			return err
		}
		left = append(left, found...)
	}
	// The directory of a namespace may stay after a crash.
	caches, err := filepath.Glob(filepath.Join(w.node.DataRoot, "caches/*/*"))
	if err != nil {
		return err
	}
	left = append(left, caches...)
	loops, err := drivertest.LoopDevices(w.node.DataRoot)
	if err != nil {
		return err
	}
	if left = append(left, loops...); len(left) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(left, ", "))
	}
	if key, err := os.ReadFile(filepath.Join(w.canary(), "key")); err != nil || string(key) != "untouched" {
		return fmt.Errorf("the node's own file has %q: %w", key, err)
	}
	for _, name := range []string{"upper", "lower"} {
		for file, content := range map[string]string{"base": name, "dir/" + name: name} {
			if got, err := os.ReadFile(filepath.Join(w.node.LayerDir, name, file)); err != nil || string(got) != content {
				return fmt.Errorf("file %s of layer %s has %q: %w", file, name, got, err)
			}
		}
	}
	return nil
}
