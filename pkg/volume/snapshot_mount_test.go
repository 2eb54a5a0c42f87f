package volume_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/kubelet"
	"github.com/overlay-csi/overlay-csi/pkg/linux"
	"github.com/overlay-csi/overlay-csi/pkg/overlay"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/pkg/volume"
	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// snapshotSystems are the file systems and the keys of volumes with which snapshots are tried, with real mounts.
var snapshotSystems = []struct {
	name, fileSystem string
	keys             map[string]string
	inUse            bool
}{
	{"directory", "ext4", map[string]string{spec.KeySizeEnforcement: "none"}, false},
	{"project quota on ext4", "ext4 with project quota", map[string]string{spec.KeySizeEnforcement: "quota"}, false},
	{"project quota on xfs", "xfs with project quota", map[string]string{spec.KeySizeEnforcement: "quota"}, false},
	{"btrfs", "btrfs with quota", map[string]string{spec.KeySizeEnforcement: "quota"}, true},
	{"image on ext4", "ext4", map[string]string{spec.KeySizeEnforcement: "image"}, true},
	{"image on xfs", "xfs", map[string]string{spec.KeySizeEnforcement: "image"}, true},
}

// snapshotNode is a node whose data root is on a file system of its own, with a layer.
type snapshotNode struct {
	*benchNode
	t    *testing.T
	keys map[string]string
	pods int
}

func forSnapshots(t *testing.T, test func(t *testing.T, n *snapshotNode, inUse bool)) {
	needs.Root(t)
	for _, c := range snapshotSystems {
		t.Run(c.name, func(t *testing.T) {
			image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
			if err := drivertest.MakeImage(c.fileSystem, image, 2<<30, ""); err != nil {
				t.Skipf("no %s can be made here: %v", c.fileSystem, err)
			}
			if err := drivertest.MountImage(c.fileSystem, image, dir); err != nil {
				t.Skipf("this kernel does not mount %s: %v", c.fileSystem, err)
			}
			t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
			test(t, newSnapshotNode(t, dir, c.keys), c.inUse)
		})
	}
}

func newSnapshotNode(t *testing.T, dir string, keys map[string]string) *snapshotNode {
	n := &snapshotNode{benchNode: newNodeIn(t, dir), t: t, keys: keys}
	for _, name := range []string{"layer", "layer/moved", "layer/replaced"} {
		n.must(os.MkdirAll(filepath.Join(dir, "layers", name), 0o755))
	}
	for _, name := range []string{"below", "deleted", "moved/a", "replaced/b"} {
		n.must(os.WriteFile(filepath.Join(dir, "layers/layer", name), []byte("layer"), 0o644))
	}
	return n
}

func (n *snapshotNode) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

const snapshotSize = 64 << 20

func (n *snapshotNode) spec() spec.Spec {
	n.t.Helper()
	parsed, err := spec.Parse(map[string]string{spec.KeyLayers: "dir://r/layer"}, spec.Scope{Access: spec.ReadWriteOnce})
	n.must(err)
	// The size is the claim's.
	parsed.Size, parsed.SizeEnforcement = snapshotSize, spec.SizeEnforcement(n.keys[spec.KeySizeEnforcement])
	parsed.Ownership = spec.Ownership(n.keys[spec.KeyOwnership])
	return parsed
}

func (n *snapshotNode) create(name string, source volume.Source) error {
	_, err := n.manager.Create(n.t.Context(), volume.CreateRequest{
		Name: name, Spec: n.spec(), Access: spec.ReadWriteOnce, Source: source, Required: snapshotSize,
	})
	return err
}

// mounted is a volume in a pod.
type mounted struct {
	n           *snapshotNode
	id, path    string
	isUnmounted bool
}

func (n *snapshotNode) publish(id string, group *uint32) (*mounted, error) {
	n.t.Helper()
	n.pods++
	uid := fmt.Sprintf("00000000-0000-0000-0000-%012d", n.pods)
	m := &mounted{n: n, id: id, path: filepath.Join(n.dir, "kubelet/pods", uid, "volumes/kubernetes.io~csi/v/mount")}
	n.must(os.MkdirAll(filepath.Dir(m.path), 0o755))
	got, err := n.manager.Get(id)
	if err != nil {
		return nil, err
	}
	err = n.manager.Publish(n.t.Context(), volume.PublishRequest{
		VolumeID: id, Target: m.path, Spec: got.Spec, Provisioned: true, Access: spec.ReadWriteOnce, Pod: kubelet.Pod{UID: uid}, Group: group,
		Attributes: overlay.Attributes{NoSUID: true, NoDev: true},
	})
	if err != nil {
		return nil, err
	}
	n.t.Cleanup(m.unpublish)
	return m, nil
}

func (n *snapshotNode) mount(id string) *mounted {
	n.t.Helper()
	m, err := n.publish(id, nil)
	n.must(err)
	return m
}

func (m *mounted) unpublish() {
	m.n.t.Helper()
	if m.isUnmounted {
		return
	}
	m.isUnmounted = true
	m.n.must(m.n.manager.Unpublish(context.Background(), m.id, m.path))
}

func (m *mounted) write(name, content string) {
	m.n.t.Helper()
	m.n.must(os.WriteFile(filepath.Join(m.path, name), []byte(content), 0o644))
}

// want fails the test if a file has other content, or is there although none is wanted.
func (m *mounted) want(name, want string) {
	m.n.t.Helper()
	content, err := os.ReadFile(filepath.Join(m.path, name))
	if want == "" && errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil || string(content) != want {
		m.n.t.Errorf("%s of volume %s has %q, %v; want %q", name, m.id, content, err, want)
	}
}

// change has a view differ from its layer in all ways.
func (m *mounted) change() {
	m.n.t.Helper()
	m.write("file", "old")
	m.write("below", "old")
	must := m.n.must
	must(os.Remove(filepath.Join(m.path, "deleted")))
	must(os.Rename(filepath.Join(m.path, "moved"), filepath.Join(m.path, "moved-to")))
	must(os.RemoveAll(filepath.Join(m.path, "replaced")))
	must(os.Mkdir(filepath.Join(m.path, "replaced"), 0o755))
	must(os.Link(filepath.Join(m.path, "file"), filepath.Join(m.path, "link")))
	must(unix.Setxattr(m.path, "user.root", []byte("x"), 0))
	must(os.Chmod(m.path, 0o751))
}

// wantChanged fails the test if the view is not as change left it.
func (m *mounted) wantChanged() {
	m.n.t.Helper()
	for name, want := range map[string]string{
		"file": "old", "below": "old", "deleted": "", "moved/a": "", "moved-to/a": "layer", "replaced/b": "", "link": "old",
	} {
		m.want(name, want)
	}
	if info, err := os.Stat(m.path); err != nil || info.Mode().Perm() != 0o751 {
		m.n.t.Errorf("the root of volume %s: %v, %v", m.id, info.Mode(), err)
	}
	if value, err := linux.GetXattrAt(nil, m.path, "user.root"); err != nil || string(value) != "x" {
		m.n.t.Errorf("an attribute of the root of volume %s: %q, %v", m.id, value, err)
	}
}

// wantNothingLeft fails the test if a frozen upper or a loop device of one is left.
func (n *snapshotNode) wantNothingLeft() {
	n.t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.dir, "data/frozen"))
	n.must(err)
	if len(entries) > 0 {
		n.t.Errorf("%d frozen uppers are left", len(entries))
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	n.must(err)
	for _, loop := range loops {
		if file, err := os.ReadFile(loop); err == nil && strings.HasPrefix(string(file), n.dir) {
			n.t.Errorf("a loop device is left: %s", file)
		}
	}
}

// TestSnapshotsOfViews: a volume, snapshots of it and clones each go on for themselves, whichever of them is deleted.
func TestSnapshotsOfViews(t *testing.T) {
	forSnapshots(t, func(t *testing.T, n *snapshotNode, inUse bool) {
		for _, used := range []bool{false, true} {
			name := "at rest"
			if used {
				name = "in use"
			}
			t.Run(name, func(t *testing.T) {
				n.t = t
				n.must(n.create("v", volume.Source{}))
				source := n.mount("v")
				source.change()
				if !used {
					source.unpublish()
				}
				_, err := n.manager.CreateSnapshot(t.Context(), volume.SnapshotRequest{Name: "s", Volume: "v"})
				if used && !inUse {
					if !errdefs.IsFailedPrecondition(err) {
						t.Errorf("got %v", err)
					}
					source.unpublish()
					n.must(n.manager.Delete(t.Context(), "v"))
					n.wantNothingLeft()
					return
				}
				n.must(err)
				if !used {
					source = n.mount("v")
					source.wantChanged()
				}
				source.write("file", "new")
				source.write("deleted", "new")

				n.must(n.create("c1", volume.Source{Snapshot: "s"}))
				clone := n.mount("c1")
				clone.wantChanged()
				clone.write("file", "clone")
				source.want("file", "new")
				if used {
					source.want("link", "new")
				} else {
					// As with files of layers, the names of a file part when it is copied up.
					source.want("link", "old")
				}
				source.want("deleted", "new")
				clone.unpublish()

				// A clone of the clone, of which a part is in frozen uppers of both.
				n.must(n.create("c2", volume.Source{Volume: "c1"}))
				second := n.mount("c2")
				second.want("file", "clone")
				second.want("moved-to/a", "layer")

				source.unpublish()
				n.must(n.manager.Delete(t.Context(), "v"))
				n.must(n.create("c3", volume.Source{Snapshot: "s"}))
				third := n.mount("c3")
				third.wantChanged()
				n.must(n.manager.DeleteSnapshot(t.Context(), "s", nil))
				second.want("file", "clone")
				third.wantChanged()
				third.unpublish()
				second.unpublish()
				third = n.mount("c3")
				third.wantChanged()
				third.unpublish()
				for _, id := range []string{"c1", "c2", "c3"} {
					n.must(n.manager.Delete(t.Context(), id))
				}
				n.wantNothingLeft()
			})
		}
	})
}

// TestSnapshotGroups: the files of frozen uppers belong to the group of the pod, whichever they were written with.
func TestSnapshotGroups(t *testing.T) {
	forSnapshots(t, func(t *testing.T, n *snapshotNode, _ bool) {
		first, second := uint32(1000), uint32(2000)
		wantGroup := func(m *mounted, name string, want uint32) {
			t.Helper()
			stat, err := linux.StatPath(filepath.Join(m.path, name))
			if err != nil || stat.Gid != want {
				t.Errorf("%s of volume %s has group %d, %v; want %d", name, m.id, stat.Gid, err, want)
			}
		}
		n.must(n.create("v", volume.Source{}))
		source, err := n.publish("v", &first)
		n.must(err)
		source.write("file", "1")
		source.unpublish()
		_, err = n.manager.CreateSnapshot(t.Context(), volume.SnapshotRequest{Name: "s", Volume: "v"})
		n.must(err)
		n.must(n.create("c", volume.Source{Snapshot: "s"}))
		for _, c := range []struct {
			group *uint32
			want  uint32
		}{{nil, first}, {&second, second}, {nil, second}, {&first, first}} {
			clone, err := n.publish("c", c.group)
			n.must(err)
			wantGroup(clone, "", c.want)
			wantGroup(clone, "file", c.want)
			wantGroup(clone, "below", c.want)
			// A file that is copied up keeps its group, also when another pod comes.
			name := fmt.Sprint("new-", c.want)
			clone.write(name, "x")
			n.must(os.Chmod(filepath.Join(clone.path, "file"), 0o640))
			wantGroup(clone, "file", c.want)
			wantGroup(clone, name, c.want)
			clone.unpublish()
		}
		// The source has not changed.
		source, err = n.publish("v", &first)
		n.must(err)
		wantGroup(source, "file", first)
		source.unpublish()
		// Frozen twice, with a group of its own each.
		_, err = n.manager.CreateSnapshot(t.Context(), volume.SnapshotRequest{Name: "s2", Volume: "c"})
		n.must(err)
		n.must(n.create("c2", volume.Source{Snapshot: "s2"}))
		clone, err := n.publish("c2", &second)
		n.must(err)
		for _, name := range []string{"", "file", "below", "new-1000", "new-2000"} {
			wantGroup(clone, name, second)
		}
	})
}

// TestSnapshotOwners: files whose metadata alone was copied up are whole in a clone.
func TestSnapshotOwners(t *testing.T) {
	needs.Root(t)
	n := newSnapshotNode(t, t.TempDir(), map[string]string{spec.KeyOwnership: "chown", spec.KeySizeEnforcement: "none"})
	group, other := uint32(1000), uint32(2000)
	n.must(n.create("v", volume.Source{}))
	source, err := n.publish("v", &group)
	n.must(err)
	source.write("file", "1")
	source.unpublish()
	n.must(n.create("c", volume.Source{Volume: "v"}))
	for _, group := range []uint32{group, other} {
		clone, err := n.publish("c", &group)
		n.must(err)
		clone.want("below", "layer")
		clone.want("file", "1")
		for _, name := range []string{"", "below", "file", "moved/a"} {
			if stat, err := linux.StatPath(filepath.Join(clone.path, name)); err != nil || stat.Gid != group {
				t.Errorf("%s has group %d, %v; want %d", name, stat.Gid, err, group)
			}
		}
		clone.unpublish()
	}
}

// TestFrozenUpperIsLost: nothing takes its place, and the volume says what is wrong.
func TestFrozenUpperIsLost(t *testing.T) {
	forSnapshots(t, func(t *testing.T, n *snapshotNode, _ bool) {
		n.must(n.create("v", volume.Source{}))
		source := n.mount("v")
		source.write("file", "1")
		source.unpublish()
		n.must(n.create("c", volume.Source{Volume: "v"}))
		frozen, err := filepath.Glob(filepath.Join(n.dir, "data/frozen/*/*"))
		if err != nil || len(frozen) != 1 {
			t.Fatalf("found %v, %v", frozen, err)
		}
		kept := filepath.Join(n.dir, "kept")
		n.must(os.Rename(frozen[0], kept))
		for _, id := range []string{"v", "c"} {
			if _, err := n.publish(id, nil); !errdefs.IsDataLoss(err) {
				t.Errorf("publish volume %s: %v", id, err)
			}
			conditions, err := n.manager.Health(t.Context(), id, "")
			if err != nil || len(conditions) != 1 || conditions[0].Severity != volume.Lost ||
				!strings.Contains(conditions[0].Message, frozen[0]) {
				t.Errorf("volume %s is %v, %v", id, conditions, err)
			}
		}
		// It is given back.
		n.must(os.Rename(kept, frozen[0]))
		clone := n.mount("c")
		clone.want("file", "1")
		if conditions, err := n.manager.Health(t.Context(), "c", ""); err != nil || len(conditions) > 0 {
			t.Errorf("afterwards it is %v, %v", conditions, err)
		}
	})
}

// TestSnapshotOnAFullDisk: where there is no room beside what was written for what may be written, there is no snapshot, and the volume
// is as before.
func TestSnapshotOnAFullDisk(t *testing.T) {
	forSnapshots(t, func(t *testing.T, n *snapshotNode, _ bool) {
		n.must(n.create("v", volume.Source{}))
		source := n.mount("v")
		source.write("file", strings.Repeat("x", 32<<20))
		source.unpublish()
		full, err := os.Create(filepath.Join(n.dir, "full"))
		n.must(err)
		defer full.Close()
		for size := int64(64 << 20); size >= 4096; size /= 2 {
			for {
				info, err := full.Stat()
				n.must(err)
				if err := linux.Reserve(full, info.Size()+size); err != nil {
					if !errors.Is(err, syscall.ENOSPC) {
						t.Fatal(err)
					}
					n.must(full.Truncate(info.Size()))
					break
				}
			}
		}
		disk, err := linux.FileSystemUsageAt(n.dir)
		n.must(err)
		_, err = n.manager.CreateSnapshot(t.Context(), volume.SnapshotRequest{Name: "s", Volume: "v"})
		if err == nil && n.keys[spec.KeySizeEnforcement] != "none" && disk.Bytes.Available < 32<<20 {
			t.Errorf("there is a snapshot, and %d bytes are left on the disk", disk.Bytes.Available)
		}
		n.must(full.Truncate(0))
		source = n.mount("v")
		source.want("file", strings.Repeat("x", 32<<20))
		source.unpublish()
		_, err = n.manager.CreateSnapshot(t.Context(), volume.SnapshotRequest{Name: "s", Volume: "v"})
		n.must(err)
	})
}
