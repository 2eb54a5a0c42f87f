package rebase

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// shell runs a script in a directory.
func shell(t testing.TB, dir, script string) {
	t.Helper()
	command := exec.Command("sh", "-ec", script)
	command.Dir = dir
	if output, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", script, err, output)
	}
}

// newStack makes old layers by a script, new layers and uppers by changes of views of these. Each upper is one script.
func newStack(t testing.TB, metacopy bool, old, new string, uppers ...string) *stack {
	t.Helper()
	dir := memory(t)
	s := &stack{dir: dir, metacopy: metacopy, old: []string{filepath.Join(dir, "old")}}
	must(t, os.Mkdir(s.old[0], 0o755))
	shell(t, s.old[0], old)
	s.new = slices.Concat([]string{s.change(t, "new", new, s.old)}, s.old)
	for i, script := range uppers {
		s.uppers = slices.Concat([]string{s.change(t, fmt.Sprintf("upper%d", i), script, slices.Concat(s.uppers, s.old))}, s.uppers)
	}
	return s
}

// change makes an upper by a script in a view.
func (s *stack) change(t testing.TB, name, script string, lowers []string) string {
	t.Helper()
	upper := filepath.Join(s.dir, name)
	must(t, os.Mkdir(upper, 0o755))
	must(t, os.Mkdir(upper+".work", 0o755))
	view := s.overlay(lowers)
	view.Upper, view.Work = upper, upper+".work"
	target := filepath.Join(s.dir, "c")
	unmount, err := view.Mount(target)
	must(t, err)
	defer func() { must(t, unmount()) }()
	shell(t, target, script)
	return upper
}

// show returns the paths of files with their contents, of links with their targets, and of directories.
func (s *stack) show(t testing.TB, lowers ...[]string) string {
	t.Helper()
	target := filepath.Join(s.dir, "r")
	unmount, err := s.overlay(lowers...).Mount(target)
	must(t, err)
	defer func() { must(t, unmount()) }()
	command := exec.Command("sh", "-ec", `find . -mindepth 1 | LC_ALL=C sort | while read -r f; do
		if [ -L "$f" ]; then echo "$f@$(readlink "$f")"; elif [ -d "$f" ]; then echo "$f/"; else echo "$f=$(cat "$f")"; fi
	done | sed 's|^\./||' | tr '\n' ' '`)
	command.Dir = target
	output, err := command.CombinedOutput()
	must(t, err)
	return strings.TrimSpace(string(output))
}

// TestConflicts has each kind of conflict, and what is none, with what views show afterwards.
func TestConflicts(t *testing.T) {
	for name, test := range map[string]struct {
		metacopy bool
		old, new string
		uppers   []string
		// conflicts are the letters of both sides and the path. keep and take are what is shown with these policies.
		conflicts  []string
		keep, take string
	}{
		"nothing in common": {old: "echo 1 >a; echo 1 >b", new: "echo 2 >a", uppers: []string{"echo u >b"}, keep: "a=2 b=u"},
		"both changed": {
			old: "echo 1 >a", new: "echo 2 >a", uppers: []string{"echo u >a"},
			conflicts: []string{"CC a"}, keep: "a=u", take: "a=2",
		},
		"both alike": {old: "echo 1 >a", new: "echo 2 >a", uppers: []string{"echo 2 >a"}, keep: "a=2"},
		"same size": {
			old: "echo 1 >a", new: "echo 2 >a", uppers: []string{"echo 3 >a"},
			conflicts: []string{"CC a"}, keep: "a=3", take: "a=2",
		},
		"mode and content": {
			old: "echo 1 >a", new: "chmod 600 a", uppers: []string{"echo 3 >a"},
			conflicts: []string{"CC a"}, keep: "a=3", take: "a=1",
		},
		"only copied up":  {old: "echo 1 >a", new: "echo 2 >a", uppers: []string{"touch a; chmod 600 a; chmod 644 a"}, keep: "a=2"},
		"copied up, gone": {old: "echo 1 >a", new: "rm a", uppers: []string{"touch a"}, keep: ""},
		"changed, gone": {
			old: "echo 1 >a", new: "rm a", uppers: []string{"echo u >a"},
			conflicts: []string{"CD a"}, keep: "a=u", take: "",
		},
		"both added": {
			old: "true", new: "echo 2 >a", uppers: []string{"echo u >a"},
			conflicts: []string{"AA a"}, keep: "a=u", take: "a=2",
		},
		"both added alike":   {old: "true", new: "echo 2 >a", uppers: []string{"echo 2 >a"}, keep: "a=2"},
		"both deleted":       {old: "echo 1 >a", new: "rm a", uppers: []string{"rm a"}, keep: ""},
		"deleted, untouched": {old: "echo 1 >a; echo 1 >b", new: "echo 2 >b", uppers: []string{"rm a"}, keep: "b=2"},
		"deleted, changed": {
			old: "echo 1 >a", new: "echo 2 >a", uppers: []string{"rm a"},
			conflicts: []string{"DC a"}, keep: "", take: "a=2",
		},
		"added and deleted": {old: "true", new: "echo 2 >a", uppers: []string{"echo u >a", "rm a"}, keep: "a=2"},
		"file to directory": {
			old: "echo 1 >a", new: "echo 2 >a", uppers: []string{"rm a; mkdir a; echo u >a/b"},
			conflicts: []string{"CC a"}, keep: "a/ a/b=u", take: "a=2",
		},
		"link changed": {
			old: "ln -s 1 a", new: "ln -sfn 2 a", uppers: []string{"ln -sfn u a"},
			conflicts: []string{"CC a"}, keep: "a@u", take: "a@2",
		},
		"directory vanished": {
			old: "mkdir a; echo 1 >a/b", new: "rm -r a", uppers: []string{"echo u >a/c"},
			conflicts: []string{"CD a"}, keep: "a/ a/c=u", take: "",
		},
		"became a file": {
			old: "mkdir a; echo 1 >a/b", new: "rm -r a; echo 2 >a", uppers: []string{"echo u >a/c"},
			conflicts: []string{"CC a"}, keep: "a/ a/c=u", take: "a=2",
		},
		"vanished, only seen": {
			old: "mkdir -p a/d; echo 1 >a/d/b", new: "rm -r a",
			uppers: []string{"echo u >a/d/c; rm a/d/c; rm a/d/b"}, keep: "",
		},
		"vanished deep": {
			old: "mkdir -p a/d; echo 1 >a/d/b", new: "rm -r a", uppers: []string{"echo u >a/d/b"},
			conflicts: []string{"CD a"}, keep: "a/ a/d/ a/d/b=u", take: "",
		},
		"directory deleted": {old: "mkdir a; echo 1 >a/b", new: "echo 2 >a/b", uppers: []string{"rm -r a"}, keep: ""},
		"made again": {
			old: "mkdir a; echo 1 >a/b", new: "echo 2 >a/b",
			uppers: []string{"rm -r a; mkdir a; echo u >a/c"}, keep: "a/ a/c=u",
		},
		"made again, gone": {
			old: "mkdir a; echo 1 >a/b", new: "rm -r a", uppers: []string{"rm -r a; mkdir a; echo u >a/c"},
			conflicts: []string{"CD a"}, keep: "a/ a/c=u", take: "",
		},
		"both made it": {
			old: "true", new: "mkdir a; echo 2 >a/b; echo 2 >a/x", uppers: []string{"mkdir a; echo u >a/c; echo u >a/x"},
			conflicts: []string{"AA a/x"}, keep: "a/ a/b=2 a/c=u a/x=u", take: "a/ a/b=2 a/c=u a/x=2",
		},
		"one added inside": {old: "mkdir a", new: "echo 2 >a/b", uppers: []string{"echo u >a/c"}, keep: "a/ a/b=2 a/c=u"},
		"moved, changed below": {
			old: "mkdir a; echo 1 >a/b; echo 1 >a/c", new: "echo 2 >a/b",
			uppers: []string{"mv a d; echo u >d/c"}, keep: "d/ d/b=2 d/c=u",
		},
		"moved, conflict": {
			old: "mkdir a; echo 1 >a/b", new: "echo 2 >a/b", uppers: []string{"mv a d; echo u >d/b"},
			conflicts: []string{"CC d/b"}, keep: "d/ d/b=u", take: "d/ d/b=2",
		},
		"moved, vanished": {
			old: "mkdir a; echo 1 >a/b", new: "rm -r a", uppers: []string{"mv a d; echo u >d/c"},
			conflicts: []string{"CD d"}, keep: "d/ d/c=u", take: "",
		},
		"moved onto another": {
			old: "mkdir a; echo 1 >a/b", new: "mkdir d; echo 2 >d/x", uppers: []string{"mv a d"},
			conflicts: []string{"AA d"}, keep: "d/ d/b=1", take: "d/ d/x=2",
		},
		"moved away and back": {
			old: "mkdir a; echo 1 >a/b", new: "echo 2 >a/b",
			uppers: []string{"mv a d; mv d a; echo u >a/c"}, keep: "a/ a/b=2 a/c=u",
		},
		"hard links": {
			old: "echo 1 >a; ln a b", new: "rm a; echo 2 >a", uppers: []string{"echo u >a; ln a c"},
			conflicts: []string{"CC a"}, keep: "a=u b=1 c=u", take: "a=2 b=1 c=u",
		},
		"several uppers": {
			old: "echo 1 >a; mkdir d; echo 1 >d/b", new: "echo 2 >a; echo 2 >d/b",
			uppers:    []string{"echo u >a", "echo v >d/c", "echo w >d/b"},
			conflicts: []string{"CC a", "CC d/b"}, keep: "a=u d/ d/b=w d/c=v", take: "a=2 d/ d/b=2 d/c=v",
		},
		"metacopy": {
			metacopy: true, old: "echo 1 >a", new: "echo 22 >a", uppers: []string{"chmod 600 a"},
			conflicts: []string{"CC a"}, keep: "a=1", take: "a=22",
		},
		"metacopy, untouched": {
			metacopy: true, old: "echo 1 >a; echo 1 >b", new: "echo 22 >b",
			uppers: []string{"chmod 600 a"}, keep: "a=1 b=22",
		},
		"metacopy, mode": {
			metacopy: true, old: "echo 1 >a", new: "chmod 640 a", uppers: []string{"chmod 600 a"},
			conflicts: []string{"CC a"}, keep: "a=1", take: "a=1",
		},
		"metacopy, moved": {
			metacopy: true, old: "echo 1 >a", new: "echo 22 >a", uppers: []string{"mv a b"},
			conflicts: []string{"DC a", "AC b"}, keep: "b=1", take: "a=22",
		},
		"metacopy, gone": {
			metacopy: true, old: "mkdir d; echo 1 >d/a", new: "rm -r d", uppers: []string{"chmod 600 d/a"},
			conflicts: []string{"CD d"}, keep: "d/ d/a=1", take: "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, test.metacopy, test.old, test.new, test.uppers...)
			if test.conflicts == nil {
				test.take = test.keep
			}
			slices.Sort(test.conflicts)
			for policy, want := range map[Policy]string{KeepUpper: test.keep, TakeLayers: test.take} {
				uppers, conflicts := s.rebase(t, policy)
				if !slices.Equal(conflicts, test.conflicts) {
					t.Errorf("%s: conflicts %q, want %q", policy, conflicts, test.conflicts)
				}
				if got := s.show(t, uppers, s.new); got != want {
					t.Errorf("%s: shows %q, want %q", policy, got, want)
				}
			}
			if _, conflicts := s.rebase(t, Fail); !slices.Equal(conflicts, test.conflicts) {
				t.Errorf("%s: conflicts %q, want %q", Fail, conflicts, test.conflicts)
			}
		})
	}
}

// TestAttributesOfDirectories has directories that were copied up get the attributes of the new layers, and others keep theirs.
func TestAttributesOfDirectories(t *testing.T) {
	const old, new = "mkdir a b c; chown 1:1 a", "chmod 700 a; chmod 711 b; chown 7:8 a; touch -d 2001-01-01 a"
	s := newStack(t, false, old, new, "touch -d 2002-02-02 a/x; chmod 750 b; chmod 705 c; touch -d 2003-03-03 a")
	for policy, want := range map[Policy]string{
		KeepUpper: "a 700 7:8 2003 b 750 0:0 c 705 0:0", TakeLayers: "a 700 7:8 2003 b 711 0:0 c 705 0:0",
	} {
		uppers, conflicts := s.rebase(t, policy)
		if want := []string{"CC b"}; !slices.Equal(conflicts, want) {
			t.Errorf("%s: conflicts %q, want %q", policy, conflicts, want)
		}
		unmount, err := s.overlay(uppers, s.new).Mount(filepath.Join(s.dir, "r"))
		must(t, err)
		command := exec.Command("sh", "-ec", "echo $(stat -c '%n %a %u:%g' a; date -r a +%Y; stat -c '%n %a %u:%g' b c)")
		command.Dir = filepath.Join(s.dir, "r")
		got, err := command.CombinedOutput()
		must(t, errors.Join(err, unmount()))
		if got := strings.TrimSpace(string(got)); got != want {
			t.Errorf("%s: %s, want %s", policy, got, want)
		}
	}
}

// TestSameLayersNeedNoEdits rebases random uppers onto the layers that they were written on.
func TestSameLayersNeedNoEdits(t *testing.T) {
	base := memory(t)
	for seed := uint64(1000); seed < 1040; seed++ {
		dir := filepath.Join(base, fmt.Sprint(seed))
		must(t, os.Mkdir(dir, 0o755))
		s := newRandom(t, dir, seed)
		s.new = s.old
		if uppers, conflicts := s.rebase(t, Fail); !slices.Equal(uppers, s.uppers) || len(conflicts) > 0 {
			t.Errorf("seed %d: conflicts %q, uppers %q", seed, conflicts, uppers)
		}
	}
}

// TestReadsNoSharedContent compares a large file that only the uppers changed, of a layer that both have: its content is not read, though
// it is deleted.
func TestReadsNoSharedContent(t *testing.T) {
	s := newStack(t, false, "truncate -s 8T a; truncate -s 8T b", "echo 2 >c", "rm a")
	uppers, conflicts := s.rebase(t, Fail)
	if !slices.Equal(uppers, s.uppers) || len(conflicts) > 0 {
		t.Errorf("conflicts %q, uppers %q", conflicts, uppers)
	}
}

// TestFindEndsWithItsContext cancels a comparison of content that would take hours.
func TestFindEndsWithItsContext(t *testing.T) {
	s := newStack(t, false, "truncate -s 8T a", "mv a b; truncate -s 8T a", "rm a")
	defer s.close()
	tree := s.tree(t)
	tree.OneFileSystem = false
	stop := errors.New("stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	if _, err := Find(ctx, tree, Fail, nil); !errors.Is(err, stop) {
		t.Errorf("error %v, want %v", err, stop)
	}
}

func TestReport(t *testing.T) {
	report := Report{Policy: Fail}
	for i := range 1000 {
		report.Add(Conflict{Path: fmt.Sprintf("%d/%s\n", i, bytes.Repeat([]byte("x"), 4000)), Upper: 'C', Layers: 'D'})
	}
	if text := report.String(); len(text) > 2000 || strings.Contains(text, "\n") || !strings.HasPrefix(text, "1000 conflicts: ") {
		t.Errorf("report %d: %s", len(text), text)
	}
}
