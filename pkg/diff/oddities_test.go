package diff_test

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	umoci "github.com/opencontainers/umoci/oci/layer"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/diff"
)

// roundTrip writes the layer of a stack, and compares what every program makes of it with the view.
func roundTrip(t *testing.T, s *stack) {
	t.Helper()
	tree := s.tree()
	want := look(t, s.viewAt(s.uppers, s.layers))
	data := s.layer(tree)
	if again := s.layer(s.tree()); !bytes.Equal(again, data) {
		t.Error("the tar has other bytes the second time")
	}
	over := func(layer string) []string { return slices.Concat([]string{layer}, s.layers) }
	compare(t, "unpack", look(t, s.viewAt(nil, over(s.unpacked(data)))), want)

	layer := s.mkdir("containerd")
	_, err := archive.Apply(t.Context(), layer, bytes.NewReader(data), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	must(t, err)
	// containerd takes no attributes of the root from a layer.
	withoutRoot := maps.Clone(want)
	delete(withoutRoot, ".")
	lookBeneath := func(root string) map[string]string {
		found := look(t, root)
		delete(found, ".")
		return found
	}
	compare(t, "containerd's overlayfs snapshotter", lookBeneath(s.viewAt(nil, over(layer))), withoutRoot)
	flat := s.flat()
	_, err = archive.Apply(t.Context(), flat, bytes.NewReader(data))
	must(t, err)
	compare(t, "containerd's native snapshotter", lookBeneath(flat), withoutRoot)

	layer = s.mkdir("umoci")
	must(t, umoci.UnpackLayer(layer, bytes.NewReader(data), &umoci.UnpackOptions{OnDiskFormat: umoci.OverlayfsRootfs{}}))
	compare(t, "umoci for overlayfs", look(t, s.viewAt(nil, over(layer))), want)
	flat = s.flat()
	must(t, umoci.UnpackLayer(flat, bytes.NewReader(data), &umoci.UnpackOptions{OnDiskFormat: umoci.DirRootfs{}}))
	compare(t, "umoci into one tree", look(t, flat), want)
}

// sh runs a script in a directory.
func sh(t testing.TB, dir, script string) {
	t.Helper()
	command := exec.Command("sh", "-ec", script)
	command.Dir = dir
	if output, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%s\n%v: %s", script, err, output)
	}
}

// TestOddities has a row for each thing that overlayfs does in an upper. Each step is an upper of its own.
func TestOddities(t *testing.T) {
	const layer = `mkdir -p d/sub/deep e f; echo 1 >d/one; echo 2 >d/two; echo 3 >d/sub/three; echo 4 >d/sub/deep/four; echo 5 >e/five
		echo 6 >six; ln -s six link; chmod 4755 six; head -c 100000 /dev/urandom >e/big`
	long := strings.Repeat("n", 255)
	for name, c := range map[string]struct {
		steps    []string
		metacopy bool
		want     string
	}{
		"nothing": {steps: []string{":"}},
		"new files": {
			steps: []string{"echo x >new; mkdir -p n/m; echo y >n/m/f"},
			want:  "A n, A n/m, A n/m/f, A new",
		},
		"change":               {steps: []string{"echo x >>d/one"}, want: "C d/one"},
		"delete":               {steps: []string{"rm d/one; rm -r e"}, want: "D d/one, D e"},
		"delete what is new":   {steps: []string{"echo x >new; mkdir n; rm -r new n"}},
		"mode of a directory":  {steps: []string{"chmod 700 d/sub"}, want: "C d/sub"},
		"owner of a directory": {steps: []string{"chown 7:8 d"}, want: "C d"},
		"owner of the root":    {steps: []string{"chown 7:8 ."}, want: "C ."},
		"time of a directory":  {steps: []string{"touch -d @1000.5 d/sub"}},
		"moved file":           {steps: []string{"mv d/one e/uno"}, want: "D d/one, A e/uno"},
		"moved directory": {
			steps: []string{"mv d x"},
			want:  "D d, A x, A x/one, A x/sub, A x/sub/deep, A x/sub/deep/four, A x/sub/three, A x/two",
		},
		"moved and changed": {
			steps: []string{"mv d x; echo y >>x/one; rm x/two; echo z >x/new"},
			want:  "D d, A x, A x/new, A x/one, A x/sub, A x/sub/deep, A x/sub/deep/four, A x/sub/three",
		},
		"moved in a moved one": {
			steps: []string{"mv d/sub d/bus; mv d x; mv x/bus/deep e/deep"},
			want:  "D d, A e/deep, A e/deep/four, A x, A x/bus, A x/bus/three, A x/one, A x/two",
		},
		"moved away and back": {steps: []string{"mv d x; mv x d; echo y >>d/one"}, want: "C d/one"},
		"moved over": {
			steps: []string{"mv e/five d/one; mv f g; rmdir g; mv d/sub f"},
			want:  "C d/one, D d/sub, D e/five, C f, A f/deep, A f/deep/four, A f/three",
		},
		"moved in two steps": {
			steps: []string{"mv d x; echo 1 >x/a", "mv x/sub y; echo 2 >x/b", "rm y/three; mv x d"},
			want:  "C d, A d/a, A d/b, C d/one, D d/sub, C d/two, A y, A y/deep, A y/deep/four",
		},
		"opaque":        {steps: []string{"rm -r d; mkdir d; echo x >d/one"}, want: "C d, C d/one, D d/sub, D d/two"},
		"opaque, empty": {steps: []string{"rm -r d; mkdir d"}, want: "C d, D d/one, D d/sub, D d/two"},
		"opaque in opaque": {
			steps: []string{"rm -r d; mkdir -p d/sub", "rm -r d/sub; mkdir d/sub; echo x >d/sub/x"},
			want:  "C d, D d/one, D d/sub/deep, D d/sub/three, A d/sub/x, D d/two",
		},
		"opaque beneath a whiteout": {
			steps: []string{"rm -r d", "mkdir d; echo x >d/one"},
			want:  "C d, C d/one, D d/sub, D d/two",
		},
		"opaque beneath a file": {
			steps: []string{"rm -r d; echo x >d", "rm d; mkdir d; echo x >d/one"},
			want:  "C d, C d/one, D d/sub, D d/two",
		},
		"merged over opaque": {
			steps: []string{"rm -r d; mkdir d; echo x >d/one", "echo y >d/y"},
			want:  "C d, C d/one, D d/sub, D d/two, A d/y",
		},
		"file over directory": {steps: []string{"rm -r d; echo x >d"}, want: "C d"},
		"directory over file": {steps: []string{"rm six; mkdir six; echo x >six/x"}, want: "C six, A six/x"},
		"and back": {
			steps: []string{"rm -r d six; echo x >d; mkdir six", "rm -r d six; mkdir d; echo x >six"},
			want:  "C d, D d/one, D d/sub, D d/two, C six",
		},
		"link over directory":   {steps: []string{"rm -r d; ln -s e d"}, want: "C d"},
		"whiteout of an upper":  {steps: []string{"echo x >new; mkdir n; echo y >n/y", "rm -r new n d/one"}, want: "D d/one"},
		"back after a whiteout": {steps: []string{"rm d/one", "echo x >d/one"}, want: "C d/one"},
		"hard links": {
			steps: []string{"echo x >new; ln new d/hard; ln new e/hard; ln -s x s; ln s d/s"},
			want:  "A d/hard, A d/s, A e/hard, A new, A s",
		},
		"hard link to a layer":    {steps: []string{"ln d/one one"}, want: "C d/one, A one"},
		"hard links, one deleted": {steps: []string{"echo x >a; ln a b; ln a c", "rm b; echo y >c"}, want: "A a, A c"},
		"metacopy": {
			steps:    []string{"chown 5:6 e/big; chmod 600 d/one"},
			metacopy: true,
			want:     "C d/one, C e/big",
		},
		"metacopy, moved": {
			steps:    []string{"chown 5:6 e/big; mv e/big d/moved", "chmod 640 d/moved; ln d/moved hard"},
			metacopy: true,
			want:     "A d/moved, D e/big, A hard",
		},
		"devices": {
			steps: []string{"mknod c c 1 3; mknod b b 7 300; mkfifo p; mknod d/c c 4095 1048575; chmod 640 c"},
			want:  "A b, A c, A d/c, A p",
		},
		"set-user-ID": {
			steps: []string{"cp /bin/true t; chown 3:4 t; chmod 6755 t; chmod 1777 f"},
			want:  "C f, A t",
		},
		"times": {
			steps: []string{"touch -d @1000.25 d/one; touch -d @5000000000.999999999 n; touch -h -d @77.000000001 link"},
			want:  "C d/one, C link, A n",
		},
		"large owners": {steps: []string{"echo x >x; chown 4000000000:4000000001 x"}, want: "A x"},
		"sparse": {
			steps: []string{"truncate -s 20M s; echo x | dd of=s bs=1 seek=10000000 conv=notrunc 2>/dev/null; " +
				"truncate -s 3M holes"},
			want: "A holes, A s",
		},
		"names": {
			steps: []string{"echo x >'a b'; printf x >\"$(printf 'n\\nl')\"; printf x >\"$(printf '\\377\\376')\"; " +
				"echo x >./-x; echo x >d/.wx; echo y >./ö"},
			want: "A -x, A a b, A d/.wx, A n\nl, A ö, A \xff\xfe",
		},
		"long names": {
			steps: []string{"mkdir -p " + long + "/" + long + "; echo x >" + long + "/" + long + "/" + long + "; " +
				"ln -s " + long + "/" + long + " l"},
			want: "A l, A " + long + ", A " + long + "/" + long + ", A " + long + "/" + long + "/" + long,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t)
			s.metacopy = c.metacopy
			sh(t, s.layers[0], layer)
			// Something in a second layer, merged with the first one.
			sh(t, s.addLayer(), "mkdir -p d/sub; echo 2.2 >d/two; mknod d/none c 0 0; echo 7 >seven")
			for _, step := range c.steps {
				s.write(func(view string) { sh(t, view, step) })
			}
			if got := strings.Join(s.changes(s.tree()), ", "); got != c.want {
				t.Errorf("changes:\n got %s\nwant %s", got, c.want)
			}
			roundTrip(t, s)
		})
	}
}

// TestDeepTree has more levels than handles stay open.
func TestDeepTree(t *testing.T) {
	s := newStack(t)
	const depth = 300
	must(t, os.MkdirAll(filepath.Join(s.layers[0], strings.Repeat("d/", depth)), 0o755))
	s.write(func(view string) {
		for n := 1; n < depth; n += 20 {
			dir := filepath.Join(view, strings.Repeat("d/", n))
			must(t, os.WriteFile(dir+"/a", nil, 0o600))
			must(t, os.WriteFile(dir+"/z", []byte("z"), 0o600))
		}
	})
	for _, name := range []string{"d", "moved-d"} {
		view := s.viewAt(nil, slices.Concat([]string{s.unpacked(s.layer(s.tree()))}, s.layers))
		compare(t, "unpack", look(t, view), look(t, s.viewAt(s.uppers, s.layers)))
		s.write(func(view string) {
			must(t, os.Rename(filepath.Join(view, "d", name), filepath.Join(view, "d/moved-"+name)))
		})
	}
}

// TestLargeDirectory has a directory with more names than are in memory at once.
func TestLargeDirectory(t *testing.T) {
	const count = 40_000
	s := newStack(t)
	s.uppers = []string{s.mkdir("upper")}
	many := filepath.Join(s.uppers[0], "many")
	must(t, os.MkdirAll(many+"/0/x", 0o755))
	must(t, os.MkdirAll(many+"/2/x", 0o755))
	for i := range count {
		must(t, unix.Mknod(fmt.Sprint(many, "/", 1_000_000+i), unix.S_IFREG|0o600, 0))
	}
	changes := s.changes(s.tree())
	if len(changes) != count+5 || !slices.IsSorted(changes) {
		t.Errorf("%d changes, want %d in order", len(changes), count+5)
	}
}

// TestXattrWhiteouts has the whiteouts of an overlay that lies in a volume (Linux 6.7).
func TestXattrWhiteouts(t *testing.T) {
	s := newStack(t)
	sh(t, s.layers[0], "mkdir d; echo 1 >d/one; echo 2 >d/two")
	s.uppers = []string{s.mkdir("upper")}
	sh(t, s.uppers[0], `mkdir d; touch d/one`)
	must(t, unix.Setxattr(s.uppers[0]+"/d", "trusted.overlay.opaque", []byte("x"), 0))
	must(t, unix.Setxattr(s.uppers[0]+"/d/one", "trusted.overlay.whiteout", []byte("y"), 0))
	if _, err := os.Lstat(s.viewAt(s.uppers, s.layers) + "/d/one"); err == nil {
		t.Skip("the kernel knows no whiteouts that are attributes (Linux 6.7)")
	}
	if got := strings.Join(s.changes(s.tree()), ", "); got != "D d/one" {
		t.Errorf("changes: %s", got)
	}
	roundTrip(t, s)
}

// TestAttributes has extended attributes of all namespaces, and those that no layer has.
func TestAttributes(t *testing.T) {
	s := newStack(t)
	sh(t, s.layers[0], "mkdir -p d/sub e; echo 1 >d/one; ln -s one d/link")
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	set := func(view string, attributes ...[3]string) {
		for _, set := range attributes {
			must(t, unix.Lsetxattr(filepath.Join(view, set[0]), set[1], []byte(set[2]), 0))
		}
	}
	s.write(func(view string) {
		set(view, [3]string{"d/one", "user.x", "1"}, [3]string{"d/one", "security.capability", capability},
			[3]string{"d/sub", "user.x", "a\x00b"})
	})
	if got := strings.Join(s.changes(s.tree()), ", "); got != "C d/one, C d/sub" {
		t.Errorf("changes: %s", got)
	}
	roundTrip(t, s)
	// containerd does not set these, and umoci no empty ones.
	s.write(func(view string) {
		set(view, [3]string{"d/one", "user.empty", ""}, [3]string{"e", "trusted.y", strings.Repeat("long", 200)},
			[3]string{"d/link", "trusted.z", "link"})
	})
	if got := strings.Join(s.changes(s.tree()), ", "); got != "C d/link, C d/one, C d/sub, C e" {
		t.Errorf("changes: %s", got)
	}
	view := s.viewAt(nil, slices.Concat([]string{s.unpacked(s.layer(s.tree()))}, s.layers))
	compare(t, "unpack", look(t, view), look(t, s.viewAt(s.uppers, s.layers)))
	must(t, unix.Setxattr(s.uppers[0]+"/d/one", "security.selinux", []byte("of this node"), 0))
	if got := look(t, s.unpacked(s.layer(s.tree())))["d/one"]; !strings.Contains(got, "user.x") || strings.Contains(got, "selinux") {
		t.Error(got)
	}
}

// TestTimesBeforeTheEpoch are not among the oddities: containerd takes them for 0.
func TestTimesBeforeTheEpoch(t *testing.T) {
	s := newStack(t)
	s.write(func(view string) { sh(t, view, "touch -d @-1000.25 x") })
	if got := look(t, s.unpacked(s.layer(s.tree())))["x"]; !strings.Contains(got, "time -1001.750000000") {
		t.Error(got)
	}
}

// TestSockets: a socket is not in the layer, and what it took the place of is not either.
func TestSockets(t *testing.T) {
	s := newStack(t)
	sh(t, s.layers[0], "mkdir d; echo 1 >d/one")
	s.write(func(view string) {
		must(t, os.Remove(view+"/d/one"))
		for _, name := range []string{"/d/one", "/s"} {
			must(t, unix.Mknod(view+name, unix.S_IFSOCK|0o600, 0))
		}
	})
	if got := strings.Join(s.changes(s.tree()), ", "); got != "C d/one, A s" {
		t.Errorf("changes: %s", got)
	}
	roundTrip(t, s)
}

// TestOwner maps owners, as for a view whose layers are shown with another owner.
func TestOwner(t *testing.T) {
	s := newStack(t)
	s.write(func(view string) { sh(t, view, "echo x >x; chown 1000:1001 x") })
	tree := s.tree()
	tree.Owner = func(uid, gid uint32) (uint32, uint32) { return uid + 5, gid + 7 }
	got := look(t, s.unpacked(s.layer(tree)))["x"]
	if !strings.Contains(got, "owner 1005:1008") {
		t.Error(got)
	}
}

// TestWalkWhileFilesChange walks a view that is being written to, and ends.
func TestWalkWhileFilesChange(t *testing.T) {
	s := newStack(t)
	sh(t, s.layers[0], "mkdir -p d/e; for i in $(seq 200); do echo $i >d/$i; done")
	s.write(func(view string) {
		done := make(chan struct{})
		stop := make(chan struct{})
		go func() {
			defer close(done)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				_ = os.RemoveAll(view + "/d/n")
				_ = os.MkdirAll(view+"/d/n/m/o", 0o755)
				_ = os.WriteFile(view+"/d/n/m/o/f", nil, 0o600)
				_ = os.Rename(view+"/d/n/m", view+"/d/m")
				_ = os.RemoveAll(view + "/d/m")
			}
		}()
		tree := diff.Tree{View: s.open(view), Base: s.detached(nil, s.layers), Uppers: []*os.File{s.open(s.current)}}
		for end := time.Now().Add(time.Second); time.Now().Before(end); {
			must(t, diff.Walk(t.Context(), tree, func(diff.Change) error { return nil }))
		}
		close(stop)
		<-done
	})
}
