// Package postgres tests the real driver with PostgreSQL on a claim: snapshots and clones of its data directory, at rest and while
// transactions go on. It needs Debian's package postgresql.
package postgres

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overlay-csi/overlay-csi/test/drivertest"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// kind is a kind of claim, and whether it can be copied in use.
type kind struct {
	fileSystem, enforcement string
	inUse                   bool
}

// databaseSize is the size of the claim in bytes.
const databaseSize = 512 << 20

func TestPostgres(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes minutes (-test.short)")
	}
	needs.Root(t)
	installed(t)
	kinds := []kind{{"xfs", "image", true}, {"btrfs with quota", "", true}, {"ext4", "image", true}, {"ext4", "none", false}}
	for _, kind := range kinds[:rounds(1, len(kinds))] {
		t.Run(kind.fileSystem+" "+kind.enforcement, func(t *testing.T) {
			parameters := map[string]string{"layers": drivertest.Layers("base")}
			if kind.enforcement != "" {
				parameters["sizeEnforcement"] = kind.enforcement
			}
			n := newNode(t, kind.fileSystem)
			source := n.create("database", nil, parameters)
			pod, d := n.use("source", source)
			d.run("initdb", "-D", d.dir, "--username=postgres", "--auth=trust", "--locale=C", "--encoding=UTF8", "--data-checksums")
			d.start()
			d.run("pgbench", "--initialize", "--quiet")
			d.run("pgbench", "--no-vacuum", "--client=4", "--transactions=100")
			written := d.transactions()
			n.end(pod, source, d)

			snapshot, err := n.snapshot("at-rest", source)
			must(t, err)
			n.wantClone("restored", ofSnapshot(snapshot), parameters, written, written)
			n.wantClone("clone", ofVolume(source), parameters, written, written)

			pod, d = n.use("again", source)
			d.start()
			bench := d.command("pgbench", "--no-vacuum", "--client=4", "--time=3600")
			must(t, bench.Start())
			for i := range rounds(2, 20) {
				n.copyInUse(fmt.Sprint("in-use-", i), source, d, parameters, kind.inUse)
			}
			for d.transactions() <= written {
				time.Sleep(10 * time.Millisecond)
			}
			must(t, bench.Process.Signal(syscall.SIGINT))
			_ = bench.Wait()
			d.check()
			t.Logf("%d transactions beside the snapshots", d.transactions()-written)
			n.end(pod, source, d)
			n.wantClone("last", ofSnapshot(snapshot), parameters, written, written)
			n.delete(source)
			n.deleteSnapshot(snapshot)
			left, err := n.Leftovers()
			must(t, err)
			if len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// rounds is how often something is done: with OVERLAY_CSI_PROOF=1, as make proof sets it, the long way.
func rounds(short, long int) int {
	if os.Getenv("OVERLAY_CSI_PROOF") == "1" {
		return long
	}
	return short
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// node is a node whose data root is on a file system of its own.
type node struct {
	*drivertest.Node
	t *testing.T
}

func newNode(t *testing.T, fileSystem string) *node {
	t.Helper()
	binary, err := drivertest.Build(t.TempDir())
	must(t, err)
	dir, remove, err := drivertest.WorkDir()
	must(t, err)
	n, err := drivertest.NewNode(dir, binary)
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the driver's log:\n%s", n.Log())
		}
		if err := errors.Join(n.Stop(), remove()); err != nil {
			t.Error(err)
		}
	})
	must(t, os.Mkdir(n.DataRoot, 0o755))
	image := n.DataRoot + ".img"
	err = drivertest.MakeImage(fileSystem, image, 4<<30, "")
	needs.Program(t, err)
	must(t, err)
	must(t, drivertest.MountImage(fileSystem, image, n.DataRoot))
	_, err = n.Layer("base", map[string]string{"about": "a database"})
	must(t, err)
	must(t, n.Start(t.Context()))
	return &node{n, t}
}

func ofSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func ofVolume(v drivertest.Volume) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.ID}}}
}

// create makes a claim's volume, which begins with a source unless that is nil.
func (n *node) create(name string, source *csi.VolumeContentSource, parameters map[string]string) drivertest.Volume {
	n.t.Helper()
	const mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	response, err := n.Controller().CreateVolume(n.t.Context(), &csi.CreateVolumeRequest{
		Name: name, Parameters: parameters, VolumeContentSource: source, CapacityRange: &csi.CapacityRange{RequiredBytes: databaseSize},
		VolumeCapabilities: []*csi.VolumeCapability{drivertest.Capability(mode)},
	})
	must(n.t, err)
	v := response.GetVolume()
	return drivertest.Volume{Name: name, ID: v.GetVolumeId(), Claim: true, Mode: mode, Attributes: v.GetVolumeContext()}
}

func (n *node) delete(v drivertest.Volume) {
	n.t.Helper()
	_, err := n.Controller().DeleteVolume(n.t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.ID})
	must(n.t, err)
}

func (n *node) snapshot(name string, v drivertest.Volume) (id string, err error) {
	response, err := n.Controller().CreateSnapshot(n.t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.ID})
	return response.GetSnapshot().GetSnapshotId(), err
}

func (n *node) deleteSnapshot(id string) {
	n.t.Helper()
	_, err := n.Controller().DeleteSnapshot(n.t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id})
	must(n.t, err)
}

// use publishes a volume for a pod with the group of the database's user.
func (n *node) use(name string, v drivertest.Volume) (*drivertest.Pod, *database) {
	n.t.Helper()
	pod, err := n.NewPod(name)
	must(n.t, err)
	_, group := postgresUser(n.t)
	v.Group = fmt.Sprint(group)
	target, err := pod.Publish(n.t.Context(), v)
	must(n.t, err)
	return pod, newDatabase(n.t, target)
}

// end stops the server of a pod, and ends the pod.
func (n *node) end(pod *drivertest.Pod, v drivertest.Volume, d *database) {
	n.t.Helper()
	d.stop(syscall.SIGINT)
	must(n.t, unix.Unmount(filepath.Dir(d.dir), 0))
	must(n.t, pod.Unpublish(n.t.Context(), v))
	must(n.t, pod.Remove())
}

// copyInUse makes a snapshot and a clone of a volume while its server runs transactions. Both have all that were committed before, and none
// that began later.
func (n *node) copyInUse(name string, source drivertest.Volume, d *database, parameters map[string]string, canCopy bool) {
	n.t.Helper()
	before := d.transactions()
	snapshot, err := n.snapshot(name, source)
	after := d.transactions()
	if !canCopy {
		if status.Code(err) != codes.FailedPrecondition {
			n.t.Errorf("a snapshot in use was answered with %v", err)
		}
		return
	}
	must(n.t, err)
	n.wantClone("restored-"+name, ofSnapshot(snapshot), parameters, before, after)
	n.deleteSnapshot(snapshot)
	if after = d.transactions(); after <= before {
		n.t.Errorf("%d transactions after %d: the source does not go on", after, before)
	}
	n.wantCloneInUse("clone-"+name, source, d, parameters)
}

func (n *node) wantCloneInUse(name string, source drivertest.Volume, d *database, parameters map[string]string) {
	n.t.Helper()
	before := d.transactions()
	v := n.create(name, ofVolume(source), parameters)
	n.wantDatabase(v, before, d.transactions())
}

// wantClone makes a volume of a source, and checks that it has a database with as many transactions.
func (n *node) wantClone(name string, source *csi.VolumeContentSource, parameters map[string]string, least, most int) {
	n.t.Helper()
	n.wantDatabase(n.create(name, source, parameters), least, most)
}

// wantDatabase starts a server on a volume, checks what it has, runs transactions, and deletes the volume.
func (n *node) wantDatabase(v drivertest.Volume, least, most int) {
	n.t.Helper()
	pod, d := n.use("of-"+v.Name, v)
	d.start()
	if has := d.transactions(); has < least || has > most {
		n.t.Errorf("%s has %d transactions, of at least %d and at most %d", v.Name, has, least, most)
	}
	d.check()
	d.run("pgbench", "--no-vacuum", "--client=2", "--transactions=20")
	d.check()
	d.stop(syscall.SIGINT)
	d.run("pg_checksums", "--check", "-D", d.dir)
	n.end(pod, v, d)
	n.delete(v)
}
