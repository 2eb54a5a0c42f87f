package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// groupText is an fsGroup, "" for none.
func groupText(group uint32) string {
	if group == 0 {
		return ""
	}
	return fmt.Sprint(group)
}

// withGroup is a volume for a pod with an fsGroup, "" for none.
func withGroup(v drivertest.Volume, group string) drivertest.Volume {
	v.Group = group
	return v
}

// groupOf is the group of a file.
func groupOf(t *testing.T, path string) uint32 {
	t.Helper()
	var stat unix.Stat_t
	must(t, unix.Lstat(path, &stat))
	return stat.Gid
}

// wantGroups fails the test if files of a view do not have their groups.
func wantGroups(t *testing.T, target string, want map[string]uint32) {
	t.Helper()
	for name, group := range want {
		if got := groupOf(t, filepath.Join(target, name)); got != group {
			t.Errorf("%q has group %d, want %d", name, got, group)
		}
	}
}

// writeAs makes a file as a process of a pod does that has a group as a supplementary one.
func writeAs(t *testing.T, group uint32, target, name string) {
	t.Helper()
	file, err := user{uid: 1000, gid: 1000, groups: []uint32{group}}.open(t, target, name, unix.O_CREAT|unix.O_WRONLY)
	must(t, err)
	must(t, file.Close())
}

// useByOneGroup has a pod with fsGroup 1000 write to a volume in every way, and ends it.
func useByOneGroup(t *testing.T, node *drivertest.Node, v drivertest.Volume) {
	t.Helper()
	pod := newPod(t, node, "first")
	target := publish(t, pod, withGroup(v, "1000"))
	must(t, os.Mkdir(filepath.Join(target, "sub"), 0o770))
	must(t, os.Chown(filepath.Join(target, "sub"), 1000, -1))
	must(t, unix.Chmod(filepath.Join(target, "sub"), 0o2770))
	writeAs(t, 1000, target, "new")
	writeAs(t, 1000, target, "sub/deep")
	must(t, os.Symlink("new", filepath.Join(target, "symlink")))
	must(t, os.Link(filepath.Join(target, "new"), filepath.Join(target, "hard")))
	must(t, user{uid: 1000, gid: 1000, groups: []uint32{1000}}.edit(t, target, "group"))
	must(t, os.Remove(filepath.Join(target, "large")))
	// The directory of the layer has no set-group-ID.
	must(t, os.WriteFile(filepath.Join(target, "dir/roots"), []byte("x"), 0o640))
	must(t, os.WriteFile(filepath.Join(target, "others"), []byte("x"), 0o640))
	must(t, os.Chown(filepath.Join(target, "others"), 1000, 4000))
	wantGroups(t, target, map[string]uint32{"new": 1000, "sub/deep": 1000, "group": 1000, "root": 1000, "dir/roots": 0})
	unpublish(t, pod, withGroup(v, "1000"))
}

// ofTheGroup are the files that belong to the volume's group after useByOneGroup.
func ofTheGroup(group uint32) map[string]uint32 {
	files := map[string]uint32{}
	for _, name := range []string{"", "new", "hard", "symlink", "sub", "sub/deep", "group", "root", "dir", "dir/deep", "program", "link"} {
		files[name] = group
	}
	return files
}

// useByOtherGroups has pods with other groups, and none, use what useByOneGroup left. The driver is killed in between.
func useByOtherGroups(t *testing.T, node *drivertest.Node, v drivertest.Volume) {
	t.Helper()
	second := newPod(t, node, "second")
	target := publish(t, second, withGroup(v, "2000"))
	wantGroups(t, target, ofTheGroup(2000))
	if _, err := os.Lstat(filepath.Join(target, "large")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was removed: %v", err)
	}
	writeAs(t, 2000, target, "second")
	writeAs(t, 2000, target, "sub/second")
	must(t, user{uid: 1000, gid: 1000, groups: []uint32{2000}}.edit(t, target, "sub/deep"))
	wantGroups(t, target, map[string]uint32{"second": 2000, "sub/second": 2000, "sub/deep": 2000})
	must(t, node.Kill())
	start(t, node)
	publish(t, second, withGroup(v, "2000"))
	unpublish(t, second, withGroup(v, "2000"))

	third := newPod(t, node, "third")
	target = publish(t, third, withGroup(v, ""))
	wantGroups(t, target, ofTheGroup(2000))
	unpublish(t, third, withGroup(v, ""))

	fourth := newPod(t, node, "fourth")
	target = publish(t, fourth, withGroup(v, "1000"))
	wantGroups(t, target, ofTheGroup(1000))
	wantGroups(t, target, map[string]uint32{"second": 1000, "sub/second": 1000})
	wantFile(t, filepath.Join(target, "group"), "g+")
	wantFile(t, filepath.Join(target, "sub/deep"), "+")
	unpublish(t, fourth, withGroup(v, "1000"))
}

// TestGroupOfThePodChanges: what pods with one fsGroup wrote belongs to that of the next pod, and no file is touched.
func TestGroupOfThePodChanges(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		v := claim("grouped", readWriteOnce, "layers", ownedLayer(t, node))
		useByOneGroup(t, node, v)
		pod := newPod(t, node, "pod")
		before := changeTimes(t, upperDir(node, pod, v))
		target := publish(t, pod, withGroup(v, "2000"))
		wantGroups(t, target, ofTheGroup(2000))
		wantGroups(t, target, map[string]uint32{"dir/roots": 0, "others": 4000, "theirs": 4000})
		unpublish(t, pod, withGroup(v, "2000"))
		if after := changeTimes(t, upperDir(node, pod, v)); !slices.Equal(before, after) {
			t.Errorf("files were changed:\n%q\n%q", before, after)
		}
		useByOtherGroups(t, node, v)
		deleteVolume(t, node, v)
		wantNothingLeft(t, node)
	})
}

// changeTimes are the files beneath a directory with the times when they were changed last, without whiteouts, which are links to a
// file in the work directory.
func changeTimes(t *testing.T, dir string) []string {
	t.Helper()
	var times []string
	must(t, filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || path == dir || entry.Type()&os.ModeCharDevice != 0 {
			return err
		}
		var stat unix.Stat_t
		err = unix.Lstat(path, &stat)
		times = append(times, fmt.Sprint(path, stat.Ctim))
		return err
	}))
	return times
}

// TestGroupOfThePodOnEveryBackend: the same on every file system that has persistent uppers, whose limit holds as before.
func TestGroupOfThePodOnEveryBackend(t *testing.T) {
	for name, c := range map[string]struct {
		system string
		keys   []string
	}{
		"directory":                    {},
		"disk image":                   {keys: []string{"sizeLimit", "24Mi", "sizeEnforcement", "image"}},
		"project quota of ext4":        {system: "ext4 with project quota", keys: []string{"sizeLimit", "24Mi"}},
		"project quota of xfs":         {system: "xfs with project quota", keys: []string{"sizeLimit", "24Mi"}},
		"qgroup of btrfs":              {system: "btrfs with quota", keys: []string{"sizeLimit", "24Mi"}},
		"directory, and layers as is":  {keys: []string{"ownership", "none"}},
		"directory, for a single pod":  {keys: []string{"layerOwner", "500:500"}},
		"disk image, and layers as is": {keys: []string{"sizeLimit", "24Mi", "sizeEnforcement", "image", "ownership", "none"}},
	} {
		t.Run(name, func(t *testing.T) {
			node := newNode(t)
			if c.system != "" {
				mountImage(t, c.system, 1<<30, node.DataRoot, "")
			}
			start(t, node)
			mode := readWriteOnce
			if name == "directory, for a single pod" {
				mode = readWriteOncePod
			}
			v := claim("grouped", mode, append([]string{"layers", ownedLayer(t, node)}, c.keys...)...)
			if slices.Contains(c.keys, "none") {
				useAsIs(t, node, v)
				deleteVolume(t, node, v)
				return
			}
			useByOneGroup(t, node, v)
			useByOtherGroups(t, node, v)
			if slices.Contains(c.keys, "sizeLimit") {
				pod := newPod(t, node, "filling")
				target := publish(t, pod, withGroup(v, "3000"))
				if n := writeUntilFull(t, filepath.Join(target, "filling")); n < 12<<20 || n > 24<<20 {
					t.Errorf("%d bytes fit into 24 MiB", n)
				}
				unpublish(t, pod, withGroup(v, "3000"))
			}
			deleteVolume(t, node, v)
		})
	}
}

// useAsIs uses a volume whose layers keep their groups.
func useAsIs(t *testing.T, node *drivertest.Node, v drivertest.Volume) {
	t.Helper()
	for _, group := range []uint32{1000, 2000, 1000} {
		pod := newPod(t, node, "pod")
		target := publish(t, pod, withGroup(v, fmt.Sprint(group)))
		name := fmt.Sprint("of-", group)
		writeAs(t, group, target, name)
		wantGroups(t, target, map[string]uint32{"": group, name: group, "of-1000": group, "root": 0, "dir/deep": 0, "theirs": 4000})
		unpublish(t, pod, withGroup(v, fmt.Sprint(group)))
	}
}

// TestGroupOfThePodOnAnOlderUpper: files that pods without an fsGroup wrote, or gave to one group, belong to the first fsGroup.
func TestGroupOfThePodOnAnOlderUpper(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		layers := ownedLayer(t, node)
		for _, given := range []uint32{0, 999} {
			t.Run(fmt.Sprint("group ", given), func(t *testing.T) {
				v := claim(fmt.Sprint("older-", given), readWriteOnce, "layers", layers)
				pod := newPod(t, node, "old")
				target := publish(t, pod, v)
				must(t, os.WriteFile(filepath.Join(target, "old"), []byte("x"), 0o660))
				must(t, os.Chmod(filepath.Join(target, "old"), 0o660))
				must(t, os.Chown(target, 0, int(given)))
				must(t, os.Chown(filepath.Join(target, "old"), 0, int(given)))
				unpublish(t, pod, v)
				for _, group := range []uint32{1000, 2000, 1000} {
					pod := newPod(t, node, "pod")
					target := publish(t, pod, withGroup(v, fmt.Sprint(group)))
					wantGroups(t, target, map[string]uint32{"": group, "old": group, "root": group})
					must(t, user{uid: 5, gid: 5, groups: []uint32{group}}.edit(t, target, "old"))
					roots := fmt.Sprint("dir/roots-", group)
					must(t, os.WriteFile(filepath.Join(target, roots), []byte("x"), 0o660))
					wantGroups(t, target, map[string]uint32{roots: 0, "dir/roots-1000": 0})
					unpublish(t, pod, withGroup(v, fmt.Sprint(group)))
				}
				deleteVolume(t, node, v)
			})
		}
	})
}

// TestGroupOfThePodIsShared: one view has one group.
func TestGroupOfThePodIsShared(t *testing.T) {
	node := startNode(t)
	v := claim("shared", readWriteOnce, "layers", ownedLayer(t, node))
	useByOneGroup(t, node, v)
	first, second, none := newPod(t, node, "one"), newPod(t, node, "two"), newPod(t, node, "none")
	target := publish(t, first, withGroup(v, "2000"))
	wantGroups(t, publish(t, second, withGroup(v, "2000")), ofTheGroup(2000))
	wantGroups(t, publish(t, none, v), ofTheGroup(2000))
	publish(t, none, v)
	_, err := newPod(t, node, "other").Publish(timeout(t), withGroup(v, "3000"))
	wantCode(t, err, codes.FailedPrecondition, "fsGroup", "wait until that pod is gone")
	wantGroups(t, target, ofTheGroup(2000))
	for _, pod := range []*drivertest.Pod{first, second, none} {
		unpublish(t, pod, v)
	}
	pod := newPod(t, node, "three")
	wantGroups(t, publish(t, pod, withGroup(v, "3000")), ofTheGroup(3000))
	unpublish(t, pod, v)
	deleteVolume(t, node, v)
	wantNothingLeft(t, node)
}

// noMappedUpper has the driver go over the files of an upper.
const noMappedUpper = "--disable-kernel-features=id-mapped-upper"

// TestGroupOfThePodByWalking: where the kernel cannot show other groups, all files of the upper are given to the group.
func TestGroupOfThePodByWalking(t *testing.T) {
	node := startNode(t, noMappedUpper)
	v := claim("walked", readWriteOnce, "layers", ownedLayer(t, node))
	useByOneGroup(t, node, v)
	pod := newPod(t, node, "pod")
	target := publish(t, pod, withGroup(v, "2000"))
	wantGroups(t, target, map[string]uint32{"dir/roots": 2000, "others": 2000, "theirs": 4000})
	wantOwner(t, filepath.Join(target, "others"), 1000, 2000, 0o660)
	must(t, os.Chown(filepath.Join(target, "others"), 1000, 4000))
	unpublish(t, pod, v)
	// As long as the group is the same, files that the pods gave to others stay theirs.
	target = publish(t, pod, withGroup(v, "2000"))
	wantGroups(t, target, map[string]uint32{"others": 4000})
	unpublish(t, pod, v)
	useByOtherGroups(t, node, v)
	deleteVolume(t, node, v)
	wantNothingLeft(t, node)
}

// TestGroupOfThePodInterrupted: a walk that was cut off is finished, for whichever group comes next, also where the kernel has learned
// to show other groups.
func TestGroupOfThePodInterrupted(t *testing.T) {
	takesMinutes(t)
	for name, c := range map[string]struct {
		// first is the group that the files have before.
		first, group        uint32
		newKernel, readOnly bool
		// want is the group that they have afterwards, if that is not group.
		want uint32
	}{
		"the group it was for":             {first: 1000, group: 2000},
		"the group it was before":          {first: 1000, group: 1000},
		"a third group":                    {first: 1000, group: 3000},
		"no group":                         {first: 1000, want: 1000},
		"another kernel":                   {first: 1000, group: 2000, newKernel: true},
		"another kernel, and group":        {first: 1000, group: 3000, newKernel: true},
		"a reader":                         {first: 1000, group: 2000, readOnly: true},
		"a reader of a third group":        {first: 1000, group: 3000, readOnly: true},
		"no group, and there was none":     {want: 2000},
		"a reader, and there was no group": {want: 2000, readOnly: true},
	} {
		t.Run(name, func(t *testing.T) {
			node := startNode(t, noMappedUpper)
			v := claim("walked", readWriteOnce, "layers", layersOf(t, node, map[string]string{"f": "f"}))
			pod := newPod(t, node, "pod")
			target := publish(t, pod, withGroup(v, groupText(c.first)))
			const files = 20000
			for n := range files {
				must(t, os.WriteFile(filepath.Join(target, fmt.Sprint("file-", n)), nil, 0o640))
			}
			unpublish(t, pod, v)
			upper := upperDir(node, pod, v)
			published := make(chan error, 1)
			go func() {
				_, err := pod.Publish(timeout(t), withGroup(v, "2000"))
				published <- err
			}()
			eventually(t, "the walk has begun", func() bool {
				_, err := unix.Lgetxattr(upper, "trusted.overlay-csi.group-changing", nil)
				return err == nil
			})
			must(t, node.Kill())
			if <-published == nil {
				t.Fatal("the publish was over before the kill")
			}
			changed := 0
			for n := range files {
				if groupOf(t, filepath.Join(upper, fmt.Sprint("file-", n))) == 2000 {
					changed++
				}
			}
			t.Logf("%d of %d files were changed", changed, files)
			if c.newKernel {
				node.RemoveArg(noMappedUpper)
			}
			start(t, node)
			unpublish(t, pod, v)
			want := max(c.group, c.want)
			next := newPod(t, node, "next")
			reading := withGroup(v, groupText(c.group))
			reading.ReadOnly = c.readOnly
			target = publish(t, next, reading)
			wrong := 0
			for n := range files {
				if groupOf(t, filepath.Join(target, fmt.Sprint("file-", n))) != want {
					wrong++
				}
			}
			if wrong > 0 {
				t.Errorf("%d of %d files are not of group %d", wrong, files, want)
			}
			unpublish(t, next, reading)
			deleteVolume(t, node, v)
		})
	}
}

// TestGroupOfThePodInAnotherVolume: kubelet may give that volume to the group or not.
func TestGroupOfThePodInAnotherVolume(t *testing.T) {
	node := startNode(t)
	layers := ownedLayer(t, node)
	pod := newPod(t, node, "pod")
	_, err := pod.EmptyDir("data")
	must(t, err)
	v := inline("layers", layers, "upper", "volume://data/x")
	for _, group := range []uint32{1000, 2000, 1000} {
		v := withGroup(v, fmt.Sprint(group))
		target := publish(t, pod, v)
		name := fmt.Sprint("of-", group)
		writeAs(t, group, target, name)
		wantGroups(t, target, map[string]uint32{"": group, name: group, "of-1000": group, "root": group})
		unpublish(t, pod, v)
	}
	wantNothingLeft(t, node)
}
