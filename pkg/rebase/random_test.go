package rebase

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/test/viewtest"
)

var (
	seeds     = flag.Uint64("seeds", 40, "number of random trees")
	firstSeed = flag.Uint64("seed", 1, "first seed of the random trees")
)

// model says what a rebase has to show. It knows whole trees, where the package looks at the uppers.
type model struct {
	view, old, new map[string]node
	policy         Policy
	result         map[string]node
	conflicts      []string
}

// names returns the names in a directory of a tree, where has is "-" for none.
func names(tree map[string]node, dir string) (list []string) {
	for name := range tree {
		if path.Dir(name) == dir {
			list = append(list, path.Base(name))
		}
	}
	return list
}

// none is the directory of a tree that has none.
const none = "-"

func get(tree map[string]node, dir, name string) (node, bool) {
	n, has := tree[path.Join(dir, name)]
	return n, has && dir != none
}

// copyTree takes a subtree over.
func (m *model) copyTree(from map[string]node, source, target string) {
	for name, n := range from {
		if name == source || strings.HasPrefix(name, source+"/") {
			m.result[target+strings.TrimPrefix(name, source)] = n
		}
	}
}

func (m *model) conflict(name string) bool {
	m.conflicts = append(m.conflicts, name)
	return m.policy == TakeLayers
}

// merge merges the directory dir of the view, which goes on with below in the layers.
func (m *model) merge(dir, oldDir, newDir string) {
	all := slices.Concat(names(m.view, dir), names(m.old, oldDir), names(m.new, newDir))
	slices.Sort(all)
	for _, name := range slices.Compact(all) {
		at := path.Join(dir, name)
		v, hasV := m.view[at]
		o, hasO := get(m.old, oldDir, name)
		n, hasN := get(m.new, newDir, name)
		layersChanged := hasO != hasN || o.text != n.text
		takeNew := func() {
			if hasN {
				m.copyTree(m.new, path.Join(newDir, name), at)
			}
		}
		switch {
		case !hasV && !hasO:
			takeNew()
		case !hasV:
			if hasN && layersChanged && m.conflict(at) {
				takeNew()
			}
		case v.isDir:
			m.mergeDir(at, v, path.Join(oldDir, name), path.Join(newDir, name), oldDir == none, newDir == none)
		case !layersChanged, hasN && v.text == n.text:
			m.result[at] = v
		case hasO && v.text == o.text:
			takeNew()
		case m.conflict(at):
			takeNew()
		default:
			m.result[at] = v
		}
	}
}

// mergeDir merges a directory of the view over what the layers have in its place.
func (m *model) mergeDir(at string, v node, oldAt, newAt string, noOld, noNew bool) {
	o, hasO := m.old[oldAt]
	n, hasN := m.new[newAt]
	hasO, hasN = hasO && !noOld, hasN && !noNew
	takeNew := func() {
		if hasN {
			m.copyTree(m.new, newAt, at)
		}
	}
	isMoved := v.from != "" && (!hasO || v.from != oldAt)
	goesOn := v.from != ""
	switch {
	case !goesOn && hasN && n.isDir && !(hasO && o.isDir):
		// Both made it.
		m.attributes(at, v, node{}, n)
		m.merge(at, none, newAt)
		return
	case !goesOn || isMoved:
		changed := hasO != hasN || o.text != n.text
		if changed && !(hasN && hasO && n.isDir && o.isDir && v.text == n.text) {
			if m.conflict(at) {
				takeNew()
			} else {
				m.keep(at, v)
			}
			return
		}
	}
	if !goesOn {
		m.keepOwn(at, v)
		return
	}
	below, isThere := m.new[v.from]
	before := m.old[v.from]
	if !isThere || !below.isDir {
		if !isMoved && !m.isChanged(at, v.from) {
			takeNew()
			return
		}
		if m.conflict(at) {
			takeNew()
		} else {
			m.keep(at, v)
		}
		return
	}
	m.attributes(at, v, before, below)
	m.merge(at, v.from, v.from)
}

// keepOwn takes over a directory that hides what is below, but for directories in it that go on below themselves.
func (m *model) keepOwn(at string, v node) {
	m.result[at] = v
	m.merge(at, none, none)
}

// keep takes over a directory in a conflict: what the uppers have of it, which is not what it goes on with below in the old layers. Which
// entries are the uppers' own, the test does not know: they may be anything.
func (m *model) keep(at string, v node) {
	m.result[at] = v
	m.result[at+"/?"] = node{}
}

func (m *model) attributes(at string, v, before, below node) {
	switch {
	case before.text == below.text || v.text == below.text:
	case v.text == before.text:
		v.text = below.text
	case m.conflict(at):
		v.text = below.text
	}
	m.result[at] = v
}

// isChanged reports whether a directory in place has anything that is not in the old layers.
func (m *model) isChanged(at, from string) bool {
	if m.view[at].text != m.old[from].text {
		return true
	}
	for _, name := range names(m.view, at) {
		v, o := m.view[path.Join(at, name)], m.old[path.Join(from, name)]
		switch {
		case v.text != o.text:
			return true
		case v.isDir && (v.from != path.Join(from, name) || m.isChanged(path.Join(at, name), v.from)):
			return true
		}
	}
	return false
}

// TestRebaseRandomTrees rebases random uppers, and compares the view with the model.
func TestRebaseRandomTrees(t *testing.T) {
	base := memory(t)
	total := 0
	for seed := *firstSeed; seed < *firstSeed+*seeds; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			dir := filepath.Join(base, "c")
			must(t, os.Mkdir(dir, 0o755))
			defer func() { must(t, os.RemoveAll(dir)) }()
			total += checkRandom(t, dir, seed)
		})
	}
	t.Logf("%d conflicts", total)
}

// newRandom makes old layers, and new ones that are these with one more, in which some entries changed, and uppers.
func newRandom(t *testing.T, dir string, seed uint64) *stack {
	t.Helper()
	chain := viewtest.NewChain(t, dir, seed)
	tag(t, chain.Layers)
	old := chain.Layers
	grown := *chain
	grown.Grow(t, 1, 25)
	s := &stack{dir: dir, old: old, new: slices.Concat(grown.Uppers, old)}
	must(t, os.Rename(grown.Uppers[0], filepath.Join(dir, "new")))
	must(t, os.RemoveAll(grown.Uppers[0]+".work"))
	s.new[0] = filepath.Join(dir, "new")
	chain.Grow(t, 1+chain.IntN(3), 25)
	s.uppers, s.metacopy = chain.Uppers, chain.Metacopy
	return s
}

// tag has directories of layers say where they are: those of a view that a directory goes on below, and others do not.
func tag(t *testing.T, layers []string) {
	t.Helper()
	for _, layer := range layers {
		must(t, filepath.WalkDir(layer, func(name string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() && name != layer {
				err = unix.Lsetxattr(name, "user.from", []byte(strings.TrimPrefix(name, layer+"/")), 0)
			}
			return err
		}))
	}
}

func checkRandom(t *testing.T, dir string, seed uint64) (conflicts int) {
	s := newRandom(t, dir, seed)
	view, old, new := s.readView(t, s.uppers, s.old), s.readView(t, s.old), s.readView(t, s.new)
	for _, policy := range []Policy{Fail, KeepUpper, TakeLayers} {
		uppers, found := s.rebase(t, policy)
		conflicts += len(found)
		for i, line := range found {
			found[i] = line[3:]
		}
		got := s.readView(t, uppers, s.new)
		m := &model{view: view, old: old, new: new, policy: policy, result: map[string]node{}}
		m.merge(".", ".", ".")
		slices.Sort(m.conflicts)
		slices.Sort(found)
		if !slices.Equal(found, m.conflicts) && !s.metacopy {
			t.Errorf("%s: conflicts %q, want %q", policy, found, m.conflicts)
		}
		for name := range m.result {
			if kept, isKept := strings.CutSuffix(name, "/?"); isKept {
				delete(m.result, name)
				for name := range got {
					if strings.HasPrefix(name, kept+"/") {
						delete(got, name)
					}
				}
			}
		}
		if lines := difference(got, m.result); len(lines) > 0 && !s.metacopy {
			t.Errorf("%s:\n%s", policy, strings.Join(lines[:min(len(lines), 12)], "\n"))
		}
	}
	return conflicts
}
