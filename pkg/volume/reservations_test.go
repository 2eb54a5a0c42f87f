package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/overlay-csi/overlay-csi/pkg/dataroot"
	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/spec"
	"github.com/overlay-csi/overlay-csi/test/needs"
)

// TestRecordsAreReadOnce: to ask for the capacity or to make a volume reads no other volume's record. Each of many claims would read
// those of all others.
func TestRecordsAreReadOnce(t *testing.T) {
	n := newFakeNode(t)
	claim := func(name string) {
		_, err := n.manager.Create(t.Context(), CreateRequest{Name: name, Spec: parsed(t, rwo, spec.KeySizeLimit, "8Mi"), Access: rwo.Access})
		check(t, err)
	}
	for _, name := range []string{"a", "b", "c"} {
		claim(name)
	}
	_, err := n.manager.Capacity(t.Context())
	check(t, err)
	opened := opens(t, n.records.Dir("a"), n.records.Dir("b"), n.records.Dir("c"))
	_, err = n.manager.Capacity(t.Context())
	check(t, err)
	claim("d")
	if count := opened(); count > 0 {
		t.Errorf("the records of 3 other volumes were opened %d times", count)
	}
}

// TestRecordThatCannotBeReadForAMoment: what the volume reserves counts as soon as its record can be read.
func TestRecordThatCannotBeReadForAMoment(t *testing.T) {
	n := newFakeNode(t)
	n.create(spec.KeySizeLimit, "64Mi")
	path := filepath.Join(n.records.Dir("v"), dataroot.Record)
	check(t, os.Rename(path, path+".moved"))
	check(t, os.Symlink(path, path))
	n.boot(testBoot)
	_, err := n.manager.Capacity(t.Context())
	check(t, err)
	check(t, os.Rename(path+".moved", path))
	_, err = n.manager.Capacity(t.Context())
	check(t, err)
	if n.manager.ledger.reserved != 64*mib {
		t.Errorf("%d bytes are reserved, want 64 MiB", n.manager.ledger.reserved)
	}
}

// TestCopyTakesRoom: while a volume in use is copied, others do not get the room of the copy.
func TestCopyTakesRoom(t *testing.T) {
	n := newFakeNode(t)
	n.sized()
	n.onDiskUsage = func() int64 { return 8 * mib }
	var meanwhile int64
	n.whileCopying = func() { meanwhile = n.manager.ledger.reservedNow() }
	_, err := n.snapshot("s")
	check(t, err)
	if after := n.manager.ledger.reservedNow(); meanwhile != 72*mib || after != 64*mib {
		t.Errorf("%d bytes are reserved while 8 MiB are copied and %d afterwards, want 72 and 64 MiB", meanwhile, after)
	}
}

// opens returns a function that says how often files in directories have been opened.
func opens(t *testing.T, dirs ...string) func() int {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	for _, dir := range dirs {
		_, err := unix.InotifyAddWatch(fd, dir, unix.IN_OPEN)
		check(t, err)
	}
	return func() int {
		buffer := make([]byte, 64<<10)
		n, err := unix.Read(fd, buffer)
		if errors.Is(err, unix.EAGAIN) {
			return 0
		}
		check(t, err)
		return strings.Count(string(buffer[:n]), dataroot.Record)
	}
}

// TestReservationsFollowTheRecords compares what is reserved in memory with what a new process reads, after each operation.
func TestReservationsFollowTheRecords(t *testing.T) {
	n := newFakeNode(t)
	_, err := n.manager.Capacity(t.Context())
	check(t, err)
	step := func(name string, do func()) {
		t.Helper()
		do()
		fresh := newReservations(n.manager.config, n.manager.uppers)
		check(t, fresh.load())
		now := n.manager.ledger
		if got, want := fmt.Sprint(now.reserved, bytesOf(now.volumes)), fmt.Sprint(fresh.reserved, bytesOf(fresh.volumes)); got != want {
			t.Errorf("%s: %s is reserved, and by the records %s", name, got, want)
		}
	}
	var req PublishRequest
	path := filepath.Join(n.records.Dir("v"), dataroot.Record)
	step("claim published", func() { req = n.sized() })
	step("expanded", func() { wantExpanded(t, n, req, 128*mib) })
	step("record cannot be written", func() {
		check(t, os.Mkdir(path+".new", 0o700))
		check(t, os.Mkdir(path+".new/x", 0o700))
		if _, err := n.manager.Expand(t.Context(), "v", req.Target, 256*mib, 0); err == nil {
			t.Error("expanded without a record")
		}
		check(t, os.RemoveAll(path+".new"))
	})
	step("removed by a person", func() {
		check(t, os.Rename(n.records.Dir("v"), n.dir+"/moved"))
		n.manager.reconcile(t.Context())
	})
	step("restored by a person", func() {
		check(t, os.Rename(n.dir+"/moved", n.records.Dir("v")))
		n.manager.reconcile(t.Context())
	})
	if n.manager.ledger.reserved != 128*mib {
		t.Errorf("%d bytes are reserved, want 128 MiB", n.manager.ledger.reserved)
	}
	step("unpublished", func() { check(t, n.manager.Unpublish(t.Context(), "v", req.Target)) })
	step("deleted", func() { check(t, n.manager.Delete(t.Context(), "v")) })
	step("inline published", func() { req = n.publish(n.request("p1", inline, spec.KeySizeLimit, "8Mi")) })
	step("inline unpublished", func() { check(t, n.manager.Unpublish(t.Context(), req.VolumeID, req.Target)) })
	if n.manager.ledger.reserved != 0 {
		t.Errorf("%d bytes are reserved of nothing", n.manager.ledger.reserved)
	}
	step("publish fails", func() {
		n.fail["overlay"] = errForced
		if err := n.manager.Publish(t.Context(), n.request("p2", inline, spec.KeySizeLimit, "8Mi")); err == nil {
			t.Error("published")
		}
	})
}

func bytesOf(volumes map[string]*reservation) map[string]int64 {
	all := map[string]int64{}
	for id, r := range volumes {
		all[id] = r.bytes()
	}
	return all
}

// TestManyVolumesAreMeasuredSeldom: what many volumes take of the disk is measured for a part of the time only, and what is deleted
// meanwhile is not counted as free and as theirs.
func TestManyVolumesAreMeasuredSeldom(t *testing.T) {
	n := manyVolumesNode(t)
	first, err := n.manager.Capacity(t.Context())
	check(t, err)
	n.manager.ledger.valid = n.manager.ledger.valid.AddDate(1, 0, 0)
	n.free()
	later, err := n.manager.Capacity(t.Context())
	check(t, err)
	if n.count != manyVolumes || later > first {
		t.Errorf("%d uppers were measured, want %d once; capacity %d, and %d after a pod has deleted something",
			n.count, manyVolumes, first, later)
	}
	// Half of it fits without what the uppers take.
	_, err = n.claim(first / 2)
	check(t, err)
	if n.count != manyVolumes {
		t.Errorf("%d uppers were measured for a claim for which there is room anyhow", n.count-manyVolumes)
	}
}

// TestWhatIsReservedIsMeasured: pods have deleted what something else has taken since the uppers were measured, and a claim gets no more
// than there is.
func TestWhatIsReservedIsMeasured(t *testing.T) {
	n := manyVolumesNode(t)
	before, err := n.manager.Capacity(t.Context())
	check(t, err)
	n.manager.ledger.valid = n.manager.ledger.valid.AddDate(1, 0, 0)
	n.free()
	check(t, os.WriteFile(filepath.Join(fakeRoot{n.fakeNode}.Path(), "image"), make([]byte, 64*mib), 0o600))
	_, err = n.claim(before - 32*mib)
	wantKind(t, err, errdefs.ErrResourceExhausted)
	_, err = n.claim(before - 96*mib)
	check(t, err)
}

// busyNode has a data root in memory, of 1 GiB, with many volumes of 1 MiB that take 64 MiB together.
type busyNode struct {
	*fakeNode
	taken string
	each  int64
	// count is how many uppers were measured.
	count int
}

func manyVolumesNode(t *testing.T) *busyNode {
	t.Helper()
	needs.Root(t)
	n := &busyNode{fakeNode: newFakeNode(t), each: 64 * mib / manyVolumes}
	root := fakeRoot{n.fakeNode}
	check(t, unix.Mount("tmpfs", root.Path(), "tmpfs", 0, "size=1g"))
	t.Cleanup(func() { _ = unix.Unmount(root.Path(), unix.MNT_DETACH) })
	check(t, os.Mkdir(root.VolumesDir(), 0o700))
	for i := range manyVolumes {
		r := &record.Record{ID: fmt.Sprint("v", i), Spec: parsed(t, inline, spec.KeySizeLimit, "1Mi"), Inline: true, Size: mib}
		check(t, n.records.Save(r.With(record.Publication{Target: n.target(r.ID)})))
	}
	n.taken = filepath.Join(root.Path(), "taken")
	check(t, os.WriteFile(n.taken, make([]byte, 64*mib), 0o600))
	n.onDiskUsage = func() int64 { n.count++; return n.each }
	return n
}

// free has pods delete what they wrote.
func (n *busyNode) free() {
	check(n.t, os.Remove(n.taken))
	n.each = 0
}

func (n *busyNode) claim(size int64) (Volume, error) {
	return n.manager.Create(n.t.Context(), CreateRequest{
		Name: fmt.Sprint("claim-", size), Spec: parsed(n.t, rwo, spec.KeySizeLimit, fmt.Sprint(size)), Access: rwo.Access,
	})
}

// TestAFailedGrowthIsNotUsable: an image that was extended, and whose file system could not grow, takes more than is reserved for it.
func TestAFailedGrowthIsNotUsable(t *testing.T) {
	n := newFakeNode(t)
	req := n.sized()
	n.onDiskUsage = func() int64 { return 128 * mib }
	n.fail["grow"] = errForced
	n.whileGrowing = func() {
		_, err := n.manager.Capacity(t.Context())
		check(t, err)
		n.manager.ledger.valid = time.Now().Add(time.Hour)
	}
	_, err := n.manager.Expand(t.Context(), "v", req.Target, 128*mib, 0)
	wantKind(t, err, errForced)
	cached, err := n.manager.Capacity(t.Context())
	check(t, err)
	n.manager.ledger.valid = time.Time{}
	measured, err := n.manager.Capacity(t.Context())
	check(t, err)
	// Others write to this disk too.
	if cached-measured > 32*mib {
		t.Errorf("capacity %d after a growth by 64 MiB has failed, and measured again %d", cached, measured)
	}
}
