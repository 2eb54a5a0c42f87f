package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
)

// user is a process's user, group and supplementary groups.
type user struct {
	uid, gid int
	groups   []uint32
}

// open opens or makes a file beneath a directory as a user, without the directories above it having to let the user through.
func (u user) open(t *testing.T, dir, name string, flags int) (*os.File, error) {
	t.Helper()
	root, err := os.Open(dir)
	must(t, err)
	defer root.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer user{groups: []uint32{0}}.become(t)
	u.become(t)
	fd, err := unix.Openat(int(root.Fd()), name, flags|unix.O_CLOEXEC, 0o640)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// become makes this thread the user's, as far as files go.
func (u user) become(t *testing.T) {
	t.Helper()
	var groups unsafe.Pointer
	if len(u.groups) > 0 {
		groups = unsafe.Pointer(&u.groups[0])
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(u.groups)), uintptr(groups), 0); errno != 0 {
		t.Fatal(errno)
	}
	_, _ = unix.SetfsgidRetGid(u.gid)
	_, _ = unix.SetfsuidRetUid(u.uid)
}

// edit appends to a file as a user.
func (u user) edit(t *testing.T, dir, name string) error {
	t.Helper()
	file, err := u.open(t, dir, name, unix.O_WRONLY|unix.O_APPEND)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.WriteString("+")
	return err
}

func wantOwner(t *testing.T, path string, uid, gid, mode uint32) {
	t.Helper()
	var stat unix.Stat_t
	must(t, unix.Lstat(path, &stat))
	if stat.Uid != uid || stat.Gid != gid || stat.Mode&0o7777 != mode {
		t.Errorf("%s is %d:%d %04o, want %d:%d %04o", filepath.Base(path), stat.Uid, stat.Gid, stat.Mode&0o7777, uid, gid, mode)
	}
}

// ownedLayer is a layer with files of several owners and modes.
func ownedLayer(t *testing.T, node *drivertest.Node) string {
	t.Helper()
	layers := layersOf(t, node, map[string]string{"root": "r", "group": "g", "dir/deep": "d", "theirs": "t", "program": "p",
		"large": strings.Repeat("x", 4<<20)})
	dir := filepath.Join(node.LayerDir, "layer-0")
	must(t, os.Chmod(filepath.Join(dir, "group"), 0o664))
	must(t, os.Chmod(filepath.Join(dir, "dir"), 0o750))
	must(t, os.Chown(filepath.Join(dir, "theirs"), 4000, 4000))
	must(t, unix.Chmod(filepath.Join(dir, "program"), 0o4755))
	must(t, os.Symlink("root", filepath.Join(dir, "link")))
	return layers
}

// inUpper is what has been copied up of a volume: its names, and what they take on the disk.
func inUpper(t *testing.T, node *drivertest.Node, pod *drivertest.Pod, v drivertest.Volume) (names int, bytes int64) {
	t.Helper()
	path := filepath.Join(node.DataRoot, "volumes", pod.Request(v).GetVolumeId())
	must(t, filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !strings.Contains(path, "/upper/") {
			return nil
		}
		var stat unix.Stat_t
		if err := unix.Lstat(path, &stat); err != nil {
			return err
		}
		names++
		if !entry.IsDir() {
			bytes += stat.Blocks * 512
		}
		return nil
	}))
	return names, bytes
}

func TestGroupOfThePod(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		v := inline("layers", ownedLayer(t, node))
		v.Group = "2000"
		pod := newPod(t, node, "pod")
		target := publish(t, pod, v)
		wantOwner(t, target, 0, 2000, 0o2775)
		wantOwner(t, filepath.Join(target, "root"), 0, 2000, 0o644)
		wantOwner(t, filepath.Join(target, "group"), 0, 2000, 0o664)
		wantOwner(t, filepath.Join(target, "dir/deep"), 0, 2000, 0o644)
		wantOwner(t, filepath.Join(target, "theirs"), 4000, 4000, 0o644)
		wantOwner(t, filepath.Join(target, "program"), 0, 2000, 0o4755)
		if names, _ := inUpper(t, node, pod, v); names != 0 {
			t.Errorf("%d files were copied up", names)
		}
		app := user{uid: 1000, gid: 1000, groups: []uint32{2000}}
		file, err := app.open(t, target, "new", unix.O_CREAT|unix.O_WRONLY)
		must(t, err)
		must(t, file.Close())
		wantOwner(t, filepath.Join(target, "new"), 1000, 2000, 0o640)
		must(t, app.edit(t, target, "group"))
		wantOwner(t, filepath.Join(target, "group"), 0, 2000, 0o664)
		wantFile(t, filepath.Join(target, "group"), "g+")
		if err := app.edit(t, target, "root"); !errors.Is(err, unix.EACCES) {
			t.Errorf("a file that its group may only read was edited: %v", err)
		}
		must(t, pod.Unpublish(timeout(t), v))
		wantFile(t, filepath.Join(node.LayerDir, "layer-0/group"), "g")
		wantOwner(t, filepath.Join(node.LayerDir, "layer-0/root"), 0, 0, 0o644)
		wantNothingLeft(t, node)
	})
}

func TestOwnerOfTheLayers(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		v := claim("owned", readWriteOnce, "layers", ownedLayer(t, node), "layerOwner", "1000:3000")
		pod := newPod(t, node, "pod")
		target := publish(t, pod, v)
		wantOwner(t, target, 1000, 3000, 0o755)
		wantOwner(t, filepath.Join(target, "root"), 1000, 3000, 0o644)
		wantOwner(t, filepath.Join(target, "link"), 1000, 3000, 0o777)
		wantOwner(t, filepath.Join(target, "theirs"), 4000, 4000, 0o644)
		app := user{uid: 1000, gid: 1000}
		must(t, app.edit(t, target, "root"))
		must(t, app.edit(t, target, "dir/deep"))
		unpublish(t, pod, v)
		// The pod's group comes before the volume's.
		v.Group = "5000"
		target = publish(t, pod, v)
		wantFile(t, filepath.Join(target, "root"), "r+")
		wantOwner(t, target, 1000, 5000, 0o2775)
		wantOwner(t, filepath.Join(target, "group"), 1000, 5000, 0o664)
		again := v
		again.Group = "6000"
		_, err := pod.Publish(timeout(t), again)
		wantCode(t, err, codes.AlreadyExists, "another group")
		_, err = newPod(t, node, "sibling").Publish(timeout(t), again)
		wantCode(t, err, codes.FailedPrecondition, "fsGroup")
		unpublish(t, pod, v)
		deleteVolume(t, node, v)
		wantFile(t, filepath.Join(node.LayerDir, "layer-0/root"), "r")
		wantNothingLeft(t, node)
	})
}

func TestOwnershipWalk(t *testing.T) {
	onEachKernel(t, func(t *testing.T, node *drivertest.Node) {
		v := claim("walked", readWriteOnce, "layers", ownedLayer(t, node), "ownership", "chown", "layerOwner", "1000:1000")
		v.Group = "2000"
		pod := newPod(t, node, "pod")
		target := publish(t, pod, v)
		wantOwner(t, target, 1000, 2000, 0o2775)
		wantOwner(t, filepath.Join(target, "root"), 1000, 2000, 0o664)
		wantOwner(t, filepath.Join(target, "dir"), 1000, 2000, 0o2770)
		wantOwner(t, filepath.Join(target, "dir/deep"), 1000, 2000, 0o664)
		wantOwner(t, filepath.Join(target, "theirs"), 4000, 2000, 0o664)
		wantOwner(t, filepath.Join(target, "program"), 1000, 2000, 0o4775)
		wantOwner(t, filepath.Join(target, "link"), 1000, 2000, 0o777)
		wantFile(t, filepath.Join(target, "large"), strings.Repeat("x", 4<<20))
		if names, bytes := inUpper(t, node, pod, v); names < 8 || bytes > 1<<20 {
			t.Errorf("%d files were copied up, with %d bytes", names, bytes)
		}
		app := user{uid: 7000, gid: 7000, groups: []uint32{2000}}
		must(t, app.edit(t, target, "root"))
		must(t, app.edit(t, target, "dir/deep"))
		unpublish(t, pod, v)
		// Once is enough: what somebody changed since stays.
		target = publish(t, pod, v)
		must(t, os.Chmod(filepath.Join(target, "group"), 0o600))
		unpublish(t, pod, v)
		target = publish(t, pod, v)
		wantOwner(t, filepath.Join(target, "group"), 1000, 2000, 0o600)
		wantFile(t, filepath.Join(target, "root"), "r+")
		unpublish(t, pod, v)
		deleteVolume(t, node, v)
		wantNothingLeft(t, node)
	})
}

// TestInterruptedWalkIsFinished: a view whose files have not all been gone over is no published volume.
func TestInterruptedWalkIsFinished(t *testing.T) {
	takesMinutes(t)
	node := startNode(t)
	files := map[string]string{}
	for n := range 3000 {
		files[fmt.Sprintf("dir-%d/file-%d", n%30, n)] = "x"
	}
	v := claim("walked", readWriteOnce, "layers", layersOf(t, node, files), "ownership", "chown")
	v.Group = "2000"
	pod := newPod(t, node, "pod")
	upper := upperDir(node, pod, v)
	for round := range 4 {
		published := make(chan error, 1)
		go func() {
			_, err := pod.Publish(timeout(t), v)
			published <- err
		}()
		// Further on each time, and never at the end.
		eventually(t, "a part of the directories is copied up", func() bool {
			entries, _ := os.ReadDir(upper)
			return len(entries) > 7*round
		})
		must(t, node.Kill())
		if <-published == nil {
			t.Errorf("round %d: the publish was over before the kill", round)
		}
		start(t, node)
	}
	target := publish(t, pod, v)
	for name := range files {
		wantOwner(t, filepath.Join(target, name), 0, 2000, 0o664)
	}
	unpublish(t, pod, v)
	deleteVolume(t, node, v)
	wantNothingLeft(t, node)
}

// TestOwnershipWalkOfASharedView: a pod that shares a view gets no file that was not gone over, and keeps its view.
func TestOwnershipWalkOfASharedView(t *testing.T) {
	takesMinutes(t)
	for name, readOnly := range map[string]bool{"by a pod that writes": false, "by a pod that reads": true} {
		t.Run(name, func(t *testing.T) {
			node := startNode(t)
			files := map[string]string{}
			for n := range 3000 {
				files[fmt.Sprintf("dir-%d/file-%d", n%30, n)] = "x"
			}
			v := claim("walked", readWriteOnce, "layers", layersOf(t, node, files), "ownership", "chown")
			v.Group = "2000"
			first, second := newPod(t, node, "first"), newPod(t, node, "second")
			upper := upperDir(node, first, v)
			killInWalk(t, node, first, v, upper, 2)
			start(t, node)
			shared := v
			shared.ReadOnly = readOnly
			target := publish(t, second, shared)
			for name := range files {
				wantOwner(t, filepath.Join(target, name), 0, 2000, 0o664)
			}
			before := mountID(t, target)
			publish(t, second, shared)
			publish(t, first, v)
			if after := mountID(t, target); after != before {
				t.Errorf("the pod's view was mounted again: mount %d, before %d", after, before)
			}
			unpublish(t, first, v)
			wantFile(t, filepath.Join(target, "dir-0/file-0"), "x")
			unpublish(t, second, shared)
			deleteVolume(t, node, v)
			wantNothingLeft(t, node)
		})
	}
}

// TestReaderGetsNoUnfinishedView: a pod that only reads a claim gets its files once they were all gone over. The driver is killed amid the
// walk for a pod that writes, which then goes away or stays, and amid that for the reader.
func TestReaderGetsNoUnfinishedView(t *testing.T) {
	takesMinutes(t)
	files := map[string]string{}
	for n := range 3000 {
		files[fmt.Sprintf("dir-%d/file-%d", n%30, n)] = "x"
	}
	for name, c := range map[string]struct {
		writerStays, cutOffAgain bool
		group                    string
		want                     uint32
		args                     []string
	}{
		"the writer stays":          {writerStays: true, cutOffAgain: true, group: "2000", want: 2000},
		"the writer goes":           {group: "2000", want: 2000},
		"the writer goes, twice":    {cutOffAgain: true, group: "2000", want: 2000},
		"another group":             {group: "3000", want: 3000},
		"no group":                  {want: 2000},
		"mount(8)":                  {group: "2000", want: 2000, args: kernels["mount(8)"]},
		"mount(8), twice":           {cutOffAgain: true, group: "2000", want: 2000, args: kernels["mount(8)"]},
		"no detached layers, twice": {cutOffAgain: true, group: "2000", want: 2000, args: kernels["no detached layers"]},
	} {
		t.Run(name, func(t *testing.T) {
			node := startNode(t, c.args...)
			v := claim("walked", readWriteOnce, "layers", layersOf(t, node, files), "ownership", "chown")
			reading := withGroup(v, c.group)
			reading.ReadOnly = true
			v = withGroup(v, "2000")
			writer, reader := newPod(t, node, "writer"), newPod(t, node, "reader")
			upper := upperDir(node, writer, v)
			killInWalk(t, node, writer, v, upper, 2)
			start(t, node)
			if !c.writerStays {
				unpublish(t, writer, v)
			}
			if c.cutOffAgain {
				killInWalk(t, node, reader, reading, upper, 12)
				start(t, node)
			}
			target := publish(t, reader, reading)
			wrong := 0
			for name := range files {
				if groupOf(t, filepath.Join(target, name)) != c.want {
					wrong++
				}
			}
			if wrong > 0 {
				t.Errorf("%d of %d files are not of group %d", wrong, len(files), c.want)
			}
			wantOwner(t, filepath.Join(target, "dir-0/file-0"), 0, c.want, 0o664)
			if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("the reader wrote: %v", err)
			}
			unpublish(t, reader, reading)
			if c.writerStays {
				unpublish(t, writer, v)
			}
			deleteVolume(t, node, v)
			wantNothingLeft(t, node)
		})
	}
}

// killInWalk publishes a volume and kills the driver once some directories are copied up. The publish is then not over.
func killInWalk(t *testing.T, node *drivertest.Node, pod *drivertest.Pod, v drivertest.Volume, upper string, copied int) {
	t.Helper()
	published := make(chan error, 1)
	go func() {
		_, err := pod.Publish(timeout(t), v)
		published <- err
	}()
	eventually(t, "a part of the directories is copied up", func() bool {
		entries, _ := os.ReadDir(upper)
		return len(entries) > copied
	})
	must(t, node.Kill())
	if <-published == nil {
		t.Fatal("the publish was over before the kill")
	}
}

// mountID identifies the mount that a directory is on.
func mountID(t *testing.T, path string) uint64 {
	t.Helper()
	var stat unix.Statx_t
	// An old kernel returns the ID that another mount may get later.
	must(t, unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID|unix.STATX_MNT_ID_UNIQUE, &stat))
	return stat.Mnt_id
}

// TestLayerThatCannotBeMapped: an overlay is such a file system.
func TestLayerThatCannotBeMapped(t *testing.T) {
	node := newNode(t, "--layer-root-allow-submounts="+drivertest.LayerRoot)
	start(t, node)
	layers := layersOf(t, node, map[string]string{"f": "f"})
	view := filepath.Join(node.LayerDir, "view")
	must(t, os.MkdirAll(view, 0o755))
	for _, dir := range []string{"a", "b"} {
		must(t, os.MkdirAll(filepath.Join(node.Dir, dir), 0o755))
	}
	must(t, unix.Mount("overlay", view, "overlay", 0, "lowerdir="+filepath.Join(node.Dir, "a")+":"+filepath.Join(node.Dir, "b")))
	v := inline("layers", layers+",dir://layers/view")
	v.Group = "2000"
	pod := newPod(t, node, "pod")
	_, err := pod.Publish(timeout(t), v)
	wantCode(t, err, codes.FailedPrecondition, "view", "ID-mapped", "set ownership to chown")
	for _, ownership := range []string{"chown", "none"} {
		v.Attributes["ownership"] = ownership
		target := publish(t, pod, v)
		wantOwner(t, target, 0, 2000, 0o2775)
		want := map[string]uint32{"chown": 2000, "none": 0}[ownership]
		mode := map[string]uint32{"chown": 0o664, "none": 0o644}[ownership]
		wantOwner(t, filepath.Join(target, "f"), 0, want, mode)
		unpublish(t, pod, v)
	}
	v.Group = "4294967295"
	_, err = pod.Publish(timeout(t), v)
	wantCode(t, err, codes.InvalidArgument, "group")
	wantNothingLeft(t, node)
}
